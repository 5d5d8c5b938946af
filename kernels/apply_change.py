"""Apply a face's change, a luma gain and an RGB difference, to the native planes of a frame, in place.

In RGB in [-1, 1], with E'Y the luma in [0, 1] of each sample before the change and b = BLACK_OFFSET:

    RGB' = RGB + 2 gain (E'Y + b) (1, 1, 1) + delta

so that without a delta the luma becomes E'Y + gain (E'Y + b): detail that is in the picture is scaled. An equal
addition to R, G and B changes no chroma, so in YUV planes the same map is

    Y' = Y + gain (Y - black + b span) + deltaY,       C' = C + deltaC

with black the code of E'Y = 0, and span the number of codes from E'Y = 0 to 1. A change that is meant for dark samples
is multiplied, in planes that have the luma (Y and packed RGB), by clip((none - E'Y) / (none - whole), 0, 1).

For each plane, with p = crop pixels per plane sample along the crop's x, and likewise along its y:

    maps     = gain, and rgb_to_yuv_delta @ delta      small: [S, S, C]
    p >= 1   : D = maps filtered by a tent of half-width p   (antialiasing; the identity at p = 1)
    p <  1   : D = maps enlarged k times by Catmull-Rom's cubic, k = clamp(round(1 / p), 1, 4)
    at x     : bilinear sample of D, zero outside, at the crop position of plane sample x
    plane[x] = clip(plane[x] + round(change[x]), 0, 2^n - 1)     round half to even

Catmull-Rom reproduces ramps exactly and is C1, so a 64-pixel change on a 500-pixel face shows no facets; the
bilinear step that follows works on an oversampled signal. Its support of two pixels and the change's zero rim
keep every overshoot inside the crop: samples outside the crop's quadrilateral, and samples whose rounded
change is 0, keep their bits. No dithering: the change comes on top of the original's own grain, and
on a flat, grainless picture its contours are steps of one code, as in any gradient of that bit depth.

Convention: as in `gather`; D's sample i lies at crop pixel (i + 0.5) / k - 0.5. The luma is that of the frame's own
matrix; packed RGB has none and takes Rec. 601's, as JPEG files do.
Bytes moved: the crop's rectangle of each plane, read and written once.
Tolerance: the implementations round differently only at ties, so they differ by at most 1 code.
Reference: Keys, "Cubic convolution interpolation", IEEE TASSP 1981, eq. 15 (a = -1/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast

import cv2
import numpy as np
import numpy.typing as npt

from faceage.errors import ShapeError
from faceage.kernels.color import LUMA_WEIGHTS, color_of, luma_codes, rgb_to_yuv_delta
from faceage.kernels.gather import warp_samples
from faceage.kernels.implementation import Implementation, choose_implementation
from faceage.kernels.placement import Matrix23, compose_affine, crop_to_plane
from faceage.kernels.transfer import as_tensor, to_device
from faceage.types import Change, FloatArray, Frame, HostPlane, PixelLayout, Plane, PlaneLayout

if TYPE_CHECKING:
    import torch

Rect = tuple[int, int, int, int]
"""x0, y0, x1, y1 in samples; x1 and y1 lie outside."""

BLACK_OFFSET = 0.04
"""b of the module's formula, in units of E'Y: even black gains a little, and dark noise is not scaled to nothing."""

MAX_ENLARGE = 4
"""Largest k: bilinear sampling of D errs by at most 1 / (8 k^2) < 1 % of the change's second derivative."""

_KR, _KB = LUMA_WEIGHTS["bt601"]
RGB_LUMA = np.array([_KR, 1 - _KR - _KB, _KB], np.float32)
"""Weights of R, G and B in the luma of packed RGB."""

MAX_PART = 0.8
"""A crop of which less than this changes is cut to what changes: hair is a small part of a head's crop."""

