"""Reading a still: upright samples, and all that is needed to write the picture back as it was.

Convention: a `Frame` is upright. A JPEG's has the file's own YCbCr planes; others are RGB(A) or gray. BGR exists only
for OpenCV.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from faceage.errors import MediaError, UnsupportedError
from faceage.media.find import FORMATS
from faceage.media.jpeg import BASELINE, EXTENDED, PROGRESSIVE, Jpeg, parse_jpeg
from faceage.media.turbojpeg import decode_planes, why_missing
from faceage.types import PIXEL_LAYOUTS, RGB, ColorSpec, Frame, Plane

log = logging.getLogger(__name__)

MAX_PIXELS = 400_000_000
"""Largest picture read, in pixels: 20000 x 20000, 1.2 GB as RGB."""

# Pillow would warn at 89 megapixels and refuse 179; `read_image` has its own limit.
Image.MAX_IMAGE_PIXELS = None

ORIENTATION_TAG = 0x0112
EXIF_PREFIX = b"Exif\0\0"
JPEG_START = b"\xff\xd8\xff"
# EXIF orientation: upright = the stored picture, transposed, then flipped up-down, then left-right.
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
JFIF = ColorSpec(matrix="bt601", full_range=True, chroma_siting="center")
"""The colour of a JPEG's planes, and of gray."""
PIXEL_FORMATS = {
    (1, 1): "gray",
    (1, 2): "gray16",
    (3, 1): "rgb24",
    (3, 2): "rgb48",
    (4, 1): "rgba",
    (4, 2): "rgba64",
}
"""By channels and bytes of a sample."""
JPEG_FORMATS = ("yuvj444p", "yuvj422p", "yuvj420p", "yuvj440p", "yuvj411p", "gray")
# PNG chunks that stay true whatever happens to the samples.
_PNG_KEEP = frozenset(b"iCCP gAMA cHRM sRGB cICP mDCV cLLI pHYs eXIf tEXt zTXt iTXt tIME".split())
PNG_XMP = b"XML:com.adobe.xmp\0"
ICC_TAG, XMP_TAG = 34675, 700
TIFF_STORAGE = frozenset(
    [*range(254, 267), 273, *range(277, 282), 284, *range(290, 294), 317, 320, *range(322, 326), 330, 332]
).union(range(338, 348), range(512, 533))
"""Tags that say how a TIFF stores its samples: a new file has its own."""
_TIFF_COMPRESSION = {"raw": 1, "tiff_lzw": 5, "tiff_adobe_deflate": 8, "tiff_deflate": 8}


@dataclass(frozen=True, kw_only=True)
class Still:
    """A picture, and all that is needed to write it back the way it was stored."""

    frame: Frame
    """Upright; its planes are our own writable copies."""
    format: str
    """Pillow's name: JPEG, PNG, WEBP, TIFF, BMP."""
    jpeg: Jpeg | None = None
    """The file, where its blocks can be changed in place: `frame` holds its planes."""
    orientation: int = 1
    """The EXIF orientation of the stored picture, 1 to 8."""
    exif: bytes | None = None
    """With JPEG's prefix, `EXIF_PREFIX`."""
    icc_profile: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    quantization: dict[int, list[int]] | None = None
    """A JPEG's tables."""
    subsampling: int = 0
    """A JPEG's chroma subsampling as Pillow counts: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0."""
    progressive: bool = False
    comment: bytes | None = None
    app13: tuple[bytes, ...] = ()
    """Of a JPEG: the segments in which Photoshop and IPTC keep caption, credit and copyright."""
    lossless: bool = False
    """Of a WebP."""
    tiff_compression: int = 5
    """TIFF's number of it; LZW where the source's was lossy or is rare."""
    png_chunks: tuple[tuple[bytes, bytes], ...] = ()
    """The source PNG's own ancillary chunks, but XMP: type and data."""


