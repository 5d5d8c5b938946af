"""Stills: read them upright into a frame, and write them back as the same kind of file.

Nothing that can be kept is changed: format, bit depth, alpha, ICC profile, EXIF with its orientation, density, a PNG's
text and colour chunks, a WebP's being lossless. Of a JPEG only the blocks are coded anew in which a sample changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from faceage.errors import MediaError, UnsupportedError
from faceage.media.encode_still import edit_in_place, encode_pillow, encode_png, encode_tiff, to_rgb
from faceage.media.find import FORMATS
from faceage.media.still import MAX_PIXELS, PIXEL_FORMATS, Still, as_stored, as_upright, read_image
from faceage.media.xmp import label_xmp
from faceage.types import Frame

__all__ = ["MAX_PIXELS", "Still", "copy_image", "read_image", "write_image"]

log = logging.getLogger(__name__)


def write_image(
    path: str | os.PathLike[str],
    still: Still,
    frame: Frame,
    *,
    overwrite: bool = False,
    label: Mapping[str, str] | None = None,
    quality: int | None = None,
) -> None:
    """Write a frame as the kind of file that its still was read from.

    The file appears whole or not at all: it is written beside its final name and renamed.

    Args:
        path: the suffix decides the format; where it is the source's, the source's settings are kept.
        still: what `read_image` returned.
        frame: the upright picture, in any of `read_image`'s pixel formats. Where it is a JPEG's own, in planes, only
            its changed blocks are coded anew; metadata that a change makes untrue is left out, which a warning says.
        overwrite: whether an existing file may be replaced.
        label: fields for the XMP label (`xmp.label_xmp`), or None for no label. BMP can hold none.
        quality: 1 to 100: code the whole of a JPEG or a WebP in this quality, chroma in the source's resolution; None:
            as above. Other formats have none.

    Raises:
        MediaError: if the file exists, or cannot be written.
        UnsupportedError: if the format cannot hold the frame, such as alpha in a JPEG.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UnsupportedError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(FORMATS)}")
    _check_free(path, overwrite)
    xmp = label_xmp(still.xmp, label) if label is not None else still.xmp
    try:
        if kind == "JPEG" and still.jpeg and quality is None and _is_alike(frame, still.frame):
            data, dropped = edit_in_place(still.jpeg, still, frame, xmp)
            if dropped:
                log.warning("%s: left out: %s", path, "; ".join(dropped))
        else:
            data = _encode(path, kind, still, frame, xmp, quality)
    except (OSError, ValueError, struct.error) as error:  # a side or a metadata block longer than the format allows
        raise MediaError(f"{path}: cannot be stored as {kind} ({error}); write .png or .tif") from error
    _write_whole(path, data)


def _is_alike(frame: Frame, other: Frame) -> bool:
    return (frame.pixel_format, frame.width, frame.height) == (other.pixel_format, other.width, other.height)


def _encode(path: Path, kind: str, still: Still, frame: Frame, xmp: bytes | None, quality: int | None) -> bytes:
    samples = as_stored(to_rgb(frame), still.orientation)
    if still.jpeg and _is_alike(frame, still.frame):  # padded, perhaps
        width, height = still.jpeg.size
        samples = samples[:height, :width]
    holds = {"JPEG": ("gray", "rgb24"), "BMP": ("gray", "rgb24"), "WEBP": ("gray", "rgb24", "rgba")}
    pixel_format = PIXEL_FORMATS[samples.shape[2] if samples.ndim == 3 else 1, samples.itemsize]
    if pixel_format not in holds.get(kind, PIXEL_FORMATS.values()):
        raise UnsupportedError(f"{path}: {kind} cannot hold {pixel_format}; write .png or .tif")
    if kind == "PNG":
        return encode_png(samples, still, xmp)
    if kind == "TIFF":
        return encode_tiff(samples, still, xmp)
    # A BMP has no tag for the orientation, so it is stored upright.
    samples = as_upright(samples, still.orientation) if kind == "BMP" else samples
    return encode_pillow(samples, still, kind, xmp, quality)


def copy_image(source: str | os.PathLike[str], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Copy a picture that nothing was done to, byte for byte; errors as `write_image`."""
    _check_free(Path(path), overwrite)
    _write_whole(Path(path), Path(source).read_bytes())


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise MediaError(f"{path}: exists already; pass --overwrite to replace it")


def _write_whole(path: Path, data: bytes) -> None:
    # Of a fixed length: the file's own name may be as long as a name can be.
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    partial = path.with_name(f".{name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # its folder may be none
            partial.unlink()
