"""The Triton kernel of `apply_change`: one launch a face for all planes, so that overlapping faces keep their order.

D of the formula is not stored. A plane sample is a bilinear mean of four values of D, each of which is a weighted sum
of the maps, and all weights are products of one along x and one along y: so the sample is one weighted sum over the few
crop pixels around it, five a side where the maps are enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import triton
import triton.language as tl

from faceage.kernels.apply_change import (
    BLACK_OFFSET,
    PlaneChange,
    Rect,
    code_max,
    enlarge_factor,
    plane_steps,
    samples_to_filtered,
)
from faceage.kernels.color import RGB_LUMA
from faceage.kernels.strided import code_type, upload_table
from faceage.kernels.transfer import as_tensor, to_device
from faceage.types import Frame

INTEGERS, REALS = 22, 16
"""Columns of the table: see `_row_of`."""
BLOCK = 128
"""Samples of a plane a program."""
TAPS = 8
"""Crop pixels along x that are weighed at once: the cubic filter needs five."""


@triton.jit
def _filter_weight(distance, step):
    """Return Catmull-Rom's weight at a distance in crop pixels, or a tent's of half-width `step` where that is >= 1."""
    d = tl.abs(distance)
    if step < 1:
        far = tl.where(d < 2, ((-0.5 * d + 2.5) * d - 4) * d + 2, 0.0)
        weight = tl.where(d < 1, (1.5 * d - 2.5) * d * d + 1, far)
    else:
        weight = tl.maximum(1 - d / step, 0.0)
    return weight


@triton.jit
def _filter_position(position, count, k, rim):
    """Return, for a position in D: a crop pixel q near it, and of the samples of D on both sides weight and place.

    Places are relative to q, so that float32 has them exactly. Weights are 0 where D has no sample, or a rim of zeros.
    """
    low = tl.floor(tl.minimum(tl.maximum(position, -1.0), (count * k).to(tl.float64)))
    share = (position - low).to(tl.float32)
    before = low.to(tl.int32)
    last = count * k - 1 - rim
    weight_0 = tl.where((before >= rim) & (before <= last), 1 - share, 0.0)
    weight_1 = tl.where((before + 1 >= rim) & (before + 1 <= last), share, 0.0)
    q = (before + k) // k - 1
    place_0 = ((before - q * k).to(tl.float32) + 0.5) / k.to(tl.float32) - 0.5
    return q, weight_0, place_0, weight_1, place_0 + 1 / k.to(tl.float32)


@triton.jit
def _apply_change_kernel(
    table,
    reals,
    CODES: tl.constexpr,
    IS_PACKED: tl.constexpr,
    INTEGERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Change a block of one component, or of packed RGB all three: their common luma is read before any is written."""
    row = tl.program_id(1) * COLUMNS
    row_stride = tl.load(table + row + 1)
    column_stride = tl.load(table + row + 2)
    width = tl.load(table + row + 5).to(tl.int32)
    map_width = tl.load(table + row + 7).to(tl.int32)
    map_height = tl.load(table + row + 8).to(tl.int32)
    reach_x = tl.load(table + row + 10).to(tl.int32)
    reach_y = tl.load(table + row + 13).to(tl.int32)
    has_gain = tl.load(table + row + 15) != 0
    unit = tl.load(table + row + 16).to(tl.int32)
    largest = tl.load(table + row + 17).to(tl.int32)
    side = tl.load(table + row + 18).to(tl.int32)
    delta = tl.cast(tl.load(table + row + 19), tl.pointer_type(tl.float32))
    gain = tl.cast(tl.load(table + row + 20), tl.pointer_type(tl.float32))
    m = reals + row + INTEGERS
    step_x = tl.load(m + 6).to(tl.float32)
    step_y = tl.load(m + 7).to(tl.float32)

    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_sample = sample < width * tl.load(table + row + 6).to(tl.int32)
    y = sample // width
    x = sample % width
    u = tl.load(m) * x.to(tl.float64) + tl.load(m + 1) * y.to(tl.float64) + tl.load(m + 2)
    v = tl.load(m + 3) * x.to(tl.float64) + tl.load(m + 4) * y.to(tl.float64) + tl.load(m + 5)
    kx = tl.load(table + row + 9).to(tl.int32)
    ky = tl.load(table + row + 12).to(tl.int32)
    qx, x0, from_x0, x1, from_x1 = _filter_position(u, map_width, kx, tl.load(table + row + 11).to(tl.int32))
    qy, y0, from_y0, y1, from_y1 = _filter_position(v, map_height, ky, tl.load(table + row + 14).to(tl.int32))

    change_0 = tl.zeros((BLOCK, TAPS), tl.float32)
    change_1 = tl.zeros((BLOCK, TAPS), tl.float32)
    change_2 = tl.zeros((BLOCK, TAPS), tl.float32)
    relative = tl.zeros((BLOCK, TAPS), tl.float32)
    area = side * side
    for first in range(-reach_x, reach_x + 1, TAPS):
        i = (first + tl.arange(0, TAPS))[None, :]
        weight_x = x0[:, None] * _filter_weight(i - from_x0[:, None], step_x)
        weight_x += x1[:, None] * _filter_weight(i - from_x1[:, None], step_x)
        column = qx[:, None] + i
        is_column = is_sample[:, None] & (i <= reach_x) & (column >= 0) & (column < map_width)
        for j in range(-reach_y, reach_y + 1):
            weight_y = y0 * _filter_weight(j - from_y0, step_y) + y1 * _filter_weight(j - from_y1, step_y)
            weight = weight_y[:, None] * weight_x
            is_pixel = is_column & ((qy + j >= 0) & (qy + j < map_height))[:, None]
            at = ((qy + j) * side)[:, None] + column
            change_0 += weight * tl.load(delta + at, mask=is_pixel, other=0)
            if IS_PACKED:
                change_1 += weight * tl.load(delta + area + at, mask=is_pixel, other=0)
                change_2 += weight * tl.load(delta + 2 * area + at, mask=is_pixel, other=0)
            relative += weight * tl.load(gain + at, mask=is_pixel & has_gain, other=0)

    place = (tl.load(table + row + 4) + y) * row_stride + (tl.load(table + row + 3) + x) * column_stride
    samples = tl.cast(tl.load(table + row), tl.pointer_type(CODES)) + place
    code_0 = tl.load(samples, mask=is_sample, other=0).to(tl.int32)
    luma = code_0.to(tl.float32)
    if IS_PACKED:
        code_1 = tl.load(samples + 1, mask=is_sample, other=0).to(tl.int32)
        code_2 = tl.load(samples + 2, mask=is_sample, other=0).to(tl.int32)
        luma = tl.load(m + 10).to(tl.float32) * luma + tl.load(m + 11).to(tl.float32) * code_1.to(tl.float32)
        luma += tl.load(m + 12).to(tl.float32) * code_2.to(tl.float32)
    # What is brighter than the change is meant for changes less, down to nothing.
    dark = tl.load(table + row + 21)
    limits = tl.cast(dark, tl.pointer_type(tl.float32))
    whole = tl.load(limits, mask=dark != 0, other=0.0)
    none = tl.load(limits + 1, mask=dark != 0, other=1.0)
    signal = (luma / unit.to(tl.float32) - tl.load(m + 13).to(tl.float32)) / tl.load(m + 14).to(tl.float32)
    share = tl.minimum(tl.maximum((none - signal) / (none - whole), 0.0), 1.0)
    share = tl.where(dark != 0, share, 1.0) * tl.load(m + 15).to(tl.float32)
    divisor = tl.load(m + 8).to(tl.float32)
    added = tl.sum(relative, 1) * (luma / unit.to(tl.float32) + tl.load(m + 9).to(tl.float32))
    _store_changed(samples, code_0, (tl.sum(change_0, 1) + added) / divisor * share, unit, largest, is_sample)
    if IS_PACKED:
        _store_changed(samples + 1, code_1, (tl.sum(change_1, 1) + added) / divisor * share, unit, largest, is_sample)
        _store_changed(samples + 2, code_2, (tl.sum(change_2, 1) + added) / divisor * share, unit, largest, is_sample)


