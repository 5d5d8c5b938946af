"""`faceage images`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import click

from faceage.cli.options import (
    NetworkOptions,
    WorkerOptions,
    network_options,
    no_label_option,
    output_options,
    overwrite_option,
    request_options,
    worker_options,
)
from faceage.cli.output import Output
from faceage.errors import MediaError
from faceage.media.image import find_images
from faceage.pipeline.photos import photo_reports
from faceage.pipeline.report import PhotoReport
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
@worker_options
@overwrite_option
@no_label_option
@output_options
def command(
    *,
    inputs: tuple[Path, ...],
    output: Path,
    request: AgeRequest,
    network: NetworkOptions,
    work_on: WorkerOptions,
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
        timer, summary = StageTimer(), _Summary()
        with work_on.start(network, networks) as workers:
            for report in photo_reports(workers, jobs, request, overwrite=overwrite, label=not no_label, timer=timer):
                summary.add(report)
                out.progress("photos", "aged", summary.photos, len(jobs))
                _report(report, out)
        out.end_progress()
        summary.show(output, timer, out)


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
        ages = ", ".join(f"{face.source_age:.0f} -> {face.target_age:.0f}" for face in report.aged)
        what = f"{len(report.aged)} {'face' if len(report.aged) == 1 else 'faces'} ({ages})"
        if not report.aged:
            found = "faces found, none to be changed (profiles, or --strength 0)" if report.faces else "no face found"
            what = f"{found}, passed through untouched"
        out.line(f"{report.source}: {what} -> {report.target}")


@dataclass
class _Summary:
    """What was done to all photos of a run."""

    photos: int = 0
    failed: int = 0
    faces: int = 0
    untouched: int = 0
    started: float = field(default_factory=perf_counter)

    def add(self, report: PhotoReport) -> None:
        self.photos += 1
        if report.error is not None:
            self.failed += 1
            return
        self.faces += len(report.aged)
        self.untouched += not report.aged

    def show(self, output: Path, timer: StageTimer, out: Output) -> None:
        speed = self.photos / (perf_counter() - self.started)
        stages = timer.ms_per(self.photos)
        out.result("stage_ms", stages)
        out.result("photos_per_second", round(speed, 2))
        done = self.photos - self.failed
        out.line(
            f"{done} {'photo' if done == 1 else 'photos'} written to {output}: {self.faces} faces aged, "
            f"{self.untouched} without a face passed through, {self.failed} failed, {speed:.1f} photos/s"
        )
        out.detail("milliseconds a photo, overlapping: " + ", ".join(f"{k} {v:g}" for k, v in stages.items()))