STRIP_SAMPLES = 65536
"""Samples changed at a time: the float32 strip (256 KiB) stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class PlaneChange:
    """The change of one plane, in codes."""

    plane: Plane
    """[H, W] or [H, W, C], without alpha."""
    layout: PixelLayout
    matrix: Matrix23
    """Pixels of that part to samples of the plane."""
    delta: FloatArray
    """float32 [H', W', C], codes: the part of the crop in which anything changes."""
    gain: FloatArray | None
    """float32 [H', W']; None for chroma, and where luma is not scaled."""
    black: float
    span: float
    """Codes of E'Y = 0, and of the range of E'Y."""
    dark: tuple[float, float] | None
    """`Change.dark`; None for chroma."""


def enlarge_factor(crop_px_per_sample: float) -> int:
    """Return k of the module's formula: 1 where the delta is not enlarged."""
    return min(max(1, round(1 / crop_px_per_sample)), MAX_ENLARGE)


def _cubic(x: npt.NDArray[np.float64]) -> FloatArray:
    """Return Catmull-Rom's weights at distances `x` in samples."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0)).astype(np.float32)


def plane_steps(crop_to_samples: Matrix23) -> tuple[float, float]:
    """Return how far one plane sample reaches along the crop's x and y, in crop pixels."""
    step_x, step_y = (math.hypot(*row) for row in np.linalg.inv(crop_to_samples[:, :2]))
    return step_x, step_y