@triton.jit
def _store_changed(samples, code, change, unit, largest, is_sample):
    """Store codes that change, rounded half to even: above 1.5 * 2^23 the numbers of float32 are 1 apart."""
    rounded = ((change + 12582912.0) - 12582912.0).to(tl.int32)
    after = tl.minimum(tl.maximum(code + rounded * unit, 0), largest)
    tl.store(samples, after.to(samples.dtype.element_ty), mask=is_sample & (rounded != 0))


def apply_change_triton(frame: Frame, parts: Sequence[tuple[PlaneChange, Rect]]) -> None:
    """Change the given rectangles of a frame's planes in one launch."""
    device = torch.device(frame.device)
    is_packed = frame.layout.planes[0].components.startswith("RGB")
    integers, reals, limits = [], [], []
    for part, rect in parts:
        its_integers, its_reals = _row_of(part, rect)
        plane, delta = as_tensor(part.plane), as_tensor(part.delta)
        gain = delta if part.gain is None else as_tensor(part.gain)
        dark = None if part.dark is None else _as_tensor(part.dark, device)
        limits.append(dark)  # it has to be there until the kernel is started
        for number in range(1 if is_packed else delta.shape[2]):
            address = plane.data_ptr() + number * plane.element_size()
            maps = delta.data_ptr() + number * delta.stride(2) * delta.element_size(), gain.data_ptr()
            integers.append([address, *its_integers, delta.stride(0), *maps, 0 if dark is None else dark.data_ptr()])
            reals.append(its_reals)
    numbers, same = upload_table(integers, reals, device)
    largest = max((x1 - x0) * (y1 - y0) for _, (x0, y0, x1, y1) in parts)
    grid = (triton.cdiv(largest, BLOCK), len(integers))
    columns = INTEGERS + REALS
    with torch.cuda.device_of(numbers):
        _apply_change_kernel[grid](
            numbers, same,
            CODES=code_type(frame), IS_PACKED=is_packed, INTEGERS=INTEGERS, COLUMNS=columns, BLOCK=BLOCK, TAPS=TAPS,
        )  # fmt: skip


