"""Find the pictures among files and folders, by their names: no library of pictures is imported for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from faceage.errors import MediaError

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""What a file name's suffix means, in Pillow's words."""
LeftOut = Literal["no image", "kind", "closed"]
"""Why `find_images` passes something over: it is no picture by its suffix, a picture of a kind that is not read, or a
folder that may not be read."""
OTHER_PICTURES = frozenset([
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".gif", ".exr", ".hdr", ".psd",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
])  # fmt: skip
"""Suffixes of pictures that `read_image` does not read."""
IMAGE_SUFFIXES = frozenset(FORMATS)
"""The suffixes, in lower case, of the files that `find_images` takes for pictures."""


def find_images(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    exclude: Path | None = None,
    left_out: Callable[[Path, LeftOut], None] | None = None,
) -> Iterator[tuple[Path, Path]]:
    """Find the pictures among files and, recursively, folders.

    Names that start with a dot are ignored. Links to folders are followed, each folder once. A file keeps
    its name, a folder's tree its shape below the folder. Nothing is kept of what was found.

    Args:
        inputs: files and folders.
        exclude: a folder to stay out of: the output, where it lies inside an input.
        left_out: called with each file and folder that is passed over, and why.

    Yields:
        (path, relative output path) of each picture, in order of the inputs and sorted within each folder.

    Raises:
        MediaError: if an input is missing, or two different files would get the same output path.
    """
    report = left_out or (lambda path, why: None)
    roots = [Path(path) for path in inputs]
    for number, root in enumerate(roots):
        if not root.exists():
            raise MediaError(f"{root}: no such file or folder")
        files = [(root, Path(root.name))] if root.is_file() else _walk(root, exclude, report)
        for path, relative in files:
            suffix = path.suffix.lower()
            if suffix not in IMAGE_SUFFIXES:
                report(path, "kind" if suffix in OTHER_PICTURES else "no image")
                continue
            before = [each.parent if each.is_file() else each for each in roots[:number] if _may_hold(each, relative)]
            twins = [folder / relative for folder in before if (folder / relative).is_file()]
            if other := next((each for each in twins if not each.samefile(path)), None):
                raise MediaError(
                    f"{other} and {path} would both be written to {relative}; "
                    "process the two inputs one after the other, into folders of their own"
                )
            if not twins:
                yield path, relative


def _may_hold(root: Path, relative: Path) -> bool:
    """Return whether an input may have a picture at a place of the output."""
    return not root.is_file() or Path(root.name) == relative


def _walk(root: Path, exclude: Path | None, report: Callable[[Path, LeftOut], None]) -> Iterator[tuple[Path, Path]]:
    """Yield the files below a folder and their paths relative to it."""
    seen = {exclude.resolve()} if exclude else set()

    def closed(error: OSError) -> None:
        report(Path(error.filename), "closed")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed):
        resolved = Path(folder).resolve()
        if resolved in seen:
            folders.clear()
            continue
        seen.add(resolved)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path, path.relative_to(root)