def _changing_part(change: Change) -> Rect:
    """Return the pixels of the crop outside which the change is 0."""
    size = change.size_px
    changes = (change.delta != 0).any(axis=0)
    if change.gain is not None:
        changes |= change.gain != 0
    rows, columns = np.flatnonzero(changes.any(1)), np.flatnonzero(changes.any(0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    is_small = (box[2] - box[0]) * (box[3] - box[1]) < MAX_PART * size * size
    return box if is_small else (0, 0, size, size)


def _grown(part: Rect, crop_to_samples: Matrix23, size_px: int) -> Rect:
    """Return a part of the crop with what the filters of a plane reach beyond it."""
    margins = [2 + math.ceil(step) for step in plane_steps(crop_to_samples)] * 2
    x0, y0, x1, y1 = (edge + sign * by for edge, sign, by in zip(part, (-1, -1, 1, 1), margins, strict=True))
    return max(x0, 0), max(y0, 0), min(x1, size_px), min(y1, size_px)


def _covered_rect(crop_to_samples: Matrix23, shape: tuple[int, int], width: int, height: int) -> Rect | None:
    """Return the samples of a plane that can change: between the centres of the corner pixels of maps [H', W']."""
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * (shape[1] - 1.0, shape[0] - 1.0)
    corners = corners @ crop_to_samples[:, :2].T + crop_to_samples[:, 2]
    x0, y0 = (max(math.floor(v), 0) for v in corners.min(0))
    x1, y1 = (min(math.ceil(v) + 1, n) for v, n in zip(corners.max(0), (width, height), strict=True))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def samples_to_filtered(crop_to_samples: Matrix23, rect: Rect, kx: int, ky: int) -> Matrix23:
    """Return the map from samples of `rect` (its own corner the origin) to samples of D."""
    to_crop = np.linalg.inv(np.vstack([crop_to_samples, [0, 0, 1]]))[:2]
    from_rect = np.array([[1.0, 0, rect[0]], [0, 1, rect[1]]])
    to_filtered = np.array([[kx, 0, (kx - 1) / 2], [0, ky, (ky - 1) / 2]])
    return compose_affine(to_filtered, compose_affine(to_crop, from_rect))


def code_max(layout: PixelLayout) -> int:
    """Return the largest code, as it is stored."""
    return (2**layout.bit_depth - 1) << layout.shift


def share_of_codes(part: PlaneChange) -> tuple[float, float]:
    """Return the share of a change for dark samples at code 0, and how much it falls per code as it is stored."""
    assert part.dark is not None
    whole, none = (part.black + part.span * luma for luma in part.dark)
    return none / (none - whole), 2.0**-part.layout.shift / (none - whole)


def _filter_matrix_ref(size: int, step: float) -> tuple[FloatArray, int]:
    """Return the formula's second or third line along one axis as a [k * size, size] matrix, and k."""
    if step < 1:
        k = enlarge_factor(step)
        position = (np.arange(k * size) + 0.5) / k - 0.5
        return _cubic(position[:, None] - np.arange(size)), k
    offsets = np.arange(-size, size + 1)
    total = np.maximum(0, 1 - np.abs(offsets) / step).sum()
    matrix = np.maximum(0, 1 - np.abs(np.arange(size)[:, None] - np.arange(size)) / step) / total
    matrix[[0, -1]] = 0  # as the change's own rim
    return matrix.astype(np.float32), 1


def _sample_ref(maps: FloatArray, matrix: Matrix23, rect: Rect, device: torch.device) -> torch.Tensor:
    """Return the maps [H', W', C] at the samples of `rect`: float64 [H, W, C]."""
    import torch

    height, width = maps.shape[:2]
    step_x, step_y = plane_steps(matrix)
    (filter_x, kx), (filter_y, ky) = _filter_matrix_ref(width, step_x), _filter_matrix_ref(height, step_y)
    along_y, along_x, values = (to_device(a, device).double() for a in (filter_y, filter_x, maps))
    filtered = along_y @ values.permute(2, 0, 1) @ along_x.T  # one einsum would take the outer product of the filters
    m = samples_to_filtered(matrix, rect, kx, ky).tolist()
    x0, y0, x1, y1 = rect
    rows, columns = (torch.arange(n, device=device).double() for n in (y1 - y0, x1 - x0))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    u, v = m[0][0] * x + m[0][1] * y + m[0][2], m[1][0] * x + m[1][1] * y + m[1][2]
    # grid_sample wants -1 and 1 at the centres of the first and the last sample.
    grid = torch.stack([2 * u / (kx * width - 1) - 1, 2 * v / (ky * height - 1) - 1], -1)
    sampled = torch.nn.functional.grid_sample(filtered[None], grid[None], padding_mode="zeros", align_corners=True)
    return sampled[0].permute(1, 2, 0)


def _change_ref(part: PlaneChange, rect: Rect) -> None:
    """Change `rect` of a plane with PyTorch, term by term as in the formula."""
    import torch

    x0, y0, x1, y1 = rect
    layout, samples = part.layout, as_tensor(part.plane)[y0:y1, x0:x1]
    before = samples.long().reshape(y1 - y0, x1 - x0, -1)
    change = _sample_ref(part.delta, part.matrix, rect, samples.device)
    if part.gain is not None:
        codes = before.double() / 2**layout.shift
        luma = codes @ to_device(RGB_LUMA, samples.device).double() if before.shape[2] == 3 else codes[..., 0]
        gain = _sample_ref(part.gain[..., None], part.matrix, rect, samples.device)
        change = change + gain * (luma - part.black + BLACK_OFFSET * part.span)[..., None]
        if part.dark is not None:
            whole, none = part.dark
            share = (none - (luma - part.black) / part.span) / (none - whole)
            change = change * share.clamp(0, 1)[..., None]
    rounded = change.round().long()
    after = (before + rounded * 2**layout.shift).clamp(0, code_max(layout))
    samples.copy_(torch.where(rounded == 0, before, after).reshape(samples.shape))


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


def _filter_maps(maps: FloatArray, step_x: float, step_y: float) -> tuple[FloatArray, int, int]:
    """Return D of the module's formula, float32 [ky * H', kx * W', C], with kx and ky."""
    height, width = maps.shape[:2]
    kernel_x, anchor_x, kx = _axis_kernel(width, step_x)
    kernel_y, anchor_y, ky = _axis_kernel(height, step_y)
    spread = np.zeros((ky * height, kx * width, *maps.shape[2:]), np.float32)
    spread[::ky, ::kx] = maps
    border = cv2.BORDER_CONSTANT
    filtered = cv2.sepFilter2D(spread, -1, kernel_x, kernel_y, anchor=(anchor_x, anchor_y), borderType=border)
    # A wide tent reaches over the change's rim of two; what it leaves on the edge would leak out of the crop.
    if step_x >= 1:
        filtered[:, [0, -1]] = 0
    if step_y >= 1:
        filtered[[0, -1]] = 0
    return filtered, kx, ky


def _change_cpu(part: PlaneChange, rect: Rect) -> None:
    """Change `rect` of a plane with OpenCV, a strip at a time."""
    layout, matrix = part.layout, part.matrix
    plane = cast(HostPlane, part.plane)
    steps = plane_steps(matrix)
    offsets, gains = part.delta, None
    if part.gain is not None:
        # gain (Y - black + b span) + delta = gain Y + (delta + gain (b span - black)): sampling is linear.
        offsets = offsets + part.gain[..., None] * np.float32(BLACK_OFFSET * part.span - part.black)
        gains = _filter_maps(part.gain * np.float32(2.0**-layout.shift), *steps)[0]
    filtered, kx, ky = _filter_maps(offsets, *steps)
    x0, y0, x1, y1 = rect
    rows = max(1, STRIP_SAMPLES // ((x1 - x0) * offsets.shape[2]))
    at_zero, per_code = (np.float32(v) for v in (share_of_codes(part) if part.dark is not None else (1, 0)))
    to_filtered = samples_to_filtered(matrix, rect, kx, ky)
    step = rows * to_filtered[:, 1]
    to_filtered[:, 2] -= step
    for top in range(y0, y1, rows):
        bottom = min(top + rows, y1)
        to_filtered[:, 2] += step
        size = (x1 - x0, bottom - top)
        samples = plane[top:bottom, x0:x1]
        change = warp_samples(filtered, to_filtered, size, cv2.BORDER_CONSTANT).reshape(samples.shape)
        if gains is not None:
            gain = warp_samples(gains, to_filtered, size, cv2.BORDER_CONSTANT)
            luma = samples.astype(np.float32)
            if samples.ndim == 3:
                luma = cv2.transform(luma, RGB_LUMA[None]).reshape(gain.shape)
            added = cv2.multiply(gain, luma, dst=gain)
            change = cv2.add(change, _spread(added, samples), dst=change)
            if part.dark is not None:
                share = np.clip(at_zero - per_code * luma, 0, 1)
                change = cv2.multiply(change, _spread(share, samples), dst=change)
        _add_rounded(samples, change, layout)


def _spread(values: FloatArray, samples: HostPlane) -> FloatArray:
    """Return one value a sample [H, W] for each of its components."""
    return cast(FloatArray, cv2.cvtColor(values, cv2.COLOR_GRAY2RGB)) if samples.ndim == 3 else values


def _add_rounded(part: HostPlane, change: FloatArray, layout: PixelLayout) -> None:
    if part.dtype == np.uint8:  # OpenCV rounds half to even, and saturates at 0 and 255
        rounded = cv2.add(change, 0, dtype=cv2.CV_16S).reshape(part.shape)
        part[...] = cv2.add(part, rounded, dtype=cv2.CV_8U).reshape(part.shape)
        return
    codes = np.rint(change, out=change).astype(np.int32)
    after = np.clip(part + (codes << layout.shift), 0, code_max(layout))
    # Where nothing changes, a sample with stray low bits or above the code range is kept too.
    np.copyto(part, after, where=codes != 0, casting="unsafe")


def _components(codes: FloatArray, spec: PlaneLayout) -> FloatArray:
    """Return those of the three components [S, S, 3] that a plane holds: float32 [S, S, C]."""
    first = {"U": 1, "V": 2}.get(spec.components[0], 0)
    return codes[..., first : first + min(len(spec.components), 3)]


def apply_change(
    frame: Frame,
    change: Change,
    frame_to_crop: FloatArray,
    *,
    impl: Literal["auto"] | Implementation = "auto",
) -> Rect | None:
    """Apply a face's change to the frame's planes, in place.

    Args:
        frame: its planes must be writable. Alpha is never touched.
        change: in the pixels of the crop, already times mask and strength, exactly 0 on the outer two pixels.
            A gain of None costs nothing.
        frame_to_crop: float32 [2, 3], frame (luma) pixels to crop pixels; invertible and finite.
        impl: "cpu" is NumPy and OpenCV, for arrays; "ref" the PyTorch reference; "triton" a kernel, for tensors on a
            GPU; "auto" what fits the frames.

    Returns:
        The touched rectangle in luma pixels as they are stored (x0, y0, x1, y1; x1 and y1 outside), or None if nothing
        can have changed: the crop lies outside the frame, or the change is all zero.

    Raises:
        ShapeError: if the matrix has another shape than the above.
    """
    if frame_to_crop.shape != (2, 3):
        raise ShapeError(f"expected a matrix [2, 3], got {frame_to_crop.shape}")
    gain = change.gain if change.gain is not None and change.gain.any() else None
    if gain is None and not change.delta.any():
        return None
    color, layout = color_of(frame), frame.layout
    # OpenCV's transform, not a matrix product: BLAS threads wait for each other longer than this takes.
    codes = cv2.transform(cv2.merge(list(change.delta)), rgb_to_yuv_delta(color, layout.bit_depth))
    black, span = luma_codes(color, layout.bit_depth)
    changing = _changing_part(change)
    parts: list[tuple[PlaneChange, Rect]] = []
    touched: list[Rect] = []
    for plane, spec in zip(frame.planes, layout.planes, strict=True):
        matrix = crop_to_plane(frame, spec, frame_to_crop)
        left, top, right, bottom = _grown(changing, matrix, change.size_px)
        inner = slice(top, bottom), slice(left, right)
        matrix = compose_affine(matrix, np.array([[1.0, 0, left], [0, 1, top]]))
        rect = _covered_rect(matrix, (bottom - top, right - left), plane.shape[1], plane.shape[0])
        if rect is None:
            continue
        part = PlaneChange(
            plane=plane[..., :3] if plane.ndim == 3 else plane,
            layout=layout,
            matrix=matrix,
            delta=_components(codes, spec)[inner],
            gain=gain[inner] if gain is not None and spec.components[0] in "YR" else None,
            black=black,
            span=span,
            dark=change.dark if gain is not None and spec.components[0] in "YR" else None,
        )
        parts.append((part, rect))
        x0, y0, x1, y1 = rect
        touched.append((x0 * spec.sub_x, y0 * spec.sub_y, x1 * spec.sub_x, y1 * spec.sub_y))
    if not parts:
        return None
    chosen = choose_implementation(frame, impl)
    if chosen == "triton":
        from faceage.kernels.apply_change_triton import apply_change_triton

        apply_change_triton(frame, parts)
    else:
        for part, rect in parts:
            (_change_ref if chosen == "ref" else _change_cpu)(part, rect)
    x0s, y0s, x1s, y1s = zip(*touched, strict=True)
    height, width = frame.planes[0].shape[:2]
    return min(x0s), min(y0s), min(max(x1s), width), min(max(y1s), height)


def change_crop(pixels: FloatArray, change: Change) -> FloatArray:
    """Return an RGB crop with its change applied, by the module's first formula, within [-1, 1].

    Args:
        pixels: float32 [3, S, S], RGB in [-1, 1].
        change: of the same side S.
    """
    after = pixels + change.delta
    if change.gain is not None:
        luma = (np.einsum("c,chw->hw", RGB_LUMA, pixels) + 1) / 2
        after += 2 * change.gain * (luma + np.float32(BLACK_OFFSET))
        if change.dark is not None:
            whole, none = change.dark
            after = pixels + (after - pixels) * np.clip((none - luma) / (none - whole), 0, 1)
    return np.clip(after, -1, 1, out=after)