def _as_tensor(dark: tuple[float, float] | tuple[torch.Tensor, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the two values of `Change.dark` on a device."""
    if isinstance(dark[0], torch.Tensor):
        return torch.stack(cast(tuple[torch.Tensor, torch.Tensor], dark))
    return to_device(np.array(dark, np.float32), device)


def _row_of(part: PlaneChange, rect: Rect) -> tuple[list[int], list[float]]:
    """Return what the table's rows of a part's components have in common: all but the four addresses and S.

    A row's integers are address, row stride, column stride; the rectangle's x, y, width and height; the maps' width and
    height; k, reach and rim along x, then along y (see `_filter_position`); whether there is a gain; 2^shift; the
    largest code; the crop's side S: rows of maps are S apart, components S^2; the addresses of the maps of delta and
    gain, and of the two values of `Change.dark` (0: all samples change). Its reals are the map from the rectangle's
    samples to D [6]; the steps along x and y; what weights are divided by; what is added to the luma before it is
    multiplied; its weights; the codes of E'Y = 0, and of its range; and the share of the whole change.
    """
    x0, y0, x1, y1 = rect
    height, width = part.delta.shape[:2]
    steps = plane_steps(part.matrix)
    (*along_x, divisor_x), (*along_y, divisor_y) = (
        _axis(n, step) for n, step in zip((width, height), steps, strict=True)
    )
    matrix = samples_to_filtered(part.matrix, rect, int(along_x[0]), int(along_y[0]))
    layout = part.layout
    integers = [
        *as_tensor(part.plane).stride()[:2],
        *(x0, y0, x1 - x0, y1 - y0, width, height),
        *(*along_x, *along_y),
        *(int(part.gain is not None), 2**layout.shift, code_max(layout)),
    ]
    added = BLACK_OFFSET * part.span - part.black
    luma = divisor_x * divisor_y, added, *RGB_LUMA.tolist(), part.black, part.span
    return integers, [*matrix.ravel().tolist(), *steps, *luma, part.weight]


def _axis(size: int, step: float) -> tuple[int, int, int, float]:
    """Return k, reach, rim and divisor of the formula's second or third line along one axis."""
    if step < 1:
        return enlarge_factor(step), 2, 0, 1.0
    taps = min(math.ceil(step) - 1, size)  # on each side of the middle one, whose weight is 1
    return 1, math.ceil(step), 1, 1 + 2 * taps - taps * (taps + 1) / step
