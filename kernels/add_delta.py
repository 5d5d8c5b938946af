"""Add a small RGB difference into the native planes of a frame, in place.

For each plane, with p = crop pixels per plane sample along the crop's x, and likewise along its y:

    codes    = rgb_to_yuv_delta @ delta                       small: [C, S, S]
    p >= 1   : D = codes filtered by a tent of half-width p   (antialiasing; the identity at p = 1)
    p <  1   : D = codes enlarged k times by Catmull-Rom's cubic, k = clamp(round(1 / p), 1, 4)
    add[x]   = bilinear sample of D, zero outside, at the crop position of plane sample x
    plane[x] = clip(plane[x] + round(add[x]), 0, 2^n - 1)     round half to even

Catmull-Rom reproduces ramps exactly and is C1, so a 64-pixel delta on a 500-pixel face shows no facets; the
bilinear step that follows works on an oversampled signal. Its support of two pixels and the delta's zero rim
keep every overshoot inside the crop: samples outside the crop's quadrilateral, and samples whose rounded
difference is 0, keep their bits. No dithering: the difference comes on top of the original's own grain, and
on a flat, grainless picture its contours are steps of one code, as in any gradient of that bit depth.

Convention: as in `gather`; D's sample i lies at crop pixel (i + 0.5) / k - 0.5.
Bytes moved: the crop's rectangle of each plane, read and written once.
Tolerance: the two implementations round differently only at ties, so they differ by at most 1 code.
Reference: Keys, "Cubic convolution interpolation", IEEE TASSP 1981, eq. 15 (a = -1/2).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from faceage.errors import ShapeError
from faceage.kernels.color import color_of, rgb_to_yuv_delta
from faceage.kernels.gather import Matrix23, compose_affine, crop_to_plane, warp_samples
from faceage.types import FloatArray, Frame, PixelLayout, Plane, PlaneLayout

Rect = tuple[int, int, int, int]
"""x0, y0, x1, y1 in samples; x1 and y1 lie outside."""

MAX_ENLARGE = 4
"""Largest k: bilinear sampling of D errs by at most 1 / (8 k^2) < 1 % of the delta's second derivative."""

STRIP_SAMPLES = 32768
"""Samples added at a time: the float32 strip (128 KiB) stays in the cache."""


def enlarge_factor(crop_px_per_sample: float) -> int:
    """Return k of the module's formula: 1 where the delta is not enlarged."""
    return min(max(1, round(1 / crop_px_per_sample)), MAX_ENLARGE)


def _cubic(x: npt.NDArray[np.float64]) -> FloatArray:
    """Return Catmull-Rom's weights at distances `x` in samples."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0)).astype(np.float32)


def _plane_steps(crop_to_samples: Matrix23) -> tuple[float, float]:
    """Return how far one plane sample reaches along the crop's x and y, in crop pixels."""
    step_x, step_y = (math.hypot(*row) for row in np.linalg.inv(crop_to_samples[:, :2]))
    return step_x, step_y


def _covered_rect(crop_to_samples: Matrix23, size_px: int, width: int, height: int) -> Rect | None:
    """Return the samples of a plane that can change: between the centres of the crop's corner pixels."""
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * (size_px - 1.0)
    corners = corners @ crop_to_samples[:, :2].T + crop_to_samples[:, 2]
    x0, y0 = (max(math.floor(v), 0) for v in corners.min(0))
    x1, y1 = (min(math.ceil(v) + 1, n) for v, n in zip(corners.max(0), (width, height), strict=True))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _samples_to_filtered(crop_to_samples: Matrix23, rect: Rect, kx: int, ky: int) -> Matrix23:
    """Return the map from samples of `rect` (its own corner the origin) to samples of D."""
    to_crop = np.linalg.inv(np.vstack([crop_to_samples, [0, 0, 1]]))[:2]
    from_rect = np.array([[1.0, 0, rect[0]], [0, 1, rect[1]]])
    to_filtered = np.array([[kx, 0, (kx - 1) / 2], [0, ky, (ky - 1) / 2]])
    return compose_affine(to_filtered, compose_affine(to_crop, from_rect))


def _code_max(layout: PixelLayout) -> int:
    """Return the largest code, as it is stored."""
    return (2**layout.bit_depth - 1) << layout.shift


