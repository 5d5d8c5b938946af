"""The Triton kernel of `thumbnail`: a program for each row of it, which also counts its share of the samples."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256
"""Samples that are counted at a time."""


@triton.jit
def _thumbnail_kernel(
    plane,
    out,
    row_stride,
    column_stride,
    height,
    width,
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, LANES)
    # What the thumbnail's pixel covers, in samples.
    top = row.to(tl.float32) * height / ROWS
    bottom = (row + 1).to(tl.float32) * height / ROWS
    left = column.to(tl.float32) * width / COLUMNS
    right = (column + 1).to(tl.float32) * width / COLUMNS
    first_x = tl.floor(left).to(tl.int32)
    total = tl.zeros((LANES,), tl.float32)
    for y in range(row * height // ROWS, ((row + 1) * height + ROWS - 1) // ROWS):
        weight_y = tl.minimum(y + 1.0, bottom) - tl.maximum(y + 0.0, top)
        for along in range(width // COLUMNS + 2):
            x = first_x + along
            weight_x = tl.maximum(tl.minimum(x + 1.0, right) - tl.maximum(x + 0.0, left), 0.0)
            place = y * row_stride + x * column_stride
            code = tl.load(plane + place, mask=(column < COLUMNS) & (x < width), other=0).to(tl.int32) >> shift
            total += weight_y * weight_x * code.to(tl.float32)
    mean = total * (ROWS * COLUMNS) / (height * width).to(tl.float32)
    # Half to even: above 1.5 * 2^23 the numbers of float32 are 1 apart.
    tl.store(out + row * COLUMNS + column, (mean + 12582912.0) - 12582912.0, mask=column < COLUMNS)
    counts = tl.zeros((BINS,), tl.int32)
    for y in range(row * height // ROWS, (row + 1) * height // ROWS):
        for start in range(0, width, BLOCK):
            x = start + tl.arange(0, BLOCK)
            place = y * row_stride + x * column_stride
            code = tl.load(plane + place, mask=x < width, other=0).to(tl.int32) >> shift
            counts += tl.histogram(code // (256 // BINS), BINS, mask=x < width)
    tl.atomic_add(out + ROWS * COLUMNS + tl.arange(0, BINS), counts.to(tl.float32))


def thumbnail_triton(luma: torch.Tensor, shift: int, size: tuple[int, int], bins: int) -> torch.Tensor:
    """Return the thumbnail's pixels, row by row, and then the number of samples in each bin: float32 [H W + bins].

    Args:
        luma: [h, w] samples.
        shift: by which they are cut to 8 bits.
        size: W and H.
        bins: of the histogram.
    """
    columns, rows = size
    out = torch.zeros(rows * columns + bins, device=luma.device)
    height, width = luma.shape
    with torch.cuda.device_of(out):
        _thumbnail_kernel[(rows,)](
            luma, out, *luma.stride(), height, width, shift,
            ROWS=rows, COLUMNS=columns, LANES=triton.next_power_of_2(columns), BINS=bins, BLOCK=BLOCK,
        )  # fmt: skip
    return out
