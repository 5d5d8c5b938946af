"""Which parts of a JPEG beside its samples stay true when faces in it change.

Most do: EXIF, ICC profile, IPTC, comments, density, gain maps. The EXIF thumbnail is drawn anew. What shows the faces
as they were (videos of motion photos, further views) or signs the old samples (C2PA) is left out.

Reference: Exif 2.32 (CIPA DC-008), 4.5-4.6; Multi-Picture Format (CIPA DC-007), 5.2; ISO 16684-1 (XMP), annex A;
C2PA 2.1, A.3 (JUMBF in APP11); Ultra HDR image format 1.1.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from faceage.media.jpeg import APP0, APP1, APP2, APP11, Jpeg, Segment, parse_jpeg

Draw = Callable[[int, int, int], bytes]
"""Returns the picture as a JPEG of this width, height and quality (1 to 100)."""

EXIF, XMP, MPF = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0"
_GAIN_MAP = re.compile(rb"hdr-gain-map/1\.0|urn:iso:std:iso:ts:21496:-1|HDRGainMap")
_MOTION = re.compile(rb"((?:MotionPhoto|MicroVideo)\s*=\s*[\"'])1")
_QUALITIES = (90, 75, 50, 25, 10)
"""Of a thumbnail, which must fit into the old one's place."""
_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH = 0x0201, 0x0202
_MP_ENTRIES = 0xB002


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is written beside the samples."""

    segments: tuple[Segment, ...]
    trailer: bytes
    """Gain maps that follow the picture."""
    dropped: tuple[str, ...]
    """What is left out, in words."""


def keep_true(jpeg: Jpeg, xmp: bytes | None, draw: Draw) -> Kept:
    """Choose what is written beside the changed samples of a JPEG.

    Args:
        jpeg: the source.
        xmp: the XMP packet to write in place of the source's, or None.
        draw: draws the thumbnail.
    """
    dropped: list[str] = []
    trailer = _true_trailer(jpeg, dropped)
    packet = [Segment(APP1, XMP + _MOTION.sub(rb"\g<1>0", xmp))] if xmp else []
    segments: list[Segment] = []
    for segment in jpeg.segments:
        if segment.marker == APP11 and segment.body[12:16] == b"jumb":
            dropped.append("content credentials (C2PA), which sign the samples as they were")
        elif _is_mpf(segment) and not trailer:
            continue  # it would point to nothing
        elif segment.marker == APP1 and segment.body.startswith(XMP):
            segments += packet
            packet = []
        elif segment.marker == APP1 and segment.body.startswith(EXIF):
            tiff = _redraw_thumbnail(segment.body.removeprefix(EXIF), draw, dropped)
            segments.append(Segment(APP1, EXIF + tiff))
        else:
            segments.append(segment)
    leading = (i for i, s in enumerate(segments) if s.marker != APP0 and not s.body.startswith(EXIF))
    first = next(leading)
    segments[first:first] = packet
    return Kept(segments=tuple(segments), trailer=trailer, dropped=tuple(dict.fromkeys(dropped)))


def append_trailer(jpeg: Jpeg, picture: bytes, trailer: bytes) -> bytes:
    """Return the file: a coded picture and what follows it, which the multi-picture index finds again."""
    index = next((segment for segment in jpeg.segments if _is_mpf(segment)), None)
    if not trailer or index is None:
        return picture + trailer
    old, new = (data.index(bytes(index)) for data in (jpeg.data, picture))
    shift = (len(picture) - new) - (jpeg.end - old)
    moved = bytearray(picture)
    order, entries = _mp_entries(index.body)
    for number, (at, _, offset) in enumerate(entries):
        position = new + 4 + at  # of the attributes; size and offset follow
        if number == 0:
            struct.pack_into(f"{order}I", moved, position + 4, len(picture))
        else:
            struct.pack_into(f"{order}I", moved, position + 8, offset + shift)
    return bytes(moved) + trailer


def _is_mpf(segment: Segment) -> bool:
    return segment.marker == APP2 and segment.body.startswith(MPF)


def _true_trailer(jpeg: Jpeg, dropped: list[str]) -> bytes:
    pictures = _further_pictures(jpeg)
    stop = max((stop for _, stop in pictures), default=jpeg.end)
    trailer, rest = jpeg.data[jpeg.end : stop], jpeg.data[stop:]
    if not all(_GAIN_MAP.search(jpeg.data, *picture) for picture in pictures):
        dropped.append("further pictures (a stereo pair or a preview), which show the faces as they were")
        trailer = b""
    if b"ftyp" in rest:
        dropped.append("a motion photo's video, which shows the faces as they were")
    elif rest.strip(b"\0"):
        dropped.append("the maker's data behind the picture, which may show the faces as they were")
    return trailer


def _further_pictures(jpeg: Jpeg) -> list[tuple[int, int]]:
    """Return where the pictures of the multi-picture index but the first begin and end in the file."""
    index = next((segment for segment in jpeg.segments if _is_mpf(segment)), None)
    if index is None:
        return []
    start = jpeg.data.index(bytes(index)) + 4 + len(MPF)  # offsets count from the byte order mark
    places = [(start + offset, start + offset + size) for _, size, offset in _mp_entries(index.body)[1][1:]]
    return [(first, last) for first, last in places if jpeg.end <= first < last <= len(jpeg.data)]


def _mp_entries(body: bytes) -> tuple[str, list[tuple[int, int, int]]]:
    """Return the byte order, and each picture's place in the body, size and offset."""
    base = len(MPF)
    order = "<" if body[base : base + 2] == b"II" else ">"
    try:
        at = base + struct.unpack_from(f"{order}I", body, base + 4)[0]
        for _, tag, _, count, value in _directory(body, at, order):
            if tag == _MP_ENTRIES:
                places = range(base + value, base + value + count, 16)
                return order, [(place, *struct.unpack_from(f"{order}II", body, place + 4)) for place in places]
    except struct.error:  # cut off: there is nothing that it could point to
        pass
    return order, []


