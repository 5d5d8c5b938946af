"""Apply a face's change, a luma gain and an RGB difference, to the native planes of a frame, in place.

In RGB in [-1, 1], with E'Y the luma in [0, 1] of each sample before the change and b = BLACK_OFFSET:

    RGB' = RGB + 2 gain (E'Y + b) (1, 1, 1) + delta

so that without a delta the luma becomes E'Y + gain (E'Y + b): detail that is in the picture is scaled. An equal
addition to R, G and B changes no chroma, so in YUV planes the same map is

    Y' = Y + gain (Y - black + b span) + deltaY,       C' = C + deltaC

with black the code of E'Y = 0, and span the number of codes from E'Y = 0 to 1. A change that is meant for dark samples
is multiplied, in planes that have the luma (Y and packed RGB), by clip((none - E'Y) / (none - whole), 0, 1).

For each plane, with p = crop pixels per plane sample along the crop's x, in sixteenths from 1 on, and likewise along
its y:

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
Bytes moved: the crop's rectangle of each plane, read and written once. The CPU keeps D with the change: a video's next
frame has the face elsewhere, but mostly the same p. A change that was drawn on a device is used there; one of arrays
goes to the device of its frames once.
Tolerance: the implementations round differently only at ties, so they differ by at most 1 code.
Reference: Keys, "Cubic convolution interpolation", IEEE TASSP 1981, eq. 15 (a = -1/2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from typing import TYPE_CHECKING, Literal, cast

import cv2
import numpy as np
import numpy.typing as npt

from faceage.errors import ShapeError
from faceage.kernels import maps
from faceage.kernels.color import RGB_LUMA, color_of, luma_codes, rgb_to_yuv_delta
from faceage.kernels.gather import warp_samples
from faceage.kernels.implementation import Implementation, choose_implementation
from faceage.kernels.placement import Matrix23, compose_affine, crop_to_plane, invert_affine
from faceage.kernels.streams import await_samples, samples_changed
from faceage.kernels.transfer import as_tensor, beside, to_device
from faceage.types import (
    Change,
    Dark,
    FloatArray,
    Frame,
    HostPlane,
    PixelLayout,
    Plane,
    PlaneLayout,
    Rect,
    Samples,
    enclosing,
)

if TYPE_CHECKING:
    import torch

BLACK_OFFSET = 0.04
"""b of the module's formula, in units of E'Y: even black gains a little, and dark noise is not scaled to nothing."""

MAX_ENLARGE = 4
"""Largest k: bilinear sampling of D errs by at most 1 / (8 k^2) < 1 % of the change's second derivative."""

STEPS_PER_PX = 16
"""A tent whose half-width differs by less than a sixteenth of a crop pixel gives the same picture."""

STRIP_SAMPLES = 65536
"""Samples changed at a time: the float32 strip (256 KiB) stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One of the changes that are mixed in a plane, in codes."""

    delta: Samples
    """float32 [H', W', C], codes: the part of the crop in which anything changes; where the plane lives."""
    gain: Samples | None
    """float32 [H', W']; None for chroma, and where luma is not scaled."""
    share: float
    """In the mixture, in [0, 1]."""
    kept: dict
    """What `_filter_layer` made of the change, of each kind of plane, filter and part."""


@dataclass(frozen=True, kw_only=True)
class PlaneChange:
    """The change of one plane, in codes."""

    plane: Plane
    """[H, W] or [H, W, C], without alpha."""
    components: str
    """As `PlaneLayout.components`."""
    layout: PixelLayout
    part: Rect
    """The part of the crop in which anything changes."""
    matrix: Matrix23
    """Pixels of that part to samples of the plane."""
    layers: tuple[Layer, ...]
    """On the CPU one or two; else they are mixed already."""
    weight: float
    """Share of the change, in [0, 1]."""
    black: float
    span: float
    """Codes of E'Y = 0, and of the range of E'Y."""
    dark: Dark | None
    """`Change.dark`; None for chroma."""

    @property
    def delta(self) -> Samples:
        """The delta, where there is one layer."""
        return self.layers[0].delta

    @property
    def gain(self) -> Samples | None:
        """The gain, where there is one layer."""
        return self.layers[0].gain


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
    """Return p of the module's formula along the crop's x and y: how far one plane sample reaches, in crop pixels."""
    (a, b, _), (c, d, _) = crop_to_samples.tolist()
    size = abs(a * d - b * c)
    steps = math.hypot(d, b) / size, math.hypot(c, a) / size
    step_x, step_y = (step if step < 1 else round(STEPS_PER_PX * step) / STEPS_PER_PX for step in steps)
    return step_x, step_y


