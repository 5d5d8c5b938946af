"""Gather aligned RGB crops straight out of the native planes of frames.

For each plane, with M the map from crop pixels to plane samples (the plane's subsampling and siting in it):

    d        = max(1, round(plane samples per crop pixel)), along x and along y
    R[i, j]  = mean of P[clamp(d_y i + a), clamp(d_x j + b)] over 0 <= a < d_y, 0 <= b < d_x
    crop[p]  = bilinear sample of R at (M p - (d - 1) / 2) / d
    rgb      = clamp(matrix @ crop + offset, -1, 1)

The box mean is the antialiasing: a 500-pixel face in a 64-pixel crop is read whole. Clamped indices replicate
the frame's border, so a face may lie partly or wholly outside. Nothing beyond the face's rectangle is read,
and only the small crop is converted to RGB.

Convention: sample centres at integers in every plane, placed as in `placement`. Bytes moved: the face's rectangle once.
Tolerance: in float32 the implementations differ by less than 1e-5; OpenCV before 5.0 rounds
sampling positions to 1/32 of a cell, which adds up to 1/64 of the difference of neighbouring cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from faceage.errors import ShapeError
from faceage.kernels.color import color_of, yuv_to_rgb
from faceage.kernels.implementation import Implementation, choose_implementation
from faceage.kernels.placement import Matrix23, compose_affine, crop_to_plane
from faceage.kernels.streams import await_samples
from faceage.kernels.transfer import as_tensor, to_device
from faceage.types import FloatArray, Frame, HostPlane, IntArray, Samples

if TYPE_CHECKING:
    import torch


def box_factors(crop_to_samples: Matrix23) -> tuple[int, int]:
    """Return the box mean's width and height in plane samples, given the map from crop pixels.

    The length of a row is what one crop pixel spans along that axis of the plane, however it is rotated.
    """
    dx, dy = (max(1, round(math.hypot(*row))) for row in crop_to_samples[:, :2])
    return dx, dy


def _crop_to_cells(crop_to_samples: Matrix23, d: tuple[int, int]) -> Matrix23:
    """Return the map from crop pixels to cells of the box mean."""
    to_cells = np.array([[1 / d[0], 0, (1 / d[0] - 1) / 2], [0, 1 / d[1], (1 / d[1] - 1) / 2]])
    return compose_affine(to_cells, crop_to_samples)


def gather_crops_ref(
    frames: Sequence[Frame],
    frame_index: IntArray,
    frame_to_crop: FloatArray,
    size_px: int,
) -> torch.Tensor:
    """Compute `gather_crops` with PyTorch, term by term as in the formula."""
    import torch

    crops = torch.empty(len(frame_index), 3, size_px, size_px, device=frames[0].device if frames else None)
    for row, index in enumerate(frame_index.tolist()):
        frame = frames[index]
        color, layout = color_of(frame), frame.layout
        components = []
        for plane, spec in zip(frame.planes, layout.planes, strict=True):
            samples = as_tensor(plane).float() / 2**layout.shift
            matrix = crop_to_plane(frame, spec, frame_to_crop[row])
            components += _sample_plane_ref(samples.reshape(*plane.shape[:2], -1), matrix, size_px)
        if len(components) == 1:  # gray: no chroma
            components += [torch.full_like(components[0], 2 ** (layout.bit_depth - 1))] * 2
        matrix, offset = (to_device(a, crops.device) for a in yuv_to_rgb(color, layout.bit_depth))
        codes = torch.stack(components[:3]).double()
        rgb = torch.einsum("ij,jhw->ihw", matrix, codes) + offset[:, None, None]
        crops[row] = rgb.clamp(-1, 1).float()
    return crops


def _sample_plane_ref(samples: torch.Tensor, crop_to_samples: Matrix23, size_px: int) -> list[torch.Tensor]:
    """Return each component of float32 [H, W, C] `samples` as a [S, S] crop."""
    import torch

    dx, dy = box_factors(crop_to_samples)
    m = _crop_to_cells(crop_to_samples, (dx, dy)).tolist()
    pixels = torch.arange(size_px, device=samples.device).double()
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    u = m[0][0] * x + m[0][1] * y + m[0][2]  # [S, S], cells
    v = m[1][0] * x + m[1][1] * y + m[1][2]
    height, width, _ = samples.shape

    def cell(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        rows = (dy * i.long()[..., None] + torch.arange(dy, device=samples.device)).clamp(0, height - 1)
        cols = (dx * j.long()[..., None] + torch.arange(dx, device=samples.device)).clamp(0, width - 1)
        return samples[rows[..., :, None], cols[..., None, :]].mean((2, 3))  # [S, S, C]

    i, j = v.floor(), u.floor()
    a, b = (u - j)[..., None].float(), (v - i)[..., None].float()
    top = cell(i, j) * (1 - a) + cell(i, j + 1) * a
    bottom = cell(i + 1, j) * (1 - a) + cell(i + 1, j + 1) * a
    return list((top * (1 - b) + bottom * b).unbind(-1))


def _cell_span(low: float, high: float, cells: int) -> tuple[int, int]:
    """Return the range of cells that bilinear samples in [low, high] touch.

    All cells left of -1 equal cell -1 and all right of `cells` equal it, so the range ends there; it always
    holds a cell of the plane.
    """
    first = min(max(math.floor(low), -1), cells - 1)
    return first, max(min(math.floor(high) + 1, cells), 0) + 1


def _clamped_slice(plane: HostPlane, axis: int, start: int, stop: int) -> tuple[HostPlane, int, int]:
    """Return samples start..stop along `axis` that exist, and how many lack on each side."""
    size = plane.shape[axis]
    low, high = max(start, 0), min(stop, size)
    index = [slice(None)] * plane.ndim
    index[axis] = slice(low, high)
    return plane[tuple(index)], low - start, stop - high


def warp_samples(samples: FloatArray, matrix: Matrix23, size: tuple[int, int], border: int) -> FloatArray:
    """Return bilinear samples of float32 [H, W] or [H, W, C]; `matrix` maps the result's pixels to them.

    OpenCV 5 samples one and three channels at exact positions but rounds those of two (nv12's UV) to 1/32.
    """
    if samples.ndim == 3 and samples.shape[2] == 2:
        return cv2.merge([warp_samples(channel, matrix, size, border) for channel in cv2.split(samples)])
    return cv2.warpAffine(samples, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=border)


def _sample_plane(plane: HostPlane, crop_to_samples: Matrix23, size_px: int) -> FloatArray:
    """Return float32 [S, S] or [S, S, C] samples of a plane, in its stored codes."""
    dx, dy = box_factors(crop_to_samples)
    m = _crop_to_cells(crop_to_samples, (dx, dy))
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * (size_px - 1.0) @ m[:, :2].T + m[:, 2]
    (u0, v0), (u1, v1) = corners.min(0), corners.max(0)
    height, width = plane.shape[:2]
    i0, i1 = _cell_span(v0, v1, -(-height // dy))
    j0, j1 = _cell_span(u0, u1, -(-width // dx))
    part, top, bottom = _clamped_slice(plane, 0, i0 * dy, i1 * dy)
    part, left, right = _clamped_slice(part, 1, j0 * dx, j1 * dx)
    # Means of integers would be rounded; float32 keeps them exact.
    cells = part.astype(np.float32)
    if top or bottom or left or right:
        cells = cv2.copyMakeBorder(cells, top, bottom, left, right, cv2.BORDER_REPLICATE)
    if dx > 1 or dy > 1:
        cells = cv2.resize(cells, (j1 - j0, i1 - i0), interpolation=cv2.INTER_AREA)
    m[:, 2] -= (j0, i0)
    return warp_samples(cells, m, (size_px, size_px), cv2.BORDER_REPLICATE)


def _gather_cpu(frame: Frame, frame_to_crop: FloatArray, size_px: int) -> FloatArray:
    color, layout = color_of(frame), frame.layout
    sampled = []
    for plane, spec in zip(frame.planes, layout.planes, strict=True):
        matrix = crop_to_plane(frame, spec, frame_to_crop)
        colors = plane[..., :3] if plane.ndim == 3 else plane  # alpha plays no part
        sampled.append(_sample_plane(colors, matrix, size_px))
    if len(sampled) == 1 and sampled[0].ndim == 2:  # gray has no chroma
        sampled += [np.full_like(sampled[0], 2 ** (layout.bit_depth - 1 + layout.shift))] * 2
    codes = cv2.merge(sampled) if len(sampled) > 1 else sampled[0]  # [S, S, 3]
    matrix, offset = yuv_to_rgb(color, layout.bit_depth)
    rgb = cv2.transform(codes, np.column_stack([matrix / 2**layout.shift, offset]))
    return np.clip(rgb, -1, 1, out=rgb).transpose(2, 0, 1)


def gather_crops(
    frames: Sequence[Frame],
    frame_index: IntArray,
    frame_to_crop: FloatArray,
    size_px: int,
    *,
    impl: Literal["auto"] | Implementation = "auto",
) -> Samples:
    """Return the aligned crops of faces, read from the frames' native planes.

    Args:
        frames: the batch's frames, of any sizes and pixel formats; all are arrays, or all are tensors of one device.
            Alpha is ignored.
        frame_index: int64 [F], the position of each face's frame in `frames`. F may be 0.
        frame_to_crop: float32 [F, 2, 3], frame (luma) pixels to crop pixels; invertible and finite.
        size_px: S, the crop's side.
        impl: "cpu" is NumPy and OpenCV, for arrays; "ref" the PyTorch reference; "triton" a kernel, for tensors on a
            GPU; "auto" what fits the frames.

    Returns:
        float32 [F, 3, S, S], RGB in [-1, 1], in the frame's own (non-linear) colour space; where the frames live.

    Raises:
        ShapeError: if `frame_to_crop` does not fit `frame_index`.
    """
    if frame_to_crop.shape != (len(frame_index), 2, 3):
        raise ShapeError(f"expected frame_to_crop [{len(frame_index)}, 2, 3], got {frame_to_crop.shape}")
    if not frames:
        return np.empty((0, 3, size_px, size_px), np.float32)
    await_samples(frames)
    chosen = choose_implementation(frames[0], impl)
    if chosen == "triton":
        from faceage.kernels.gather_triton import gather_crops_triton

        return gather_crops_triton(frames, frame_index, frame_to_crop, size_px)
    if chosen == "ref":
        crops = gather_crops_ref(frames, frame_index, frame_to_crop, size_px)
        return crops.numpy() if frames[0].is_array else crops
    pixels = np.empty((len(frame_index), 3, size_px, size_px), np.float32)
    for row, index in enumerate(frame_index):
        pixels[row] = _gather_cpu(frames[index], frame_to_crop[row], size_px)
    return pixels