def _directory(data: bytes | bytearray, at: int, order: str) -> list[tuple[int, int, int, int, int]]:
    """Return the place, tag, type, count and value (or its offset) of the entries of a TIFF directory."""
    (count,) = struct.unpack_from(f"{order}H", data, at)
    places = range(at + 2, at + 2 + 12 * count, 12)
    return [(place, *struct.unpack_from(f"{order}HHII", data, place)) for place in places]


def _redraw_thumbnail(tiff: bytes, draw: Draw, dropped: list[str]) -> bytes:
    """Return EXIF data with the thumbnail drawn anew in its old place, so that no other offset moves."""
    order = "<" if tiff[:2] == b"II" else ">"
    changed = bytearray(tiff)
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        link = first + 2 + 12 * len(_directory(tiff, first, order))
        (second,) = struct.unpack_from(f"{order}I", tiff, link)
        entries = {tag: (place, value) for place, tag, _, _, value in _directory(tiff, second, order)} if second else {}
    except struct.error:  # damaged: no program finds a thumbnail either
        return tiff
    if not second:
        return tiff
    start, size = (entries.get(tag, (0, 0))[1] for tag in (_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH))
    picture = b""
    try:
        width, height = parse_jpeg(tiff[start : start + size]).size
        picture = next((p for quality in _QUALITIES if len(p := draw(width, height, quality)) <= size), b"")
    except ValueError:
        pass  # no JPEG: left out
    if picture:
        struct.pack_into(f"{order}I", changed, entries[_THUMBNAIL_LENGTH][0] + 8, len(picture))
    else:
        struct.pack_into(f"{order}I", changed, link, 0)
        dropped.append("the EXIF thumbnail, which shows the faces as they were")
    changed[start : start + size] = picture.ljust(size, b"\0")[: max(len(tiff) - start, 0)]
    return bytes(changed)
