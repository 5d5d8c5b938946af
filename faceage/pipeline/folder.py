"""Folders of photos that are aged in several runs: what is done is not done again, what failed is tried again.

The output folder keeps a manifest, `MANIFEST`: a line of JSON for each photo that was done or failed, appended when it
is. A photo is done if its line has the same content of the source and the same options, and the output is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Literal, NamedTuple, Self

from faceage.checkpoint import sha256_of
from faceage.errors import MediaError
from faceage.pipeline.photos import photo_reports
from faceage.pipeline.report import PhotoReport
from faceage.pipeline.request import AgeRequest
from faceage.pipeline.timer import StageTimer
from faceage.pipeline.work import is_alive, locked_by
from faceage.pipeline.workers import Workers

log = logging.getLogger(__name__)

MANIFEST = ".faceage-manifest.jsonl"
FORMAT_VERSION = 1
SYNC_S = 1.0
"""At most this long, what was written to the manifest is not on the disk. Photos whose lines are lost when the power
fails are there, and left alone by the next run."""

Skipped = Literal["done", "there", "other", "input"]
"""Why a photo is left alone: it was done before; its output is there, though not in the manifest, or made of another
source or with other options; or its output is its source."""


class _Line(NamedTuple):
    """What the manifest says of an output."""

    size: int
    mtime_ns: int
    sha256: bytes
    options: bytes
    is_done: bool


class Manifest:
    """The manifest of an output folder. Use it as a context manager; `locked_folder` keeps other runs away.

    Args:
        folder: the output folder, which is there.
        options: all that outputs depend on beside their sources, of JSON types.
        fresh: forget what other runs did.

    Raises:
        MediaError: if it cannot be read or written.
    """

    def __init__(self, folder: Path, options: Mapping, *, fresh: bool = False) -> None:
        self._folder, self._path = folder, folder / MANIFEST
        self._options = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).digest()[:16]
        self._lines: dict[str, _Line] = {}
        self._synced = monotonic()
        try:
            if fresh:
                self._path.unlink(missing_ok=True)
            self._file = open(self._path, "a+b")  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise MediaError(
                f"{self._path} cannot be read and written ({error.strerror}); name a folder that can"
            ) from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        line = b""
        for line in self._file:
            try:
                found = json.loads(line)
                if found.get("format_version") not in (None, FORMAT_VERSION):
                    raise MediaError(
                        f"{self._path} has format {found['format_version']}, expected {FORMAT_VERSION}; "
                        "name another folder, or delete it"
                    )
                if "target" in found:
                    self._lines[found["target"]] = _Line(
                        size=found["size"],
                        mtime_ns=found["mtime_ns"],
                        sha256=bytes.fromhex(found["sha256"] or ""),
                        options=bytes.fromhex(found["options"]),
                        is_done=found["error"] is None,
                    )
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # the last line of a run that was killed, or somebody else's
        if not line:
            self._append({"format_version": FORMAT_VERSION})
        elif not line.endswith(b"\n"):
            self._file.write(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the disk is full, which was said; the photos are there
            self._file.flush()
            os.fsync(self._file.fileno())
        with suppress(OSError):
            self._file.close()

    def skips(self, source: Path, relative: Path, *, overwrite: bool) -> Skipped | None:
        """Return why a photo is not to be aged now, or None if it is.

        Args:
            source: the photo.
            relative: its output's place in the folder.
            overwrite: whether outputs that are there may be replaced.
        """
        target = self._folder / relative
        try:
            if not target.exists():
                return None
            if target.samefile(source):
                return "input"
            line = self._lines.get(str(relative))
            if line and line.is_done and line.options == self._options and _is_same(source, line):
                return "done"
        except OSError:
            return None  # what is wrong shows when it is read or written
        if overwrite:
            return None
        return "other" if line and line.is_done else "there"

    def add(self, report: PhotoReport) -> None:
        """Note what was done to a photo.

        Raises:
            MediaError: if the disk is full.
        """
        try:
            state = os.stat(report.source)
            size, mtime_ns = state.st_size, state.st_mtime_ns
        except OSError:
            size = mtime_ns = 0
        line = {
            "target": str(Path(report.target).relative_to(self._folder)),
            "source": report.source,
            "sha256": report.sha256,
            "size": size,
            "mtime_ns": mtime_ns,
            "options": self._options.hex(),
            "error": report.error,
        }
        self._append(line)

    def _append(self, line: dict) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            if monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = monotonic()
        except OSError as error:
            raise MediaError(
                f"{self._path} cannot be written ({error.strerror}); free space there and run the same command again: "
                "it goes on where this one ended"
            ) from error


def _is_same(source: Path, line: _Line) -> bool:
    """Return whether a photo has the content that its line in the manifest has."""
    state = source.stat()
    if (state.st_size, state.st_mtime_ns) == (line.size, line.mtime_ns):
        return True
    return state.st_size == line.size and bytes.fromhex(sha256_of(source)) == line.sha256


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make an output folder and keep other runs from writing into it; what dead ones left half written is deleted.

    Raises:
        MediaError: if another run writes into it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"the folder {folder} cannot be made ({error.strerror}); name another") from error
    with locked_by(folder / ".faceage.lock", folder):
        _remove_partials(folder)
        yield


def _remove_partials(folder: Path) -> None:
    """Delete the half-written outputs of dead processes, and say so."""
    count = 0
    for place, _, names in os.walk(folder):
        for name in names:
            found = re.fullmatch(r"\.[0-9a-f]{16}\.(\d+)\.partial", name)
            if found and not is_alive(int(found[1])):
                Path(place, name).unlink(missing_ok=True)
                count += 1
    if count:
        log.warning("%s: %d half-written files of a run that was killed are deleted", folder, count)


def age_folder(
    workers: Workers,
    photos: Iterable[tuple[Path, Path]],
    output: Path,
    manifest: Manifest,
    request: AgeRequest,
    *,
    overwrite: bool = False,
    label: bool = True,
    quality: int | None = None,
    skipped: Counter[Skipped] | None = None,
    timer: StageTimer | None = None,
) -> Generator[PhotoReport, None, None]:
    """Age the photos of a folder that are not done yet, and yield each one's report as soon as it is final.

    Args:
        workers: age blocks of photos.
        photos: (source, place in the output folder) of each, taken when they are needed.
        output: the folder.
        manifest: its manifest, whose options are those of this call: see `folder_options`.
        request: whom to age, and how.
        overwrite: replace outputs that are there.
        label: mark what is changed as partly synthetic.
        quality: as in `photos.age_photos`.
        skipped: counts the photos that are left alone.
        timer: counts the stages.
    """

    def wanted() -> Iterator[tuple[Path, Path]]:
        for source, relative in photos:
            why = manifest.skips(source, relative, overwrite=overwrite)
            if why is None:
                yield source, output / relative
            elif skipped is not None:
                skipped[why] += 1

    # What the manifest lets through may be replaced: the work of a worker that died is done again.
    reports = photo_reports(workers, wanted(), request, overwrite=True, label=label, quality=quality, timer=timer)
    for report in reports:
        manifest.add(report)
        yield report


def folder_options(
    fingerprints: Mapping[str, str], request: AgeRequest, *, label: bool, quality: int | None = None
) -> dict:
    """Return all that outputs depend on beside their sources, for `Manifest`."""
    return {"networks": dict(fingerprints), "request": asdict(request), "label": label, "quality": quality}
