"""`faceage scan`."""

from __future__ import annotations

import functools
from pathlib import Path

import click

from faceage.cli.encoding import Time, detect_every_option
from faceage.cli.options import NetworkOptions, network_options, output_options, overwrite_option
from faceage.cli.output import Output
from faceage.errors import MediaError
from faceage.media.files import write_atomically
from faceage.media.video import VideoReader, probe_video
from faceage.pipeline.people_page import people_page
from faceage.pipeline.plan import person_age, save_plan
from faceage.pipeline.scan import scan
from faceage.track import TrackConfig


@click.command("scan")
@click.argument("video", type=click.Path(readable=False, path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="The folder that gets plan.json, plan.npz and people.html.",
)  # fmt: skip
@network_options
@detect_every_option
@click.option("--start", type=Time(), metavar="TIME", help="Leave out what is before: seconds or [HH:]MM:SS.")
@click.option("--end", type=Time(), metavar="TIME", help="Leave out what comes from this time on.")
@overwrite_option
@output_options
def command(
    *,
    video: Path,
    output: Path,
    network: NetworkOptions,
    detect_every: int,
    start: float | None,
    end: float | None,
    overwrite: bool,
    out: Output,
) -> None:
    """Find out who is in a video, once, and write a plan to age it by and a page of its people.

    `faceage video --plan DIR` then ages it, as often as you like, without scanning it again.
    """
    with out:
        probe_video(video)  # before engines are loaded, which takes longer
        if (output / "plan.json").exists() and not overwrite:
            raise MediaError(f"{output} holds a plan; pass --overwrite or name another folder")
        networks = network.load(out)
        with VideoReader(video, start_s=start, end_s=end, device=networks.device) as reader:
            plan = scan(
                networks,
                reader,
                TrackConfig(detect_every=detect_every),
                progress=functools.partial(out.progress, str(video)),
            )
        out.end_progress()
        try:
            save_plan(plan, output)
            with VideoReader(video, start_s=start, end_s=end) as again:
                page = people_page(plan, again, video.name)
            with write_atomically(output / "people.html") as file:
                file.write(page.encode())
        except OSError as error:
            raise MediaError(f"{output} cannot be written ({error.strerror}); name another folder") from error
        ages = {number: round(person_age(tracks), 1) for number, tracks in plan.people().items()}
        out.item({"source": str(video), "target": str(output), "frames": plan.frame_count, "people": ages})
        shown = ", ".join(f"{number} looks {age:.0f}" for number, age in ages.items())
        out.line(f"{video}: {plan.frame_count} frames, {len(ages)} people ({shown}) -> {output / 'people.html'}")
        if plan.damage:
            out.warn(plan.damage)
