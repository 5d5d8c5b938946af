"""Encoding a still in memory, with the source's own settings and metadata."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from faceage.media.jpeg import Jpeg, edit_jpeg
from faceage.media.jpeg_metadata import append_trailer, keep_true
from faceage.media.still import (
    EXIF_PREFIX,
    ICC_TAG,
    ORIENTATION_TAG,
    PNG_XMP,
    TIFF_STORAGE,
    XMP_TAG,
    Still,
    as_stored,
    swap_red_blue,
)
from faceage.types import Frame, Plane


def edit_in_place(jpeg: Jpeg, still: Still, frame: Frame, xmp: bytes | None) -> tuple[bytes, tuple[str, ...]]:
    """Return a JPEG with its changed blocks coded anew, and what was left out because it would not be true any more.

    Args:
        jpeg: the source.
        still: what was read from it.
        frame: its planes, changed.
        xmp: the packet to write, or None.
    """
    before, after = ([as_stored(plane, still.orientation) for plane in f.planes] for f in (still.frame, frame))

    def draw(width: int, height: int, quality: int) -> bytes:
        return _thumbnail(after, jpeg.size, (width, height), quality)

    kept = keep_true(jpeg, xmp, draw)
    picture = edit_jpeg(jpeg, before, after, kept.segments)
    return append_trailer(jpeg, picture, kept.trailer), kept.dropped


def _thumbnail(planes: list[Plane], size: tuple[int, int], box: tuple[int, int], quality: int) -> bytes:
    """Return a small JPEG of YCbCr or gray planes, whole inside `box`, with black rims if the shapes differ."""
    scale = min(box[0] / size[0], box[1] / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    small = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA) for plane in planes]
    picture = Image.fromarray(_planes_to_rgb(small))
    canvas = Image.new(picture.mode, box)
    canvas.paste(picture, ((box[0] - width) // 2, (box[1] - height) // 2))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def to_rgb(frame: Frame) -> Plane:
    """Return a still as one plane: RGB(A) or gray. The chroma of a JPEG is enlarged as libjpeg does, by a tent."""
    if len(frame.planes) == 1:
        return frame.planes[0]
    planes = []
    for plane, layout in zip(frame.planes, frame.layout.planes, strict=True):
        size = plane.shape[1] * layout.sub_x, plane.shape[0] * layout.sub_y
        planes.append(cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR)[: frame.height, : frame.width])
    return _planes_to_rgb(planes)


def _planes_to_rgb(planes: list[Plane]) -> Plane:
    if len(planes) == 1:
        return planes[0]
    luma, blue, red = planes
    return cv2.cvtColor(np.dstack([luma, red, blue]), cv2.COLOR_YCrCb2RGB)


def encode_pillow(samples: Plane, still: Still, kind: str, xmp: bytes | None, quality: int | None = None) -> bytes:
    """Encode what Pillow writes whole; `kind` is JPEG, WEBP or BMP; `quality` as in `image.write_image`."""
    options: dict[str, Any]
    if kind == "JPEG":
        if quality is not None:
            options = {"quality": quality, "subsampling": still.subsampling}
        elif still.quantization:
            options = {"qtables": still.quantization, "subsampling": still.subsampling}
        else:
            options = {"quality": 95, "subsampling": 0}
        app13 = b"".join(b"\xff\xed" + struct.pack(">H", 2 + len(body)) + body for body in still.app13)
        options |= {"progressive": still.progressive, "comment": still.comment, "extra": app13}
    elif kind == "WEBP":
        # A lossy WebP does not say its quality. `exact` keeps the colours under transparent pixels.
        lossless = quality is None and (still.lossless or still.format != "WEBP")
        options = {"lossless": lossless, "quality": quality or 90, "exact": True}
    else:
        options = {}
    tags = {"exif": still.exif, "icc_profile": still.icc_profile, "xmp": xmp, "dpi": still.dpi}
    options |= {key: value for key, value in tags.items() if value and kind != "BMP"}
    options = {key: value for key, value in options.items() if value is not None}
    image, buffer = Image.fromarray(samples), io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except OSError:
        if not options.pop("progressive", False):
            raise
        # Pillow's buffer for progressive files is two bytes a pixel, too small for noise at quality 100.
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_png(samples: Plane, still: Still, xmp: bytes | None) -> bytes:
    """Encode PNG, with the source's chunks or, from another format, its profile, EXIF and density."""
    _, encoded = cv2.imencode(".png", swap_red_blue(samples), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    data = encoded.tobytes()
    chunks = list(still.png_chunks)
    if still.format != "PNG":
        if still.icc_profile:
            chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(still.icc_profile)))
        if still.dpi:
            per_metre = [round(v / 0.0254) for v in still.dpi]
            chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
        if still.exif:
            chunks.append((b"eXIf", still.exif.removeprefix(EXIF_PREFIX)))
    if xmp:
        chunks.append((b"iTXt", PNG_XMP + b"\0\0\0\0" + xmp))  # not compressed, no language, no translation
    blocks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    after_header = 8 + 25  # signature, IHDR
    return data[:after_header] + b"".join(blocks) + data[after_header:]


def encode_tiff(samples: Plane, still: Still, xmp: bytes | None) -> bytes:
    """Encode TIFF: OpenCV writes the samples (Pillow has no 16-bit colour), Pillow the directory."""
    compression = still.tiff_compression if still.format == "TIFF" else 5
    _, encoded = cv2.imencode(".tiff", swap_red_blue(samples), [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    data = encoded.tobytes()
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        storage = image.tag_v2
        directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=storage.prefix)
        for tag in TIFF_STORAGE.intersection(storage):
            directory.tagtype[tag] = storage.tagtype[tag]
            directory[tag] = storage[tag]
    if samples.ndim == 3 and samples.shape[2] == 4:
        directory[338] = 2  # the fourth sample is alpha, not premultiplied
    exif = Image.Exif()
    exif.load(still.exif or b"")
    for tag in exif:
        if tag not in TIFF_STORAGE:
            directory[tag] = exif.get_ifd(tag) if tag in (34665, 34853) else exif[tag]
    directory[ORIENTATION_TAG] = still.orientation
    if still.dpi and 282 not in directory:
        directory[282], directory[283], directory[296] = *still.dpi, 2
    for tag, kind_number, value in ((ICC_TAG, 7, still.icc_profile), (XMP_TAG, 1, xmp)):
        if value:
            directory.tagtype[tag] = kind_number
            directory[tag] = value
    # Pillow counts strip offsets from the directory's end: what followed the old 8-byte header goes there.
    directory[273] = tuple(offset - 8 for offset in directory[273])
    header = data[:4] + struct.pack(f"{'<' if data[:2] == b'II' else '>'}I", 8)
    return header + directory.tobytes(8) + data[8:]
