"""The options that are about videos alone."""

from __future__ import annotations

import re

import click

from faceage.cli.options import group
from faceage.media.video import EncodeOptions
from faceage.track import TrackConfig


class Time(click.ParamType):
    """Seconds, or [HH:]MM:SS."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        if not re.fullmatch(r"((\d+:)?\d+:)?\d+(\.\d+)?", str(value)):
            self.fail(f"{value!r} is no time; give seconds or [HH:]MM:SS", param, ctx)
        seconds = 0.0
        for part in str(value).split(":"):
            seconds = 60 * seconds + float(part)
        return seconds


def _encoder_option(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if bad := [name for name, equals, _ in pairs if not (name and equals)]:
        raise click.BadParameter(f"{bad[0]!r} is not KEY=VALUE")
    return {name: value for name, _, value in pairs}


def _encode(codec: str | None, crf: float | None, preset: str | None, encoder_option: dict[str, str]) -> EncodeOptions:
    return EncodeOptions(codec=codec, crf=crf, preset=preset, encoder_options=encoder_option)


encode_options = group(
    "encode",
    _encode,
    click.option("--codec", help="Codec or encoder by FFmpeg's name: h264, libx265, ffv1. Default: the source's."),
    click.option("--crf", type=float, help="Constant quality, lower is better. Default: visually lossless."),
    click.option("--preset", help="The encoder's preset."),
    click.option(
        "--encoder-option", multiple=True, metavar="KEY=VALUE", callback=_encoder_option,
        help="Any option of the encoder; may be repeated.",
    ),
)  # fmt: skip
detect_every_option = click.option(
    "--detect-every", type=click.IntRange(min=1), default=TrackConfig.detect_every, show_default=True, metavar="FRAMES",
    help="Frames between two searches of the whole picture; in between, known faces are followed.",
)  # fmt: skip