def read_image(path: str | os.PathLike[str]) -> Still:
    """Read a still, upright.

    A palette, one-bit and gray+alpha pictures become RGB, RGBA or gray, which a warning says.

    Args:
        path: a JPEG, PNG, WebP, TIFF or BMP file, whatever its suffix.

    Returns:
        The picture: a JPEG in its own planes (yuvj420p, ...), others in rgb24, rgba, rgb48, rgba64, gray or gray16.
        A side of a JPEG that is no multiple of its subsampling, and that the orientation flips, is one chroma sample
        longer than the picture is shown.

    Raises:
        MediaError: if the file is missing, empty, damaged, truncated, over `MAX_PIXELS`, or no picture.
        UnsupportedError: if it is animated, has several pages, or is CMYK, Lab, floating-point or planar 16-bit colour;
            if it is a JPEG with arithmetic coding, without DCT, or of 12 bits.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise MediaError(f"{path}: no such file") from error
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise MediaError(f"{path}: the file is empty (0 bytes); copy it again")
    try:
        jpeg = parse_jpeg(data) if data.startswith(JPEG_START) else None
        if jpeg:
            _check_coding(path, jpeg)
        with Image.open(io.BytesIO(data)) as image:
            _check_kind(path, image)
            _log_changes(path, image)
            orientation = _orientation(image)  # asked first: Pillow forgets a TIFF's when it decodes it
            frame = _own_planes(jpeg, orientation) if jpeg else None
            if frame:
                return replace(_still(image, frame, orientation, data), jpeg=jpeg)
            if jpeg:
                why = why_missing() or "colours or subsampling that faceage does not edit in place"
                log.warning("%s: %s; it is coded anew", path, why)
            plane = _decode(image, data)
            plane = plane if image.format == "TIFF" else as_upright(plane, orientation)
            channels = plane.shape[2] if plane.ndim == 3 else 1
            pixel_format = PIXEL_FORMATS[channels, plane.itemsize]
            frame = Frame(planes=(plane,), pixel_format=pixel_format, color=JFIF if channels == 1 else RGB)
            return _still(image, frame, orientation, data)
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: no picture, or a damaged one; expected JPEG, PNG, WebP, TIFF or BMP") from error
    except MemoryError as error:
        raise MediaError(f"{path}: too large for this machine's memory; scale it down first") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise MediaError(f"{path}: the file is damaged or truncated ({error}); copy it again") from error


def _check_kind(path: Path, image: Image.Image) -> None:
    """Refuse what cannot be read, or could not be written back; nothing but the header is decoded yet."""
    if image.format not in {*FORMATS.values(), "MPO"}:
        raise UnsupportedError(f"{path}: a {image.format} file; convert it to PNG, TIFF, JPEG or WebP first")
    megapixels = image.width * image.height / 1e6
    if megapixels * 1e6 > MAX_PIXELS:
        raise MediaError(
            f"{path}: {image.width}x{image.height} is {megapixels:.0f} megapixels, the limit is "
            f"{MAX_PIXELS // 10**6}; scale it down or cut it first"
        )
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":
        kind = "pages" if image.format == "TIFF" else "frames (animated)"
        raise UnsupportedError(f"{path}: has {pages} {kind}; split it, or make it a video for `faceage video`")
    if image.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        raise UnsupportedError(f"{path}: its colours are {image.mode}; convert it to RGB first")
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode in ("F", "I") or max(tags.get(258, (8,))) > 16 or max(tags.get(339, (1,))) > 1:
        raise UnsupportedError(f"{path}: floating-point or 32-bit samples; convert it to 8 or 16 bits first")
    # OpenCV would read the planes as if the colours of a pixel followed one another.
    if tags.get(284) == 2 and len(tags.get(258, ())) > 1 and max(tags[258]) == 16:
        raise UnsupportedError(f"{path}: 16-bit colours in planes of their own; store them interleaved (chunky) first")


def _check_coding(path: Path, jpeg: Jpeg) -> None:
    """Refuse the JPEGs that few programs read."""
    if jpeg.coding not in (BASELINE, EXTENDED, PROGRESSIVE):
        kind = "arithmetic coding" if jpeg.coding > 0xC8 else "lossless or hierarchical coding"
        raise UnsupportedError(f"{path}: a JPEG with {kind}; store it as baseline or progressive JPEG first")
    if jpeg.bits != 8:
        raise UnsupportedError(f"{path}: a JPEG of {jpeg.bits} bits a sample; convert it to 8 bits first")


def _own_planes(jpeg: Jpeg, orientation: int) -> Frame | None:
    """Return a JPEG in its own planes, upright; None if no pixel format has them."""
    decoded = None if jpeg.has_late_tables or why_missing() else decode_planes(jpeg.data[: jpeg.end])
    if decoded is None:
        return None
    pixel_format, planes = decoded
    layout = PIXEL_LAYOUTS[pixel_format]
    transpose, up_down, left_right = _UPRIGHT[orientation]
    if transpose:
        turned = replace(layout, planes=tuple(replace(p, sub_x=p.sub_y, sub_y=p.sub_x) for p in layout.planes))
        names = (name for name in JPEG_FORMATS if PIXEL_LAYOUTS[name] == turned)
        pixel_format = next(names, "")
        if not pixel_format:
            return None
    # Luma is padded to whole chroma samples. Where the padding becomes the first column or row it stays: without it
    # the chroma would be shifted.
    width, height = jpeg.size
    flips = (left_right, up_down) if transpose else (up_down, left_right)
    rows, columns = (None if flip else size for flip, size in zip(flips, (height, width), strict=True))
    planes[0] = planes[0][:rows, :columns]
    upright = tuple(as_upright(plane, orientation) for plane in planes)
    return Frame(planes=upright, pixel_format=pixel_format, color=JFIF)


def _log_changes(path: Path, image: Image.Image) -> None:
    """Say what will not be written back as it was."""
    if image.mode not in ("L", "RGB", "RGBA", "I;16", "I;16B", "I;16L"):
        log.warning("%s: stored as %s, will be written as plain gray, RGB or RGBA", path, image.mode)


def _decode(image: Image.Image, data: bytes) -> Plane:
    """Return the samples, [H, W] or [H, W, 3 or 4], as stored; those of a TIFF upright.

    Both OpenCV and Pillow turn a TIFF upright themselves, and nothing else.
    """
    if _is_deep_colour(image, data):
        # Pillow would cut 16-bit colour to 8.
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if stored is None or stored.dtype != np.uint16:
            raise ValueError("OpenCV cannot decode it")
        return swap_red_blue(stored)
    image.load()
    if image.mode.startswith("I;16"):
        return np.array(image).astype(np.uint16)
    if image.has_transparency_data:
        return np.array(image.convert("RGBA"))
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _is_deep_colour(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":  # IHDR: bit depth at byte 24, colour type (2 RGB, 4 gray + alpha, 6 RGBA) at 25
        return data[24] == 16 and (data[25] != 0 or "transparency" in image.info)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return len(image.tag_v2.get(258, ())) > 1 and max(image.tag_v2[258]) == 16
    return False


def swap_red_blue(samples: Plane) -> Plane:
    """Return RGB(A) as BGR(A) and the other way round; gray as it is."""
    if samples.ndim == 2:
        return samples
    return cv2.cvtColor(samples, cv2.COLOR_BGR2RGB if samples.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ORIENTATION_TAG, 1)
    return value if value in _UPRIGHT else 1


def as_upright(samples: Plane, orientation: int) -> Plane:
    """Turn stored samples as a viewer shows them."""
    transpose, up_down, left_right = _UPRIGHT[orientation]
    samples = samples.swapaxes(0, 1) if transpose else samples
    samples = samples[::-1] if up_down else samples
    samples = samples[:, ::-1] if left_right else samples
    return cast(Plane, np.ascontiguousarray(samples))  # numpy's stubs join the union's dtypes to generic


def as_stored(samples: Plane, orientation: int) -> Plane:
    """Undo `as_upright`."""
    transpose, up_down, left_right = _UPRIGHT[orientation]
    samples = samples[:, ::-1] if left_right else samples
    samples = samples[::-1] if up_down else samples
    samples = samples.swapaxes(0, 1) if transpose else samples
    return cast(Plane, np.ascontiguousarray(samples))  # numpy's stubs join the union's dtypes to generic


def _still(image: Image.Image, frame: Frame, orientation: int, data: bytes) -> Still:
    info = image.info
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    exif = info.get("exif") or None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        xmp = image.tag_v2.get(XMP_TAG)
        tags = image.getexif()
        for tag in (*TIFF_STORAGE.intersection(tags), XMP_TAG, ICC_TAG):
            tags.pop(tag, None)
        if orientation != 1:  # removed when Pillow turned the picture
            tags[ORIENTATION_TAG] = orientation
        exif = tags.tobytes() if len(tags) else None
    if exif and not exif.startswith(EXIF_PREFIX):  # WebP's and PNG's have none
        exif = EXIF_PREFIX + exif
    dpi = info.get("dpi")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and 282 not in image.tag_v2:
        dpi = None  # Pillow says 1
    jpeg = image if isinstance(image, JpegImagePlugin.JpegImageFile) else None
    return Still(
        frame=frame,
        format="JPEG" if image.format == "MPO" else str(image.format),
        orientation=orientation,
        exif=exif,
        icc_profile=info.get("icc_profile"),
        xmp=xmp.encode() if isinstance(xmp, str) else xmp,
        dpi=dpi,
        quantization=jpeg.quantization if jpeg else None,
        # Pillow cannot write 4:4:0 and 4:1:1, which it reports as -1: nothing is lost with 4:4:4.
        subsampling=max(0, JpegImagePlugin.get_sampling(jpeg)) if jpeg else 0,
        progressive=bool(info.get("progressive")),
        comment=info.get("comment") if jpeg else None,
        app13=tuple(body for name, body in jpeg.applist if name == "APP13") if jpeg else (),
        lossless=image.format == "WEBP" and b"VP8L" in data[12:16] + _webp_chunk_types(data),
        tiff_compression=_TIFF_COMPRESSION.get(info.get("compression", ""), 5),
        png_chunks=tuple(_png_chunks(data)) if image.format == "PNG" else (),
    )


def _webp_chunk_types(data: bytes) -> bytes:
    """Return the chunk types of a WebP file, joined."""
    types, at = b"", 12
    while at + 8 <= len(data):
        types += data[at : at + 4]
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return types


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the chunks of a PNG that are worth keeping, but XMP."""
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if kind in _PNG_KEEP and not body.startswith(PNG_XMP):
            yield kind, body
        at += 12 + size