def _changing_part(change: Change) -> Rect | None:
    """Return the pixels of the crop outside which the change is 0; None if it is 0 everywhere.

    Of a change on a device it is what the change itself says: nobody waits for the device to know more.
    """
    size = change.size_px
    if change.part is not None:
        x0, y0, x1, y1 = change.part
        return change.part if x0 < x1 and y0 < y1 else None
    if (
        not isinstance(change.delta, np.ndarray)
        or change.delta.any()
        or (change.gain is not None and change.gain.any())
    ):
        return 0, 0, size, size
    return None


@dataclass(frozen=True, kw_only=True)
class _Codes:
    """A change in the codes of a kind of frames, where those live."""

    delta: Samples
    """float32 [S, S, 3], in the order of the frame's components; each component lies by itself."""
    gain: Samples | None
    changing: Rect
    """The pixels of the crop outside which it is 0."""


def _in_codes(change: Change, frame: Frame) -> _Codes | None:
    """Return a change in codes; None if it changes nothing."""
    changing = _changing_part(change)
    if changing is None:
        return None
    matrix = rgb_to_yuv_delta(color_of(frame), frame.layout.bit_depth)
    if not frame.is_array:
        return _in_codes_on_device(change, changing, matrix, frame.device)
    x0, y0, x1, y1 = changing
    inner = slice(y0, y1), slice(x0, x1)
    rgb = cv2.merge([plane[inner] for plane in change.delta])
    codes = np.zeros_like(change.delta)
    for component, weights in zip(codes, matrix, strict=True):
        # OpenCV's transform, not a matrix product: BLAS threads wait for each other longer than this takes.
        component[inner] = cv2.transform(rgb, weights[None])
    gain = change.gain
    return _Codes(
        delta=codes.transpose(1, 2, 0),
        gain=gain if gain is not None and gain[inner].any() else None,
        changing=changing,
    )


def _in_codes_on_device(change: Change, changing: Rect, matrix: npt.NDArray[np.float64], device: str) -> _Codes:
    """Do so with tensors."""

    def there(part: Samples) -> torch.Tensor:
        return to_device(part, device) if isinstance(part, np.ndarray) else part.contiguous()

    delta, gain = there(change.delta), None if change.gain is None else there(change.gain)
    codes = to_device(matrix.astype(np.float32), device) @ delta.flatten(1)
    return _Codes(delta=codes.reshape(delta.shape).permute(1, 2, 0), gain=gain, changing=changing)


def _grown(part: Rect, crop_to_samples: Matrix23, size_px: int) -> Rect:
    """Return a part of the crop with what the filters of a plane reach beyond it."""
    margins = [2 + math.ceil(step) for step in plane_steps(crop_to_samples)] * 2
    x0, y0, x1, y1 = (edge + sign * by for edge, sign, by in zip(part, (-1, -1, 1, 1), margins, strict=True))
    return max(x0, 0), max(y0, 0), min(x1, size_px), min(y1, size_px)


