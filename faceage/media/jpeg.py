"""A JPEG taken apart, and put together again with only the changed blocks of 8x8 samples coded anew.

For each changed block, with Q the file's own quantisation table and C its quantised coefficients:

    C' = C + round(DCT(after - before) / Q)

so the unchanged part of a block does not drift, and a block without a change keeps its bits.

Reference: ITU-T T.81 (JPEG), annexes A and B.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from faceage.media.turbojpeg import Coefficients, edit_coefficients
from faceage.types import Plane

SOI, EOI, SOS, DQT, DHT, DRI, COM = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
APP0, APP1, APP2, APP11, APP13 = 0xE0, 0xE1, 0xE2, 0xEB, 0xED
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
_NO_BODY = frozenset([0x01, *range(0xD0, 0xD8), SOI])
# In coded data 0xFF is followed by 0x00, or by a restart marker.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
MAX_COEFFICIENT = 1023
"""Ten bits of magnitude, the most that 8-bit JPEG codes; the mean of a black block may be one less."""
MIN_COEFFICIENTS = np.full(64, -MAX_COEFFICIENT, np.int16)
MIN_COEFFICIENTS[0] -= 1
_ZIGZAG = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))
"""Where each coefficient of a table in a file belongs, row by row."""
_DCT = np.cos(np.pi / 8 * np.arange(8)[:, None] * (np.arange(8) + 0.5)).astype(np.float32) / 2
_DCT[0] *= np.float32(np.sqrt(0.5))
_DCT_2D = np.kron(_DCT, _DCT).T
"""Samples [64] of a block, row by row, to its coefficients."""


@dataclass(frozen=True)
class Segment:
    """A marker segment of the header."""

    marker: int
    body: bytes
    """Without marker and length."""

    def __bytes__(self) -> bytes:
        return struct.pack(">BBH", 0xFF, self.marker, 2 + len(self.body)) + self.body


@dataclass(frozen=True, kw_only=True)
class Jpeg:
    """A JPEG file in its parts."""

    data: bytes
    """The whole file."""
    segments: tuple[Segment, ...]
    """Those before the first scan, in order."""
    end: int
    """Where the picture ends. What follows it is a trailer: gain maps, videos, a maker's data."""
    has_late_tables: bool
    """Whether quantisation tables change between scans."""

    @cached_property
    def coding(self) -> int:
        """The marker of the frame header: `BASELINE`, `PROGRESSIVE`, ..."""
        return self._frame_header.marker

    @property
    def bits(self) -> int:
        """Bits of a sample."""
        return self._frame_header.body[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as stored."""
        height, width = struct.unpack_from(">HH", self._frame_header.body, 1)
        return width, height

    @cached_property
    def _frame_header(self) -> Segment:
        return next(segment for segment in self.segments if segment.marker in _FRAME_HEADERS)

    @property
    def restart_interval(self) -> int:
        """MCUs between restart markers, 0 if there are none."""
        intervals = [struct.unpack(">H", s.body)[0] for s in self.segments if s.marker == DRI]
        return intervals[-1] if intervals else 0

    def quantisation(self) -> list[npt.NDArray[np.float32]]:
        """Return each component's table, float32 [8, 8]."""
        tables = {}
        for segment in self.segments:
            body = segment.body if segment.marker == DQT else b""
            while body:
                size = 2 if body[0] >> 4 else 1
                table = np.zeros(64, np.float32)
                table[_ZIGZAG] = np.frombuffer(body, f">u{size}", 64, 1)
                tables[body[0] & 15] = table.reshape(8, 8)
                body = body[1 + 64 * size :]
        header = self._frame_header.body
        return [tables[header[8 + 3 * i]] for i in range(header[5])]

    def huffman_tables(self) -> dict[int, bytes]:
        """Return the Huffman tables of the header by class and number."""
        tables = {}
        for segment in self.segments:
            body = segment.body if segment.marker == DHT else b""
            while body:
                size = 17 + sum(body[1:17])
                tables[body[0]] = body[1:size]
                body = body[size:]
        return tables


def parse_jpeg(data: bytes) -> Jpeg:
    """Take a JPEG apart.

    Raises:
        ValueError: if it is damaged or truncated.
    """
    segments: list[Segment] = []
    late_tables = False
    scanning = False
    for marker, start, stop in _walk(data):
        if marker == EOI:
            if not scanning:
                raise ValueError("it has no picture")
            jpeg = Jpeg(data=data, segments=tuple(segments), end=stop, has_late_tables=late_tables)
            _check_header(jpeg)
            return jpeg
        scanning = scanning or marker == SOS
        late_tables = late_tables or (scanning and marker == DQT)
        if not scanning:
            segments.append(Segment(marker, data[start + 4 : stop]))
    raise ValueError("its end is missing")


def _check_header(jpeg: Jpeg) -> None:
    try:
        jpeg.quantisation()
        jpeg.huffman_tables()
        jpeg.restart_interval  # noqa: B018  read for its error
    except (StopIteration, KeyError, IndexError, struct.error) as error:
        raise ValueError("its header makes no sense") from error


def _walk(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, the beginning and the end of each segment, and of the end of the picture."""
    at = 2
    while match := _MARKER.search(data, at):
        at = match.start()
        marker = data[at + 1]
        if marker == EOI:
            yield marker, at, at + 2
            return
        if marker in _NO_BODY:
            at += 2
            continue
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if stop > len(data) or stop < at + 4:
            raise ValueError("a segment is cut off")
        yield marker, at, stop
        at = stop


@lru_cache(maxsize=1)
def _standard_huffman_tables() -> dict[int, bytes]:
    """Return those of T.81's annex K, as an encoder writes that computes none."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return parse_jpeg(buffer.getvalue()).huffman_tables()


def edit_jpeg(jpeg: Jpeg, before: Sequence[Plane], after: Sequence[Plane], segments: Sequence[Segment]) -> bytes:
    """Return the file with the blocks coded anew in which a sample has changed, without a trailer.

    Args:
        jpeg: the source.
        before: its planes, uint8, as stored.
        after: the same, changed.
        segments: the header's, as they are to be written; the Huffman tables are replaced.
    """
    changed = [_changed_blocks(*planes) for planes in zip(before, after, strict=True)]
    transforms = [_DCT_2D / table.reshape(64) for table in jpeg.quantisation()]

    def edit(component: int, row: int, coefficients: Coefficients) -> None:
        columns = np.flatnonzero(changed[component][row])
        change = _change_of(before[component], after[component], row, columns) @ transforms[component]
        new = coefficients[columns] + np.rint(change).astype(np.int16)
        coefficients[columns] = np.clip(new, MIN_COEFFICIENTS, MAX_COEFFICIENT)

    coded = edit_coefficients(
        jpeg.data[: jpeg.end],
        edit,
        rows=[set(np.flatnonzero(blocks.any(1)).tolist()) for blocks in changed],
        progressive=jpeg.coding == PROGRESSIVE,
        optimize=not jpeg.huffman_tables().items() <= _standard_huffman_tables().items(),
        restart_interval=jpeg.restart_interval,
    )
    tables, scans = _huffman_coded(coded)
    header = b""
    for segment in segments:
        if segment.marker == DHT:
            header += tables
            tables = b""
        else:
            header += bytes(segment)
    return coded[:2] + header + tables + scans


def _huffman_coded(coded: bytes) -> tuple[bytes, bytes]:
    """Return the Huffman tables and the scans of a JPEG."""
    tables = b""
    for marker, start, stop in _walk(coded):
        if marker == SOS:
            return tables, coded[start:]
        if marker == DHT:
            tables += coded[start:stop]
    raise ValueError("libjpeg-turbo wrote no scan")


def _change_of(before: Plane, after: Plane, row: int, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the change of the samples of blocks [N] in a row of blocks: float32 [N, 64]."""
    first, last = columns[0], columns[-1]
    window = slice(row * 8, (row + 1) * 8), slice(first * 8, (last + 1) * 8)
    difference = cv2.subtract(after[window], before[window], dtype=cv2.CV_32F)
    height, width = difference.shape
    if height < 8 or width % 8:  # over the edge, blocks are filled with its samples
        difference = np.pad(difference, ((0, 8 - height), (0, -width % 8)), "edge")
    blocks = difference.reshape(8, -1, 8).swapaxes(0, 1)
    return (blocks if len(columns) == len(blocks) else blocks[columns - first]).reshape(-1, 64)


def _changed_blocks(before: Plane, after: Plane) -> npt.NDArray[np.bool_]:
    """Return which blocks of 8x8 of uint8 [H, W] have a changed sample: bool [rows, columns]."""
    whole = before.shape[1] // 8 * 8
    rows = [plane[:, :whole].view(np.uint64) for plane in (before, after)]  # eight samples of a block at a time
    changed = rows[0] != rows[1]
    if whole < before.shape[1]:
        changed = np.column_stack([changed, (before[:, whole:] != after[:, whole:]).any(1)])
    if len(changed) % 8:
        changed = np.pad(changed, ((0, -len(changed) % 8), (0, 0)))
    return changed.reshape(-1, 8, changed.shape[1]).any(1)
