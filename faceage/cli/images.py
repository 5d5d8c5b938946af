"""`faceage images`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

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
from faceage.media.find import LeftOut, find_images
from faceage.pipeline.request import AgeRequest
from faceage.pipeline.timer import StageTimer
from faceage.pipeline.work import check_space

if TYPE_CHECKING:
    from faceage.pipeline.folder import Skipped
    from faceage.pipeline.report import PhotoReport

_CONVERT = "convert it to JPEG, PNG, WebP or TIFF first"
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
@click.option(
    "--resume/--no-resume", default=True, show_default=True,
    help="Leave alone what an earlier run with the same options did, and try again what failed.",
)  # fmt: skip
@click.option(
    "--on-error", type=click.Choice(["skip", "stop"]), default="skip", show_default=True,
    help="What a photo that fails does to the run.",
)  # fmt: skip
@click.option(
    "--quality", type=click.IntRange(1, 100),
    help="Code JPEG and WebP pictures anew, in this quality. Default: only the blocks that change, as they were coded.",
)  # fmt: skip
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
    resume: bool,
    on_error: Literal["skip", "stop"],
    quality: int | None,
    no_label: bool,
    out: Output,
) -> None:
    """Age every face in photos and folders of photos.

    Format, bit depth, orientation, colour profile and tags stay as they are. A photo without a face passes through.
    An interrupted run goes on by being repeated: the output folder keeps a list of what was done.
    """
    out.can_go_on = resume
    with out:
        present = _present(inputs, output, out)
        count, size = _survey(present, output, out)
        if not count:
            return
        networks = network.load(out, in_background=True)
        # Engines are opened while what reads and writes photos is imported. By default Python would let their threads
        # wait 5 ms for that at every step.
        sys.setswitchinterval(0.0005)
        from faceage.pipeline.folder import Manifest, age_folder, folder_options, locked_folder

        with locked_folder(output):
            check_space({output: size})
            options = folder_options(networks.fingerprints, request, label=not no_label, quality=quality)
            skipped: Counter[Skipped] = Counter()
            timer, summary = StageTimer(), _Summary()
            with (
                work_on.start(network, networks) as workers,
                Manifest(output, options, fresh=not resume) as manifest,
                closing(
                    age_folder(
                        workers,
                        find_images(present, exclude=output),
                        output,
                        manifest,
                        request,
                        overwrite=overwrite,
                        label=not no_label,
                        quality=quality,
                        skipped=skipped,
                        timer=timer,
                    )
                ) as reports,
            ):
                for report in reports:
                    summary.add(report)
                    out.progress("photos", "aged", summary.photos + skipped.total(), count)
                    _report(report, out)
                    if report.error and on_error == "stop":
                        out.note("stopped at the first photo that failed; the same command goes on")
                        break
            out.end_progress()
            networks.wait_until_open()  # those that no photo has needed
            _say_skipped(skipped, output, out)
            if summary.photos:
                summary.show(output, timer, out)


def _present(inputs: tuple[Path, ...], output: Path, out: Output) -> list[Path]:
    """Return the inputs that are there, and report the others."""
    present = []
    for path in inputs:
        if path.is_dir() and output.exists() and path.samefile(output):
            raise MediaError(f"the output {output} is an input; faceage does not edit in place, name another folder")
        if not path.exists():
            out.item({"source": str(path), "error": f"{path} does not exist; check the name"})
        elif path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            _closed(path, out)
        else:
            present.append(path)
    return present


def _closed(path: Path, out: Output) -> None:
    out.item({"source": str(path), "error": f"{path} is a folder that may not be read; check its permissions"})


def _survey(inputs: list[Path], output: Path, out: Output) -> tuple[int, int]:
    """Return how many photos there are, and the bytes of those without an output; report what is left out."""
    left_out: dict[LeftOut, list[str]] = {"no image": [], "kind": [], "closed": []}
    counts: Counter[LeftOut] = Counter()

    def note(path: Path, why: LeftOut) -> None:
        counts[why] += 1
        if len(left_out[why]) < SKIPPED_SHOWN:
            left_out[why].append(str(path))
        if why == "closed":
            _closed(path, out)
        elif why == "kind":
            out.item({"source": str(path), "error": f"{path}: {path.suffix} is not read; {_CONVERT}"}, say=False)

    count = size = 0
    for source, relative in find_images(inputs, exclude=output, left_out=note):
        count += 1
        target = output / relative
        if not target.exists():
            size += source.stat().st_size
        elif target.samefile(source):
            message = f"the output {target} is the input; faceage does not edit in place, name another folder"
            out.item({"source": str(source), "target": str(target), "error": message})
    if counts["no image"]:
        out.note(f"{counts['no image']} not images, left out: {_names(left_out['no image'], counts['no image'])}")
    if counts["kind"]:
        names = _names(left_out["kind"], counts["kind"])
        out.warn(f"{counts['kind']} pictures of a kind that is not read, left out: {names}; {_CONVERT}")
    if inputs and not count:
        raise MediaError(f"no image in {', '.join(map(str, inputs))}; faceage reads JPEG, PNG, WebP, TIFF and BMP")
    return count, size


def _names(some: list[str], count: int) -> str:
    return ", ".join(some) + (", ..." if count > len(some) else "")


def _say_skipped(skipped: Counter[Skipped], output: Path, out: Output) -> None:
    out.keep(skipped["done"])
    if skipped["done"]:
        out.note(f"{skipped['done']} were done before with the same options (--no-resume --overwrite does them again)")
    if skipped["there"]:
        out.note(f"{skipped['there']} already there (--overwrite replaces them)")
    if skipped["other"]:
        out.note(
            f"{skipped['other']} already there, made with other options or of other photos (--overwrite replaces them)"
        )
    out.result("skipped", dict(skipped))


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
