"""`faceage video`."""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import replace
from pathlib import Path

import click

from faceage.cli.encoding import Time, detect_every_option, encode_options
from faceage.cli.options import (
    NetworkOptions,
    WorkerOptions,
    network_options,
    no_label_option,
    output_options,
    overwrite_option,
    worker_options,
)
from faceage.cli.output import Output
from faceage.cli.person import Wish, wish_options
from faceage.errors import CheckpointError, EngineError, FaceAgeError, MediaError
from faceage.media.codecs import choose_encoder
from faceage.media.video import EncodeOptions, check_output, probe_video
from faceage.pipeline.plan import load_plan
from faceage.pipeline.report import PersonReport, VideoReport
from faceage.pipeline.video import age_video
from faceage.track import TrackConfig

PEOPLE_SHOWN = 6
"""People named in the summary of a video."""


@click.command("video")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(readable=False, path_type=Path), metavar="IN...")
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="OUT",
    help="The output file; for several inputs, or if it is a folder, the folder of the outputs.",
)  # fmt: skip
@wish_options
@click.option(
    "--plan",
    "plan_folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="What `faceage scan` wrote of the video: it is not scanned again.",
)
@network_options
@worker_options
@detect_every_option
@click.option("--start", type=Time(), metavar="TIME", help="Leave out what is before: seconds or [HH:]MM:SS.")
@click.option("--end", type=Time(), metavar="TIME", help="Leave out what comes from this time on.")
@encode_options
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Keep what is finished beside the output until it is complete; the same command then goes on.",
)
@click.option(
    "--work", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Keep it in this folder instead."
)
@click.option(
    "--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write a trace of all stages, for chrome://tracing or Perfetto. One input.",
)  # fmt: skip
@overwrite_option
@no_label_option
@output_options
def command(
    *,
    inputs: tuple[Path, ...],
    output: str,
    wish: Wish,
    plan_folder: Path | None,
    network: NetworkOptions,
    work_on: WorkerOptions,
    detect_every: int,
    start: float | None,
    end: float | None,
    encode: EncodeOptions,
    resume: bool,
    work: Path | None,
    trace: Path | None,
    overwrite: bool,
    no_label: bool,
    out: Output,
) -> None:
    """Age every face in videos and write them like their sources.

    Codec, pixel format, timing, audio, subtitles and tags stay as they are. A video without a face passes through.
    """
    encode = replace(encode, overwrite=overwrite)
    if len(inputs) > 1 and (wish.people or plan_folder or trace):
        raise click.UsageError("--person, --plan and --trace are about one video; give one input")
    if trace and not trace.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {trace.parent} does not exist; make it first", param_hint="--trace")
    pairs = _pair(inputs, output)
    out.can_go_on = resume
    with out:
        plan = None if plan_folder is None else load_plan(plan_folder)
        if plan:
            start = plan.start_s if start is None else start
            end = plan.end_s if end is None else end
        pairs = [pair for pair in pairs if _can_start(*pair, encode, out)]
        if not pairs:
            return
        networks = network.load(out)
        with work_on.start(network, networks) as workers:
            for source, target in pairs:
                try:
                    report = age_video(
                        networks,
                        source,
                        target,
                        wish.everybody,
                        people=wish.people,
                        plan=plan,
                        encode=encode,
                        track=TrackConfig(detect_every=detect_every),
                        start_s=start,
                        end_s=end,
                        resume=resume,
                        work=work,
                        workers=workers,
                        label=not no_label,
                        trace=trace,
                        progress=functools.partial(out.progress, str(source)),
                    )
                except (EngineError, CheckpointError):
                    raise  # the next file would fail too
                except FaceAgeError as error:
                    out.item({"source": str(source), "target": str(target), "error": str(error)})
                    continue
                out.end_progress()
                _report(report, out)


def _pair(inputs: tuple[Path, ...], output: str) -> list[tuple[Path, Path]]:
    """Return the output of each input; a name that ends in a slash is a folder's."""
    if len(inputs) == 1 and not output.endswith(os.sep) and not os.path.isdir(output):
        return [(inputs[0], Path(output))]
    names = [source.name for source in inputs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise click.UsageError(f"several inputs are named {twice.pop()}; process them into folders of their own")
    return [(source, Path(output, source.name)) for source in inputs]


def _can_start(source: Path, target: Path, encode: EncodeOptions, out: Output) -> bool:
    """Look at the input and the output before any engine is loaded, and report what cannot work."""
    try:
        info = probe_video(source)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MediaError(f"the folder {target.parent} cannot be made ({error.strerror}); name another") from error
        check_output(target, [source], overwrite=encode.overwrite)
        encoder = choose_encoder(info, encode, target.suffix)
    except FaceAgeError as error:
        out.item({"source": str(source), "target": str(target), "error": str(error)})
        return False
    out.detail(f"{source}: {info.width}x{info.height} {info.codec} {info.pixel_format}; encoder {encoder.name} "
               f"{encoder.pixel_format} {encoder.options}")  # fmt: skip
    return True


def _report(report: VideoReport, out: Output) -> None:
    out.item(dataclasses.asdict(report))
    fps = report.frames / report.seconds
    out.line(f"{report.source}: {report.frames} frames, {_people(report)}, {fps:.1f} fps -> {report.target}")
    if report.damage:
        out.warn(report.damage)
    stages = ", ".join(f"{stage} {ms:g}" for stage, ms in report.stage_ms.items())
    out.detail(f"{report.source}: milliseconds a frame, overlapping: {stages}")


def _ages(person: PersonReport) -> str:
    if person.target_age is None:
        return f"{person.source_age:.0f} kept"
    moving = "" if person.target_age_first is None else f"{person.target_age_first:.0f} -> "
    return f"{person.source_age:.0f} -> {moving}{person.target_age:.0f}"


def _people(report: VideoReport) -> str:
    people = report.people
    if not report.frames_with_faces:
        found = "faces found, none to be changed (profiles, or --strength 0)" if people else "no face found"
        return f"{found}, passed through untouched"
    shown = ", ".join(_ages(person) for person in people[:PEOPLE_SHOWN])
    more = f" and {len(people) - PEOPLE_SHOWN} more" if len(people) > PEOPLE_SHOWN else ""
    return f"{len(people)} {'person' if len(people) == 1 else 'people'} ({shown}{more})"