def _covered_rect(crop_to_samples: Matrix23, shape: tuple[int, int], width: int, height: int) -> Rect | None:
    """Return the samples of a plane that can change: between the centres of the corner pixels of maps [H', W']."""
    (a, b, left), (c, d, top) = crop_to_samples.tolist()
    right, bottom = shape[1] - 1.0, shape[0] - 1.0
    xs = [left + a * x + b * y for x in (0, right) for y in (0, bottom)]
    ys = [top + c * x + d * y for x in (0, right) for y in (0, bottom)]
    x0, y0 = max(math.floor(min(xs)), 0), max(math.floor(min(ys)), 0)
    x1, y1 = min(math.ceil(max(xs)) + 1, width), min(math.ceil(max(ys)) + 1, height)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def samples_to_filtered(crop_to_samples: Matrix23, rect: Rect, kx: int, ky: int) -> Matrix23:
    """Return the map from samples of `rect` (its own corner the origin) to samples of D."""
    to_crop = invert_affine(crop_to_samples)
    from_rect = np.array([[1.0, 0, rect[0]], [0, 1, rect[1]]])
    to_filtered = np.array([[kx, 0, (kx - 1) / 2], [0, ky, (ky - 1) / 2]])
    return compose_affine(to_filtered, compose_affine(to_crop, from_rect))


def code_max(layout: PixelLayout) -> int:
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
    matrix[[0, -1]] = 0  # as the change's own rim
    return matrix.astype(np.float32), 1


def _sample_ref(maps: Samples, matrix: Matrix23, rect: Rect, device: torch.device) -> torch.Tensor:
    """Return the maps [H', W', C] at the samples of `rect`: float64 [H, W, C]."""
    import torch

    height, width = maps.shape[:2]
    step_x, step_y = plane_steps(matrix)
    (filter_x, kx), (filter_y, ky) = _filter_matrix_ref(width, step_x), _filter_matrix_ref(height, step_y)
    along_y, along_x = (to_device(a, device).double() for a in (filter_y, filter_x))
    values = as_tensor(maps).double()
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
    rounded = (part.weight * change).round().long()
    after = (before + rounded * 2**layout.shift).clamp(0, code_max(layout))
    samples.copy_(torch.where(rounded == 0, before, after).reshape(samples.shape))


@lru_cache(maxsize=16)
def _enlarging_kernels(k: int) -> tuple[FloatArray, ...]:
    """Return Catmull-Rom's weights of five pixels for each of the k samples of D in the middle one, float32 [5]."""
    return tuple(_cubic(np.arange(-2.0, 3) - ((phase + 0.5) / k - 0.5)) for phase in range(k))


def _filter_axis(maps: FloatArray, axis: int, step: float) -> FloatArray:
    """Filter a map [H', W'] along one axis: the formula's second or third line."""
    size = maps.shape[axis]

    def correlate(kernel: FloatArray) -> FloatArray:
        kernel = kernel.reshape((-1, 1) if axis == 0 else (1, -1))
        return cv2.filter2D(maps, -1, kernel, borderType=cv2.BORDER_CONSTANT)

    if step < 1:
        k = enlarge_factor(step)
        if k == 1:
            return maps  # Catmull-Rom's weights of a pixel at its own place
        parts = [correlate(kernel) for kernel in _enlarging_kernels(k)]
        if axis == 1:
            return cv2.merge(parts).reshape(maps.shape[0], k * size)
        return np.stack(parts, 1).reshape(k * size, maps.shape[1])
    reach = min(math.ceil(step) - 1, size)
    kernel = np.maximum(0, 1 - np.abs(np.arange(-reach, reach + 1)) / step).astype(np.float32)
    filtered = correlate(kernel / kernel.sum()) if reach else maps.copy()
    # A wide tent reaches over the change's rim of two; what it leaves on the edge would leak out of the crop.
    filtered[[0, -1] if axis == 0 else (slice(None), [0, -1])] = 0
    return filtered


def _filter_maps(maps: FloatArray, step_x: float, step_y: float) -> FloatArray:
    """Return D of the module's formula of one map [H', W']: float32 [ky * H', kx * W']."""
    return _filter_axis(_filter_axis(maps, 1, step_x), 0, step_y)


