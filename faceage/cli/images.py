"""`faceage images`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from time import perf_counter

import click

from faceage.cli.options import (
    NetworkOptions,
    describe_target,
    network_options,
    no_label_option,
    output_options,
    overwrite_option,
    request_options,
)
from faceage.cli.output import Output
from faceage.errors import MediaError
from faceage.media.image import find_images
from faceage.pipeline.photos import PhotoReport, age_photos
from faceage.pipeline.request import AgeRequest, StageTimer

SKIPPED_SHOWN = 5
"""Files named in the note about what is not an image."""


@click.command("images")
@click.argument(
    # Not `readable`: a file that may not be read is one failed file, not wrong usage that stops all the others.
    "inputs", nargs=-1, required=True, type=click.Path(readable=False, path_type=Path), metavar="IN...",
)  # fmt: skip
@click.option(
    "-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Folder of the outputs; a folder that is an input keeps its tree in it.",
)  # fmt: skip
@request_options
@network_options
@overwrite_option
@no_label_option
@output_options
def command(
    *,
    inputs: tuple[Path, ...],
    output: Path,
    request: AgeRequest,
    network: NetworkOptions,
    overwrite: bool,
    no_label: bool,
    out: Output,
) -> None:
    """Age every face in photos and folders of photos.

    Format, bit depth, orientation, colour profile and tags stay as they are. A photo without a face passes through.
    Outputs that are there already are left alone, so an interrupted run goes on by being repeated.
    """
    with out:
        jobs = _jobs(inputs, output, overwrite, out)
        if not jobs:
            return
        networks = network.load(out)
        timer = StageTimer()
        finished = 0

        def progress(report: PhotoReport) -> None:
            nonlocal finished
            finished += 1
            out.progress("photos", "aged", finished, len(jobs))
            _report(report, out)

        start = perf_counter()
        label = None if no_label else network.label(describe_target(request))
        reports = age_photos(networks, jobs, request, overwrite=overwrite, label=label, progress=progress, timer=timer)
        out.end_progress()
        _summarise(reports, perf_counter() - start, output, timer, out)


def _jobs(inputs: tuple[Path, ...], output: Path, overwrite: bool, out: Output) -> list[tuple[Path, Path]]:
    """Return (source, target) of each photo to be aged, and report what is not."""
    present = []
    for path in inputs:
        if path.is_dir() and output.exists() and path.samefile(output):
            raise MediaError(f"the output {output} is an input; faceage does not edit in place, name another folder")
        if not path.exists():
            out.item({"source": str(path), "error": f"{path} does not exist; check the name"})
        elif path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            out.item({"source": str(path), "error": f"{path} is a folder that may not be read; check its permissions"})
        else:
            present.append(path)
    found, skipped = find_images(present, exclude=output)
    if skipped:
        names = ", ".join(str(path) for path in skipped[:SKIPPED_SHOWN])
        more = ", ..." if len(skipped) > SKIPPED_SHOWN else ""
        out.note(f"{len(skipped)} not images, left out: {names}{more}")
    if present and not found:
        raise MediaError(f"no image in {', '.join(map(str, present))}; faceage reads JPEG, PNG, WebP, TIFF and BMP")
    jobs, already = [], 0
    for source, relative in found:
        target = output / relative
        if target.exists() and target.samefile(source):
            message = f"the output {target} is the input; faceage does not edit in place, name another folder"
            out.item({"source": str(source), "target": str(target), "error": message})
        elif target.exists() and not overwrite:
            already += 1
        else:
            jobs.append((source, target))
    if already:
        out.note(f"{already} already there (--overwrite replaces them)")
    return jobs


def _report(report: PhotoReport, out: Output) -> None:
    out.item(dataclasses.asdict(report))
    if report.error is None and not out.is_interactive:
        aged = _aged(report)
        ages = ", ".join(f"{face['source_age']:.0f} -> {face['target_age']:.0f}" for face in aged)
        what = f"{len(aged)} {'face' if len(aged) == 1 else 'faces'} ({ages})"
        if not aged:
            found = "faces found, none to be changed (profiles, or --strength 0)" if report.faces else "no face found"
            what = f"{found}, passed through untouched"
        out.line(f"{report.source}: {what} -> {report.target}")


def _aged(report: PhotoReport) -> list[dict]:
    """Return the faces that were changed: a profile is found but left alone."""
    return [face for face in report.faces if face["weight"] > 0]


def _summarise(reports: list[PhotoReport], seconds: float, output: Path, timer: StageTimer, out: Output) -> None:
    done = [report for report in reports if report.error is None]
    faces = sum(len(_aged(report)) for report in done)
    untouched = sum(not _aged(report) for report in done)
    stages = timer.ms_per(len(reports))
    out.result("stage_ms", stages)
    out.result("photos_per_second", round(len(reports) / seconds, 2))
    out.line(
        f"{len(done)} {'photo' if len(done) == 1 else 'photos'} written to {output}: {faces} faces aged, "
        f"{untouched} without a face passed through, {len(reports) - len(done)} failed, "
        f"{len(reports) / seconds:.1f} photos/s"
    )
    out.detail("milliseconds a photo, overlapping: " + ", ".join(f"{k} {v:g}" for k, v in stages.items()))
