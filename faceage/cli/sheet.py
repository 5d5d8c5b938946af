"""`faceage sheet`."""

from __future__ import annotations

from pathlib import Path

import click

from faceage.cli.options import (
    AGE,
    NetworkOptions,
    network_options,
    no_label_option,
    output_options,
    overwrite_option,
    source_age_option,
    strength_option,
)
from faceage.cli.output import Output
from faceage.media.find import FORMATS
from faceage.media.image import Still, write_image
from faceage.media.video import check_output
from faceage.pipeline.label import label_fields
from faceage.pipeline.sheet import make_sheet
from faceage.types import RGB, Frame

DEFAULT_AGES = "10,20,...,80"


class Ages(click.ParamType):
    """Ages in years: "10,20,30", and "10,20,...,80" for steps of ten."""

    name = "ages"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Return the ages."""
        parts = [part.strip() for part in str(value).split(",")]
        ages: list[float] = []
        for i, part in enumerate(parts):
            if part != "...":
                ages.append(AGE(part, param, ctx))
                continue
            step = ages[-1] - ages[-2] if len(ages) > 1 and i + 1 < len(parts) else 0.0
            if not step:
                self.fail('"..." needs two ages before it and one after: 10,20,...,80', param, ctx)
            last = AGE(parts[i + 1], param, ctx)
            while (last - ages[-1] - step) / step > 1e-6:
                ages.append(ages[-1] + step)
        return ages


@click.command("sheet")
@click.argument("photo", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The picture, e.g. sheet.png.",
)
@click.option("--ages", type=Ages(), default=DEFAULT_AGES, show_default=True, help="The ages shown, in years.")
@source_age_option
@strength_option
@network_options
@overwrite_option
@no_label_option
@output_options
def command(
    *,
    photo: Path,
    output: Path,
    ages: list[float],
    source_age: float | None,
    strength: float,
    network: NetworkOptions,
    overwrite: bool,
    no_label: bool,
    out: Output,
) -> None:
    """Draw a photo's faces at several ages: a row for each face, a column for each age."""
    if output.suffix.lower() not in FORMATS:
        raise click.BadParameter(f"{output} must end in one of {', '.join(FORMATS)}", param_hint="-o")
    with out:
        check_output(output, [photo], overwrite=overwrite)
        networks = network.load(out)
        picture = make_sheet(networks, photo, ages, source_age=source_age, strength=strength)
        frame = Frame(planes=(picture,), pixel_format="rgb24", color=RGB)
        label = None if no_label else label_fields(networks, ", ".join(f"{age:g}" for age in ages))
        write_image(output, Still(frame=frame, format="PNG"), frame, overwrite=overwrite, label=label)
        out.item({"source": str(photo), "target": str(output), "ages": ages})
        out.line(f"{photo}: {len(ages)} ages -> {output}")