def _filter_matrix_ref(size: int, step: float) -> tuple[FloatArray, int]:
    """Return the formula's second or third line along one axis as a [k * size, size] matrix, and k."""
    if step < 1:
        k = enlarge_factor(step)
        position = (np.arange(k * size) + 0.5) / k - 0.5
        return _cubic(position[:, None] - np.arange(size)), k
    offsets = np.arange(-size, size + 1)
    total = np.maximum(0, 1 - np.abs(offsets) / step).sum()
    matrix = np.maximum(0, 1 - np.abs(np.arange(size)[:, None] - np.arange(size)) / step) / total
    matrix[[0, -1]] = 0  # as the delta's own rim
    return matrix.astype(np.float32), 1


def _add_ref(plane: Plane, codes: FloatArray, matrix: Matrix23, rect: Rect, layout: PixelLayout) -> None:
    """Add to `rect` of a plane with PyTorch, term by term as in the formula."""
    import torch

    size = codes.shape[0]
    step_x, step_y = _plane_steps(matrix)
    (filter_x, kx), (filter_y, ky) = _filter_matrix_ref(size, step_x), _filter_matrix_ref(size, step_y)
    factors = (torch.from_numpy(np.ascontiguousarray(a)).double() for a in (filter_y, filter_x, codes))
    filtered = torch.einsum("iy,jx,yxc->cij", *factors)
    m = torch.from_numpy(_samples_to_filtered(matrix, rect, kx, ky))
    x0, y0, x1, y1 = rect
    y, x = torch.meshgrid(torch.arange(y1 - y0).double(), torch.arange(x1 - x0).double(), indexing="ij")
    u, v = m[0, 0] * x + m[0, 1] * y + m[0, 2], m[1, 0] * x + m[1, 1] * y + m[1, 2]
    # grid_sample wants -1 and 1 at the centres of the first and the last sample.
    grid = torch.stack([2 * u / (kx * size - 1) - 1, 2 * v / (ky * size - 1) - 1], -1)
    delta = torch.nn.functional.grid_sample(filtered[None], grid[None], padding_mode="zeros", align_corners=True)
    part = plane[y0:y1, x0:x1]
    before = torch.from_numpy(part.astype(np.int64)).reshape(y1 - y0, x1 - x0, -1)
    rounded = delta[0].permute(1, 2, 0).round().long()
    after = (before + rounded * 2**layout.shift).clamp(0, _code_max(layout))
    part[...] = torch.where(rounded == 0, before, after).numpy().reshape(part.shape)


@lru_cache(maxsize=16)
def _enlarge_kernel(k: int) -> tuple[FloatArray, int]:
    """Return Catmull-Rom's kernel for a signal with k - 1 zeros after each sample, and its anchor."""
    anchor = (5 * k - 2) // 2
    return _cubic((np.arange(4 * k) - anchor - 0.5 + k / 2) / k), anchor


def _axis_kernel(size: int, step: float) -> tuple[FloatArray, int, int]:
    """Return the formula's second or third line along one axis as a kernel, its anchor, and k."""
    if step < 1:
        k = enlarge_factor(step)
        return *_enlarge_kernel(k), k
    reach = min(math.ceil(step) - 1, size)
    kernel = np.maximum(0, 1 - np.abs(np.arange(-reach, reach + 1)) / step).astype(np.float32)
    return kernel / kernel.sum(), reach, 1


def _filter_codes(codes: FloatArray, step_x: float, step_y: float) -> tuple[FloatArray, int, int]:
    """Return D of the module's formula, float32 [ky * S, kx * S, C], with kx and ky."""
    size = codes.shape[0]
    kernel_x, anchor_x, kx = _axis_kernel(size, step_x)
    kernel_y, anchor_y, ky = _axis_kernel(size, step_y)
    spread = np.zeros((ky * size, kx * size, codes.shape[2]), np.float32)
    spread[::ky, ::kx] = codes
    border = cv2.BORDER_CONSTANT
    filtered = cv2.sepFilter2D(spread, -1, kernel_x, kernel_y, anchor=(anchor_x, anchor_y), borderType=border)
    # A wide tent reaches over the delta's rim of two; what it leaves on the edge would leak out of the crop.
    if step_x >= 1:
        filtered[:, [0, -1]] = 0
    if step_y >= 1:
        filtered[[0, -1]] = 0
    return filtered, kx, ky


