"""The Triton kernel of `gather`: one program for some pixels of one crop, all faces of all frames in one launch.

Each plane sample of the face's rectangle is read by the crop pixels whose cells it lies in, four at most; they are
neighbours, so it comes from the cache. Positions are computed in float64, as float32 has only 1/2000 of a sample at
column 4000; the rest is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from faceage.kernels.color import color_of, yuv_to_rgb
from faceage.kernels.placement import Matrix23, shown_to_plane
from faceage.kernels.strided import code_type, components, upload_table
from faceage.types import FloatArray, Frame, IntArray

INTEGERS, REALS = 8, 12
"""Columns of the table: see `_rows_of`."""
BLOCK = 256
"""Pixels of a crop a program."""


@triton.jit
def _gather_kernel(
    table,
    reals,
    out,
    size,
    CODES: tl.constexpr,
    COMPONENTS: tl.constexpr,
    INTEGERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    face = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_pixel = pixel < size * size
    y = (pixel // size).to(tl.float64)
    x = (pixel % size).to(tl.float64)
    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    for component in tl.static_range(COMPONENTS):
        row = (face * COMPONENTS + component) * COLUMNS
        samples = tl.cast(tl.load(table + row), tl.pointer_type(CODES))
        row_stride = tl.load(table + row + 1)
        column_stride = tl.load(table + row + 2)
        height = tl.load(table + row + 3).to(tl.int32)
        width = tl.load(table + row + 4).to(tl.int32)
        dy = tl.load(table + row + 5).to(tl.int32)
        dx = tl.load(table + row + 6).to(tl.int32)
        m = reals + row + INTEGERS
        u = tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2)
        v = tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5)
        # All cells left of -1 equal cell -1, and all right of the last one the one after it.
        u = tl.minimum(tl.maximum(u, -1.0), ((width + dx - 1) // dx).to(tl.float64))
        v = tl.minimum(tl.maximum(v, -1.0), ((height + dy - 1) // dy).to(tl.float64))
        j = tl.floor(u)
        i = tl.floor(v)
        a = (u - j).to(tl.float32)
        b = (v - i).to(tl.float32)
        left = j.to(tl.int32) * dx
        top = i.to(tl.int32) * dy
        total = tl.zeros((BLOCK,), tl.float32)
        for down in range(2 * dy):  # the cells i and i + 1
            line_total = tl.zeros((BLOCK,), tl.float32)
            line = tl.minimum(tl.maximum(top + down, 0), height - 1).to(tl.int64) * row_stride
            for along in range(2 * dx):
                column = tl.minimum(tl.maximum(left + along, 0), width - 1).to(tl.int64) * column_stride
                code = tl.load(samples + line + column, mask=is_pixel, other=0).to(tl.float32)
                line_total += tl.where(along < dx, 1 - a, a) * code
            total += tl.where(down < dy, 1 - b, b) * line_total
        total = total / (dx * dy).to(tl.float32)
        color = reals + row + INTEGERS + 6
        red += tl.load(color).to(tl.float32) * total + tl.load(color + 3).to(tl.float32)
        green += tl.load(color + 1).to(tl.float32) * total + tl.load(color + 4).to(tl.float32)
        blue += tl.load(color + 2).to(tl.float32) * total + tl.load(color + 5).to(tl.float32)
    crop = out + tl.load(table + face * COMPONENTS * COLUMNS + 7) * 3 * size * size + pixel
    tl.store(crop, tl.minimum(tl.maximum(red, -1.0), 1.0), mask=is_pixel)
    tl.store(crop + size * size, tl.minimum(tl.maximum(green, -1.0), 1.0), mask=is_pixel)
    tl.store(crop + 2 * size * size, tl.minimum(tl.maximum(blue, -1.0), 1.0), mask=is_pixel)


def gather_crops_triton(
    frames: Sequence[Frame], frame_index: IntArray, frame_to_crop: FloatArray, size_px: int
) -> torch.Tensor:
    """Compute `gather_crops` on the frames' device."""
    device = torch.device(frames[0].device if frames else "cpu")
    crops = torch.empty(len(frame_index), 3, size_px, size_px, device=device)
    full = np.zeros((len(frame_index), 3, 3))
    full[:, :2], full[:, 2, 2] = frame_to_crop, 1
    crop_to_frame = np.linalg.inv(full)
    # Frames of one size of code and one number of components share a launch: those of a video always do.
    groups: dict[tuple[int, int], list[tuple[Frame, IntArray]]] = {}
    for index in np.unique(frame_index).tolist():
        frame = frames[index]
        key = frame.layout.dtype.itemsize, len(components(frame))
        groups.setdefault(key, []).append((frame, np.flatnonzero(frame_index == index)))
    for (_, count), members in groups.items():
        parts = [_rows_of(frame, rows, crop_to_frame[rows]) for frame, rows in members]
        integers, reals = (np.concatenate(part) for part in zip(*parts, strict=True))
        grid = (len(integers), triton.cdiv(size_px * size_px, BLOCK))
        columns = INTEGERS + REALS
        code = code_type(members[0][0])
        with torch.cuda.device_of(crops):
            _gather_kernel[grid](
                *upload_table(integers, reals, device), crops, size_px,
                CODES=code, COMPONENTS=count, INTEGERS=INTEGERS, COLUMNS=columns, BLOCK=BLOCK,
            )  # fmt: skip
    return crops


def _rows_of(frame: Frame, rows: IntArray, crop_to_frame: Matrix23) -> tuple[IntArray, Matrix23]:
    """Return the table of the faces `rows` of one frame: int64 [F, C, INTEGERS] and float64 [F, C, REALS].

    Integers are address, row stride, column stride, height, width, d_y, d_x of the component, and the crop's row.
    Reals are the map from crop pixels to cells [6], and what a code contributes to R, G and B: factor [3], offset [3].
    """
    layout, parts = frame.layout, components(frame)
    integers = np.empty((len(rows), len(parts), INTEGERS), np.int64)
    reals = np.empty((len(rows), len(parts), REALS))
    matrix, offset = yuv_to_rgb(color_of(frame), layout.bit_depth)
    if len(parts) == 1:  # gray: neutral chroma
        offset = offset + matrix[:, 1:].sum(1) * 2.0 ** (layout.bit_depth - 1)
    for at, part in enumerate(parts):
        to_plane = np.vstack([shown_to_plane(frame, part.spec), [0, 0, 1]]) @ crop_to_frame  # [F, 3, 3]
        d = np.maximum(1, np.rint(np.hypot(to_plane[:, :2, 0], to_plane[:, :2, 1])))  # [F, 2], x and y
        cells = to_plane[:, :2] / d[..., None]
        cells[..., 2] += (1 / d - 1) / 2
        integers[:, at, :5] = part.address, part.row_stride, part.column_stride, part.height, part.width
        integers[:, at, 5:7] = d[:, ::-1]
        reals[:, at, :6] = cells.reshape(-1, 6)
        reals[:, at, 6:9] = matrix[:, at] / 2**layout.shift
        reals[:, at, 9:] = offset if at == 0 else 0
    integers[..., 7] = rows[:, None]
    return integers, reals