def _filter_layer(layer: Layer, part: PlaneChange, steps: tuple[float, float]) -> tuple[FloatArray, FloatArray | None]:
    """Return D of a plane's delta, float32 [ky * H', kx * W'(, C)], and of its gain."""
    delta, relative = cast(FloatArray, layer.delta), cast("FloatArray | None", layer.gain)
    maps = [delta[..., component] for component in range(delta.shape[2])]
    if relative is None:
        gain = None
    else:
        # gain (Y - black + b span) + delta = gain Y + (delta + gain (b span - black)): sampling is linear.
        maps = [cv2.scaleAdd(relative, BLACK_OFFSET * part.span - part.black, each) for each in maps]
        gain = _filter_maps(relative * np.float32(2.0**-part.layout.shift), *steps)
    filtered = [_filter_maps(each, *steps) for each in maps]
    return filtered[0] if len(filtered) == 1 else cv2.merge(filtered), gain


def _mixed(
    filtered: Sequence[tuple[FloatArray, FloatArray | None]], shares: Sequence[float]
) -> tuple[FloatArray, FloatArray | None]:
    """Return the sums of what `_filter_layer` returned for layers, times their shares."""

    def mix(maps: Sequence[FloatArray | None]) -> FloatArray | None:
        weighed = [(each, share) for each, share in zip(maps, shares, strict=True) if each is not None]
        if len(weighed) == 2:
            (a, of_a), (b, of_b) = weighed
            return cv2.addWeighted(a, of_a, b, of_b, 0)
        return weighed[0][0] * np.float32(weighed[0][1]) if weighed else None

    if shares == [1]:
        return filtered[0]
    deltas, gains = zip(*filtered, strict=True)
    return cast(FloatArray, mix(deltas)), mix(gains)


