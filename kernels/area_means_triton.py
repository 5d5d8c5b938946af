"""The Triton kernel of `area_means`: direct sums over the samples of each bin, for pictures and rectangles alike.

A program sums some bins side by side, `LANES` samples of a row at a time: many bins where they are small, few where
they are large, so that the coarse levels of a pyramid are not left to a handful of threads. The levels read a frame
again, from the cache.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from faceage.kernels.color import color_of, yuv_to_rgb
from faceage.kernels.strided import code_type, components_as_shown, upload_table
from faceage.types import Frame, IntArray

INTEGERS, REALS = 9, 6
"""Columns of the table: see `_rows_of`."""
TILE = 512
"""Samples that a program reads at a time."""
MAX_LANES = 64


@triton.jit
def _area_means_kernel(
    table,
    reals,
    out,
    bins_x,
    bins_y,
    width,
    height,
    scale,
    CODES: tl.constexpr,
    SUM: tl.constexpr,
    COMPONENTS: tl.constexpr,
    INTEGERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
    LANES: tl.constexpr,
):
    picture = tl.program_id(0)
    bin_ = tl.program_id(1) * BINS + tl.arange(0, BINS)
    is_bin = bin_ < width * height
    # Where the result is one pixel longer than there are bins, the last bin comes twice.
    i = tl.minimum(bin_ // width, bins_y - 1)
    j = tl.minimum(bin_ % width, bins_x - 1)
    lane = tl.arange(0, LANES)
    red = tl.zeros((BINS,), tl.float32)
    green = tl.zeros((BINS,), tl.float32)
    blue = tl.zeros((BINS,), tl.float32)
    for component in tl.static_range(COMPONENTS):
        row = (picture * COMPONENTS + component) * COLUMNS
        samples = tl.cast(tl.load(table + row), tl.pointer_type(CODES))
        row_stride = tl.load(table + row + 1)
        column_stride = tl.load(table + row + 2)
        sub_x = tl.load(table + row + 3).to(tl.int32)
        sub_y = tl.load(table + row + 4).to(tl.int32)
        x = tl.load(table + row + 5).to(tl.int32)
        y = tl.load(table + row + 6).to(tl.int32)
        along = tl.load(table + row + 7).to(tl.int32)  # the rectangle's width and height
        down = tl.load(table + row + 8).to(tl.int32)
        # a and b of the formula; nothing here is negative.
        left = (x + j * along // bins_x) // sub_x
        right = (x + ((j + 1) * along + bins_x - 1) // bins_x + sub_x - 1) // sub_x
        top = (y + i * down // bins_y) // sub_y
        bottom = (y + ((i + 1) * down + bins_y - 1) // bins_y + sub_y - 1) // sub_y
        right = tl.where(is_bin, right, left)  # no sample is read for what is no bin
        total = tl.zeros((BINS, LANES), SUM)
        for line in range(tl.max(bottom - top, 0)):
            at = top + line
            start = samples + at.to(tl.int64) * row_stride
            for first in range(0, tl.max(right - left, 0), LANES):
                column = left[:, None] + first + lane[None, :]
                is_inside = (column < right[:, None]) & (at < bottom)[:, None]
                code = tl.load(start[:, None] + column.to(tl.int64) * column_stride, mask=is_inside, other=0)
                total += code.to(SUM)
        area = tl.maximum((right - left) * (bottom - top), 1).to(tl.float32)
        mean = tl.sum(total.to(tl.float32), 1) / area
        color = reals + row + INTEGERS
        red += tl.load(color).to(tl.float32) * mean + tl.load(color + 3).to(tl.float32)
        green += tl.load(color + 1).to(tl.float32) * mean + tl.load(color + 4).to(tl.float32)
        blue += tl.load(color + 2).to(tl.float32) * mean + tl.load(color + 5).to(tl.float32)
    size = width * height
    pixels = out + picture.to(tl.int64) * 3 * size + bin_
    tl.store(pixels, scale * tl.minimum(tl.maximum(red, -1.0), 1.0), mask=is_bin)
    tl.store(pixels + size, scale * tl.minimum(tl.maximum(green, -1.0), 1.0), mask=is_bin)
    tl.store(pixels + 2 * size, scale * tl.minimum(tl.maximum(blue, -1.0), 1.0), mask=is_bin)


class BinSums:
    """A frame on a GPU whose bins are summed when they are asked for."""

    def __init__(self, frame: Frame, scale: float) -> None:
        self._frame, self._scale = frame, scale
        self._device = torch.device(frame.device)
        self._integers, self._reals = _rows_of(frame)
        whole = np.zeros((1, 2), np.int64), np.array([[frame.width, frame.height]])
        self._whole = self._table(*whole)  # for all levels of a pyramid

    def picture(self, width: int, height: int) -> torch.Tensor:
        """Return the frame at this size: float32 [3, H, W], odd sides one pixel longer."""
        size = width + width % 2, height + height % 2
        return self._means(*self._whole, (width, height), size, widest=-(-self._frame.width // width))[0]

    def rectangles(self, low: IntArray, high: IntArray, size_px: int) -> torch.Tensor:
        """Return rectangles: float32 [K, 3, S, S]."""
        if not len(low):
            return torch.empty(0, 3, size_px, size_px, device=self._device)
        widest = -(-int((high - low)[:, 0].max()) // size_px)
        return self._means(*self._table(low, high), (size_px, size_px), (size_px, size_px), widest=widest)

    def _table(self, low: IntArray, high: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kernel's table for rectangles, on the device."""
        integers, reals = (np.tile(rows, (len(low), 1, 1)) for rows in (self._integers, self._reals))
        integers[..., 5:7], integers[..., 7:9] = low[:, None], (high - low)[:, None]
        return upload_table(integers, reals, self._device)

    def _means(
        self,
        table: torch.Tensor,
        reals: torch.Tensor,
        bins: tuple[int, int],
        size: tuple[int, int],
        *,
        widest: int,
    ) -> torch.Tensor:
        """Return the means over `bins` along x and y as pictures of W x H: float32 [K, 3, H, W].

        Args:
            table: K rectangles.
            reals: the same memory.
            bins: how many along x and y.
            size: W and H.
            widest: about the largest width of a bin.
        """
        width, height = size
        out = torch.empty(len(table), 3, height, width, device=self._device)
        lanes = min(triton.next_power_of_2(widest), MAX_LANES)
        count = TILE // lanes
        is_wide = self._frame.layout.bit_depth > 8
        with torch.cuda.device_of(out):
            _area_means_kernel[len(table), triton.cdiv(width * height, count)](
                table, reals, out, *bins, *size, self._scale,
                CODES=code_type(self._frame), SUM=tl.int64 if is_wide else tl.int32, COMPONENTS=table.shape[1],
                INTEGERS=INTEGERS, COLUMNS=INTEGERS + REALS, BINS=count, LANES=lanes,
            )  # fmt: skip
        return out


def _rows_of(frame: Frame) -> tuple[IntArray, np.ndarray]:
    """Return the table's rows of a frame: int64 [C, INTEGERS] and float64 [C, REALS].

    Integers are address, row stride, column stride, luma samples per sample along x and y, and the rectangle's corner
    and sides, which are left open. Reals are what a code contributes to R, G and B: factor [3] and offset [3].
    """
    layout, parts = frame.layout, components_as_shown(frame)
    matrix, offset = yuv_to_rgb(color_of(frame), layout.bit_depth)
    if len(parts) == 1:  # gray: neutral chroma
        offset = offset + matrix[:, 1:].sum(1) * 2.0 ** (layout.bit_depth - 1)
    integers, reals = np.zeros((len(parts), INTEGERS), np.int64), np.zeros((len(parts), REALS))
    for at, part in enumerate(parts):
        integers[at, :5] = part.address, part.row_stride, part.column_stride, part.spec.sub_x, part.spec.sub_y
        reals[at, :3] = matrix[:, at] / 2**layout.shift
        reals[at, 3:] = offset if at == 0 else 0
    return integers, reals