def _add_cpu(plane: Plane, codes: FloatArray, matrix: Matrix23, rect: Rect, layout: PixelLayout) -> None:
    """Add to `rect` of a plane, [H, W] or [H, W, C], the difference `codes`, float32 [S, S, C]."""
    filtered, kx, ky = _filter_codes(codes, *_plane_steps(matrix))
    x0, y0, x1, y1 = rect
    rows = max(1, STRIP_SAMPLES // ((x1 - x0) * codes.shape[2]))
    for top in range(y0, y1, rows):
        bottom = min(top + rows, y1)
        to_filtered = _samples_to_filtered(matrix, (x0, top, x1, bottom), kx, ky)
        delta = warp_samples(filtered, to_filtered, (x1 - x0, bottom - top), cv2.BORDER_CONSTANT)
        _add_rounded(plane[top:bottom, x0:x1], delta, layout)


def _add_rounded(part: Plane, delta: FloatArray, layout: PixelLayout) -> None:
    delta = delta.reshape(part.shape)
    if part.dtype == np.uint8:  # OpenCV rounds half to even, and saturates at 0 and 255
        rounded = cv2.add(delta, 0, dtype=cv2.CV_16S).reshape(part.shape)
        part[...] = cv2.add(part, rounded, dtype=cv2.CV_8U).reshape(part.shape)
        return
    codes = np.rint(delta, out=delta).astype(np.int32)
    after = np.clip(part + (codes << layout.shift), 0, _code_max(layout))
    # Where nothing changes, a sample with stray low bits or above the code range is kept too.
    np.copyto(part, after, where=codes != 0, casting="unsafe")


def _components(codes: FloatArray, spec: PlaneLayout) -> FloatArray:
    """Return those of the three components [S, S, 3] that a plane holds: float32 [S, S, C]."""
    first = {"U": 1, "V": 2}.get(spec.components[0], 0)
    return codes[..., first : first + min(len(spec.components), 3)]


def add_delta(
    frame: Frame,
    delta: FloatArray,
    frame_to_crop: FloatArray,
    *,
    impl: Literal["auto", "ref", "cpu"] = "auto",
) -> Rect | None:
    """Add a face's RGB difference to the frame's planes, in place.

    Args:
        frame: its planes must be writable. Alpha is never touched.
        delta: float32 [3, S, S], RGB in units of [-1, 1] (2 is black to white), already times mask and
            strength, and exactly 0 on the outer two pixels.
        frame_to_crop: float32 [2, 3], frame (luma) pixels to crop pixels; invertible and finite.
        impl: "cpu" is NumPy and OpenCV, "ref" the PyTorch reference; "auto" is "cpu".

    Returns:
        The touched rectangle in luma pixels (x0, y0, x1, y1; x1 and y1 outside), or None if nothing can
        have changed: the crop lies outside the frame, or the delta is all zero.

    Raises:
        ShapeError: if a shape differs from the above.
    """
    size = delta.shape[-1]
    if delta.shape != (3, size, size) or frame_to_crop.shape != (2, 3):
        got = f"{delta.shape} and {frame_to_crop.shape}"
        raise ShapeError(f"expected a delta [3, S, S] and a matrix [2, 3], got {got}")
    if not delta.any():
        return None
    color, layout = color_of(frame), frame.layout
    # OpenCV's transform, not a matrix product: BLAS threads wait for each other longer than this takes.
    codes = cv2.transform(delta.transpose(1, 2, 0), rgb_to_yuv_delta(color, layout.bit_depth))
    add = _add_ref if impl == "ref" else _add_cpu
    touched: list[Rect] = []
    for plane, spec in zip(frame.planes, layout.planes, strict=True):
        matrix = crop_to_plane(frame_to_crop, spec, color.chroma_siting)
        rect = _covered_rect(matrix, size, plane.shape[1], plane.shape[0])
        if rect is None:
            continue
        add(plane[..., :3] if plane.ndim == 3 else plane, _components(codes, spec), matrix, rect, layout)
        x0, y0, x1, y1 = rect
        touched.append((x0 * spec.sub_x, y0 * spec.sub_y, x1 * spec.sub_x, y1 * spec.sub_y))
    if not touched:
        return None
    x0s, y0s, x1s, y1s = zip(*touched, strict=True)
    return min(x0s), min(y0s), min(max(x1s), frame.width), min(max(y1s), frame.height)