def _change_cpu(part: PlaneChange, rect: Rect) -> None:
    """Change `rect` of a plane with OpenCV, a strip at a time."""
    layout, matrix = part.layout, part.matrix
    plane = cast(HostPlane, part.plane)
    steps = plane_steps(matrix)
    kx, ky = (enlarge_factor(step) if step < 1 else 1 for step in steps)
    how = part.components, kx, max(steps[0], 1.0), ky, max(steps[1], 1.0), part.part
    for layer in part.layers:
        if how not in layer.kept:
            layer.kept[how] = _filter_layer(layer, part, steps)
    deltas, gains = _mixed([layer.kept[how] for layer in part.layers], [layer.share for layer in part.layers])
    x0, y0, x1, y1 = rect
    rows = max(1, STRIP_SAMPLES // ((x1 - x0) * part.delta.shape[2]))
    to_filtered = samples_to_filtered(matrix, rect, kx, ky)
    step = rows * to_filtered[:, 1]
    to_filtered[:, 2] -= step
    for top in range(y0, y1, rows):
        bottom = min(top + rows, y1)
        to_filtered[:, 2] += step
        size = (x1 - x0, bottom - top)
        samples = plane[top:bottom, x0:x1]
        change = warp_samples(deltas, to_filtered, size, cv2.BORDER_CONSTANT).reshape(samples.shape)
        if gains is not None:
            gain = warp_samples(gains, to_filtered, size, cv2.BORDER_CONSTANT)
            change = _with_gain(change, gain, samples, part)
        if part.weight != 1:
            change = cv2.multiply(change, part.weight, dst=change)
        _add_rounded(samples, change, layout)


def _with_gain(change: FloatArray, gain: FloatArray, samples: HostPlane, part: PlaneChange) -> FloatArray:
    """Return the change of samples [H, W] or [H, W, 3] with that of the luma added, the share of it that they take."""
    luma = samples.astype(np.float32)
    if samples.ndim == 3:
        luma = cv2.transform(luma, RGB_LUMA[None]).reshape(gain.shape)
    change = cv2.add(change, _spread(cv2.multiply(gain, luma, dst=gain), samples), dst=change)
    if part.dark is not None:
        change = cv2.multiply(change, _spread(_dark_share(luma, part), samples), dst=change)
    return change


def _dark_share(luma: FloatArray, part: PlaneChange) -> FloatArray:
    """Return the share of the change that samples [H, W] of a luma in stored codes take."""
    assert part.dark is not None
    whole, none = (part.black + part.span * cast(float, limit) for limit in part.dark)
    per_code = 2.0**-part.layout.shift / (none - whole)
    share = cv2.addWeighted(luma, -per_code, luma, 0, none / (none - whole))
    return cv2.min(cv2.max(share, 0), 1)


def _spread(values: FloatArray, samples: HostPlane) -> FloatArray:
    """Return one value a sample [H, W] for each of its components."""
    return cast(FloatArray, cv2.cvtColor(values, cv2.COLOR_GRAY2RGB)) if samples.ndim == 3 else values


def _add_rounded(part: HostPlane, change: FloatArray, layout: PixelLayout) -> None:
    if part.dtype == np.uint8:  # OpenCV rounds half to even, and saturates at 0 and 255
        if part.ndim == 2:
            cv2.add(part, change, dst=part, dtype=cv2.CV_8U)
        else:
            part[...] = cv2.add(part, change, dtype=cv2.CV_8U)
        return
    codes = np.rint(change, out=change).astype(np.int32)
    after = np.clip(part + (codes << layout.shift), 0, code_max(layout))
    # Where nothing changes, a sample with stray low bits or above the code range is kept too.
    np.copyto(part, after, where=codes != 0, casting="unsafe")


def _components(codes: Samples, spec: PlaneLayout) -> Samples:
    """Return those of the three components [S, S, 3] that a plane holds: float32 [S, S, C]."""
    first = {"U": 1, "V": 2}.get(spec.components[0], 0)
    return codes[..., first : first + min(len(spec.components), 3)]


def _known(change: Change, frame: Frame) -> tuple[_Codes | None, dict]:
    """Return a change in the codes of a frame, and what `Layer` keeps of it; both are kept with the change."""
    kind = color_of(frame), frame.pixel_format, None if frame.is_array else frame.device
    if kind not in change.kept:
        change.kept[kind] = _in_codes(change, frame), {}
    return change.kept[kind]


def _mixed_codes(layers: Sequence[tuple[_Codes, dict, float]]) -> tuple[_Codes, dict, float]:
    """Return one layer that does what several do."""
    if [share for _, _, share in layers] == [1]:
        return layers[0]
    gains = [codes.gain * share for codes, _, share in layers if codes.gain is not None]
    mixed = _Codes(
        delta=reduce(add, [codes.delta * share for codes, _, share in layers]),
        gain=reduce(add, gains) if gains else None,
        changing=reduce(enclosing, [codes.changing for codes, _, _ in layers]),
    )
    return mixed, {}, 1.0


def _mixed_dark(mixture: Sequence[tuple[Change, float]]) -> Dark | None:
    """Return `Change.dark` of a mixture; where one has none, it is the other's."""
    limits = [(change.dark, share) for change, share in mixture if change.dark is not None]
    if len(limits) < 2:
        return limits[0][0] if limits else None
    ((whole, none), first), ((other_whole, other_none), second) = limits
    return first * whole + second * other_whole, first * none + second * other_none


def apply_change(
    frame: Frame,
    change: Change,
    frame_to_crop: FloatArray,
    weight: float = 1.0,
    *,
    following: Change | None = None,
    share: float = 0.0,
    impl: Literal["auto"] | Implementation = "auto",
) -> Rect | None:
    """Apply a face's change to the frame's planes, in place.

    Args:
        frame: its planes must be writable. Alpha is never touched.
        change: in the pixels of the crop, already times the mask, exactly 0 on the outer two pixels; it may not be
            changed afterwards. Arrays, or tensors on the frame's device. A gain of None costs nothing.
        frame_to_crop: float32 [2, 3], frame (luma) pixels to crop pixels; invertible and finite.
        weight: the share of the change, in [0, 1].
        following: another change of the same kind and side, with which it is mixed: what it turns into.
        share: of that one in the mixture, in [0, 1].
        impl: "cpu" is NumPy and OpenCV, for arrays; "ref" the PyTorch reference; "triton" a kernel, for tensors on a
            GPU; "auto" what fits the frames.

    Returns:
        The touched rectangle in luma pixels as they are stored (x0, y0, x1, y1; x1 and y1 outside), or None if nothing
        can have changed: the crop lies outside the frame, or the change is of arrays and all zero.

    Raises:
        ShapeError: if the matrix has another shape than the above.
    """
    if frame_to_crop.shape != (2, 3):
        raise ShapeError(f"expected a matrix [2, 3], got {frame_to_crop.shape}")
    color, layout = color_of(frame), frame.layout
    chosen = choose_implementation(frame, impl)
    mixture = [(change, 1 - share)] if following is None else [(change, 1 - share), (following, share)]
    known = [(_known(each, frame), part) for each, part in mixture if part]
    layers = [(codes, kept, part) for (codes, kept), part in known if codes is not None]
    if not layers or not weight:
        return None
    if chosen != "cpu":
        layers = [_mixed_codes(layers)]
    changing, dark = reduce(enclosing, [codes.changing for codes, _, _ in layers]), _mixed_dark(mixture)
    has_gain = any(codes.gain is not None for codes, _, _ in layers)
    black, span = luma_codes(color, layout.bit_depth)
    parts: list[tuple[PlaneChange, Rect]] = []
    touched: list[Rect] = []
    for plane, spec in zip(frame.planes, layout.planes, strict=True):
        matrix = crop_to_plane(frame, spec, frame_to_crop)
        grown = left, top, right, bottom = _grown(changing, matrix, change.size_px)
        inner = slice(top, bottom), slice(left, right)
        matrix = compose_affine(matrix, np.array([[1.0, 0, left], [0, 1, top]]))
        rect = _covered_rect(matrix, (bottom - top, right - left), plane.shape[1], plane.shape[0])
        if rect is None:
            continue
        has_luma = spec.components[0] in "YR"
        part = PlaneChange(
            plane=plane[..., :3] if plane.ndim == 3 else plane,
            components=spec.components,
            layout=layout,
            part=grown,
            matrix=matrix,
            layers=tuple(
                Layer(
                    delta=_components(codes.delta, spec)[inner],
                    gain=codes.gain[inner] if codes.gain is not None and has_luma else None,
                    share=part,
                    kept=kept,
                )
                for codes, kept, part in layers
            ),
            weight=weight,
            black=black,
            span=span,
            dark=dark if has_gain and has_luma else None,
        )
        parts.append((part, rect))
        x0, y0, x1, y1 = rect
        touched.append((x0 * spec.sub_x, y0 * spec.sub_y, x1 * spec.sub_x, y1 * spec.sub_y))
    if not parts:
        return None
    await_samples([frame])
    if chosen == "triton":
        from faceage.kernels.apply_change_triton import apply_change_triton

        apply_change_triton(frame, parts)
    else:
        for part, rect in parts:
            if chosen == "ref":
                _change_ref(part, rect)
            else:
                _change_cpu(part, rect)
    samples_changed(frame)
    x0s, y0s, x1s, y1s = zip(*touched, strict=True)
    height, width = frame.planes[0].shape[:2]
    return min(x0s), min(y0s), min(max(x1s), width), min(max(y1s), height)


def change_crop(pixels: Samples, change: Change) -> Samples:
    """Return an RGB crop with its change applied, by the module's first formula, within [-1, 1].

    Args:
        pixels: float32 [3, S, S], RGB in [-1, 1].
        change: of the same side S; of arrays, or where the pixels are.
    """
    after = pixels + beside(pixels, change.delta)
    if change.gain is not None:
        luma = (maps.luma_of_planes(pixels) + 1) / 2
        after += 2 * beside(pixels, change.gain) * (luma + BLACK_OFFSET)
        if change.dark is not None:
            whole, none = change.dark
            after = pixels + (after - pixels) * ((none - luma) / (none - whole)).clip(0, 1)
    return after.clip(-1, 1)
