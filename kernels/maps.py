"""What agers see faces and draw changes with: operations on small maps of a face, where the maps live.

A map is float32 [H, W], or [H, W, C] with few channels: arrays, which OpenCV works on, or tensors of any device, which
PyTorch does. Both compute, with pixel centres at integers:

    remap(m, w)[p]      = bilinear sample of m at w[p], zero outside
    warp(m, a, s)[p]    = bilinear sample of m at a^-1 p
    resize(m, h, w)     = bilinear or bicubic sample of m at ((x + 0.5) W / w - 0.5, (y + 0.5) H / h - 0.5)
    shrink(m, s)        = means of areas, each pixel counted by what of it lies inside
    blur(m, sigma)      = m convolved with a Gaussian that ends at 4 sigma, borders mirrored
    mean_around(m, n)   = mean of n x n pixels
    bilateral(m, ...)   = sum over offsets o of w(o) m[p + o] / sum of w(o), with
                          w(o) = exp(-|o|^2 / 2 sigma^2 - (m[p + o] - m[p])^2 / 2 range^2), borders mirrored
    connected(m, seeds) = the pixels of a mask to which a path of neighbours in it leads from a seed

Tolerance: 1e-5 of the range of m; 1e-4 in `bilateral`, whose weights OpenCV reads from a table. `remap` differs by up
to 1/64 of the difference of neighbouring pixels where a map has not 1 or 3 channels: OpenCV then rounds positions to
1/32 of a pixel. Of tensors, `connected` follows paths with up to `TURNS` turns.

A number that is computed from a map stays where the map lives, as a tensor without dimensions (`Number`). Nothing here
waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, TypeGuard, Union

import cv2
import numpy as np

from faceage.kernels.color import RGB_LUMA
from faceage.kernels.streams import settle
from faceage.kernels.transfer import as_tensor, beside, to_device
from faceage.types import FloatArray, Samples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Number = Union[float, "Tensor"]
"""One value: of arrays a float, of tensors a tensor without dimensions."""

TURNS = 8
"""Of the hair of 32 heads in photos and on a street, all is reached after 4."""


def namespace(values: Samples | Number) -> ModuleType:
    """Return the library of values, NumPy or PyTorch, for functions that both have under one name."""
    if not _is_tensor(values):
        return np
    import torch

    return torch


def _is_tensor(values: Samples | Number) -> TypeGuard[Tensor]:
    return not isinstance(values, np.ndarray | np.generic | float)


def remap(maps: Samples, where: Samples) -> Samples:
    """Return maps [H, W(, C)] read at positions `where` [H', W', 2], x and y in their pixels: [H', W'(, C)]."""
    if isinstance(maps, np.ndarray):
        return cv2.remap(maps, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    import torch

    height, width = maps.shape[:2]
    grid = torch.stack([2 * where[..., 0] / (width - 1) - 1, 2 * where[..., 1] / (height - 1) - 1], -1)
    read = torch.nn.functional.grid_sample(_channels_first(maps), grid[None], padding_mode="zeros", align_corners=True)
    return _channels_last(read, maps)


def warp(maps: Samples, matrix: FloatArray, size_px: int, *, is_replicated: bool = False) -> Samples:
    """Return maps [H, W(, C)] moved into a square by an affine map [2, 3]: [S, S(, C)].

    Outside of the maps there are zeros, or their rims where `is_replicated`.
    """
    if isinstance(maps, np.ndarray):
        border = cv2.BORDER_REPLICATE if is_replicated else cv2.BORDER_CONSTANT
        return cv2.warpAffine(maps, matrix, (size_px, size_px), borderMode=border)
    import torch

    # affine_grid and grid_sample have the centres of the first and the last pixel at -1 and 1.
    height, width = maps.shape[:2]
    from_unit = np.diag([(size_px - 1) / 2] * 2 + [1.0]) + np.array([[0, 0, (size_px - 1) / 2]] * 2 + [[0, 0, 0]])
    to_unit = np.array([[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1]])
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]).astype(np.float64))
    theta = to_device((to_unit @ inverse @ from_unit).astype(np.float32)[None], maps.device)
    grid = torch.nn.functional.affine_grid(theta, [1, 1, size_px, size_px], align_corners=True)
    padding = "border" if is_replicated else "zeros"
    read = torch.nn.functional.grid_sample(_channels_first(maps), grid, padding_mode=padding, align_corners=True)
    return _channels_last(read, maps)


def resize(maps: Samples, height: int, width: int, *, is_cubic: bool = False) -> Samples:
    """Return maps [H, W(, C)] in another size, by a bilinear filter or by a cubic one with a = -0.75."""
    if isinstance(maps, np.ndarray):
        return cv2.resize(maps, (width, height), interpolation=cv2.INTER_CUBIC if is_cubic else cv2.INTER_LINEAR)
    import torch

    mode = "bicubic" if is_cubic else "bilinear"
    return _channels_last(torch.nn.functional.interpolate(_channels_first(maps), (height, width), mode=mode), maps)


def shrink(maps: Samples, size_px: int) -> Samples:
    """Return square maps [S, S(, C)] at a smaller side, by area."""
    if isinstance(maps, np.ndarray):
        return cv2.resize(maps, (size_px, size_px), interpolation=cv2.INTER_AREA)
    import torch

    side = maps.shape[0]
    planes = _channels_first(maps)
    if side % size_px == 0:
        return _channels_last(torch.nn.functional.avg_pool2d(planes, side // size_px), maps)
    weights = constant(_area_weights, side, size_px, like=maps)
    return _channels_last(weights @ planes @ weights.T, maps)


def _area_weights(side_px: int, size_px: int) -> FloatArray:
    """Return what share of each of `size_px` pixels a pixel of a row of `side_px` takes: [size_px, side_px]."""
    edges = np.arange(size_px + 1) * side_px / size_px
    pixels = np.arange(side_px)
    inside = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (inside.clip(min=0) * size_px / side_px).astype(np.float32)


def halve(maps: Samples) -> Samples:
    """Return maps of even sides at half of them."""
    if isinstance(maps, np.ndarray):
        return cv2.resize(maps, (maps.shape[1] // 2, maps.shape[0] // 2), interpolation=cv2.INTER_AREA)
    import torch

    return _channels_last(torch.nn.functional.avg_pool2d(_channels_first(maps), 2), maps)


def blur(maps: Samples, sigma: float) -> Samples:
    """Return maps blurred by a Gaussian of deviation `sigma` in pixels."""
    if isinstance(maps, np.ndarray):
        return cv2.GaussianBlur(maps, (0, 0), sigma)
    reach = _reach(sigma)
    return _convolve(maps, constant(cv2.getGaussianKernel, 2 * reach + 1, sigma, cv2.CV_32F, like=maps).flatten())


def blur_within(maps: Samples, sigma: Number, least: float, most: float) -> Samples:
    """Return maps blurred by a Gaussian of deviation `sigma`, at most `most`; as they are if it is at most `least`."""
    if isinstance(sigma, float):
        return blur(maps, sigma) if sigma > least else maps
    import torch

    offsets = as_tensor(constant(_places, -_reach(most), _reach(most) + 1, like=sigma))
    sigma = sigma.where(sigma > least, 1e-3)  # then all weight is in the middle
    weights = torch.exp(-(offsets**2) / (2 * sigma**2)) * (offsets.abs() <= ((8 * sigma + 1).round() / 2).floor())
    return _convolve(maps, weights / weights.sum())


def _reach(sigma: float) -> int:
    return round(8 * sigma + 1) // 2  # OpenCV's choice


def _places(first: int, end: int) -> FloatArray:
    return np.arange(first, end, dtype=np.float32)


def _convolve(maps: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Return maps convolved with a kernel [K] along x and along y; K is odd, borders are mirrored."""
    import torch

    planes = _channels_first(maps).transpose(0, 1)  # [C, 1, H, W]
    padded = torch.nn.functional.pad(planes, (len(kernel) // 2,) * 4, mode="reflect")
    along_x = torch.nn.functional.conv2d(padded, kernel[None, None, None, :])
    return _channels_last(torch.nn.functional.conv2d(along_x, kernel[None, None, :, None]).transpose(0, 1), maps)


def mean_around(maps: Samples, side_px: int, *, is_replicated: bool = False) -> Samples:
    """Return the mean of the square around each pixel of a map [H, W]; its side is odd.

    Beyond its borders the map is mirrored, or goes on as its rims where `is_replicated`.
    """
    if isinstance(maps, np.ndarray):
        border = cv2.BORDER_REPLICATE if is_replicated else cv2.BORDER_DEFAULT
        return cv2.blur(maps, (side_px, side_px), borderType=border)
    import torch

    mode = "replicate" if is_replicated else "reflect"
    padded = torch.nn.functional.pad(maps[None, None], (side_px // 2,) * 4, mode=mode)
    along_x = torch.nn.functional.avg_pool2d(padded, (1, side_px), 1)
    return torch.nn.functional.avg_pool2d(along_x, (side_px, 1), 1)[0, 0]


def bilateral(maps: Samples, diameter_px: int, value_range: float, sigma: float) -> Samples:
    """Return a map [H, W] whose small steps are smoothed, up to about `value_range`, over a disc of odd diameter.

    A diameter of -1 stands for one of about 3 sigma.
    """
    if isinstance(maps, np.ndarray):
        return cv2.bilateralFilter(maps, diameter_px, value_range, sigma)
    import torch

    radius = diameter_px // 2 if diameter_px > 0 else max(round(1.5 * sigma), 1)  # OpenCV's choice
    padded = torch.nn.functional.pad(maps[None, None], (radius,) * 4, mode="reflect")
    around = torch.nn.functional.unfold(padded, 2 * radius + 1)[0]  # [D D, H W]
    steps = around - maps.reshape(1, -1)
    weights = torch.exp(steps**2 * (-0.5 / value_range**2)) * constant(_disc, radius, sigma, like=maps)
    return ((weights * around).sum(0) / weights.sum(0)).reshape(maps.shape)


def _disc(radius: int, sigma: float) -> FloatArray:
    """Return a Gaussian's weights inside a disc: [D D, 1], 0 outside."""
    offsets = _places(-radius, radius + 1)
    squares = offsets[:, None] ** 2 + offsets**2
    return (np.exp(squares * (-0.5 / sigma**2)) * (squares <= radius**2)).reshape(-1, 1).astype(np.float32)


def dilate(maps: Samples, side_px: int) -> Samples:
    """Return the largest value in the square around each pixel of a map [H, W]; its side is odd."""
    if isinstance(maps, np.ndarray):
        return cv2.dilate(maps, np.ones((side_px, side_px), np.uint8))
    import torch

    return torch.nn.functional.max_pool2d(maps[None, None], side_px, 1, side_px // 2)[0, 0]


def erode(maps: Samples, side_px: int) -> Samples:
    """Return the smallest value in the square around each pixel of a map [H, W]; its side is odd."""
    if isinstance(maps, np.ndarray):
        return cv2.erode(maps, np.ones((side_px, side_px), np.uint8))
    return -dilate(-maps, side_px)


def connected(mask: Samples, seeds: Samples) -> Samples:
    """Return the pixels of a mask that are connected to a seed in it, also diagonally.

    Args:
        mask: float32 [H, W], 0 and 1.
        seeds: bool [H, W].
    """
    if isinstance(mask, np.ndarray):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8))
        own = np.zeros(count, np.float32)
        own[labels[seeds]] = 1
        own[0] = 0
        return own[labels]
    reached = mask * seeds
    for _ in range(TURNS):
        for axis in (0, 1):
            reached = _run_along(reached, mask, axis)
        reached = dilate(reached, 3) * mask
    return reached


def _run_along(reached: torch.Tensor, mask: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the pixels of a mask to which a straight path in it leads from a pixel that was reached."""
    import torch

    size = mask.shape[axis]
    places = as_tensor(constant(_places, 0, size, like=mask)).reshape((-1, 1) if axis == 0 else (1, -1))
    nowhere = torch.full_like(mask, -1)
    ways = []
    for is_reversed in (False, True):
        a, m = (each.flip(axis) if is_reversed else each for each in (reached, mask))
        last, gap = ((places.where(each > 0, nowhere)).cummax(axis).values for each in (a, 1 - m))
        ways.append((last > gap).flip(axis) if is_reversed else last > gap)
    return (ways[0] | ways[1]).to(mask.dtype)


def exp(maps: Samples) -> Samples:
    """Return e to the power of each value."""
    return cv2.exp(maps) if isinstance(maps, np.ndarray) else maps.exp()


def channel(maps: Samples, number: int) -> Samples:
    """Return a copy of one channel of maps [H, W, C]: [H, W]."""
    return cv2.extractChannel(maps, number) if isinstance(maps, np.ndarray) else maps[..., number].clone()


def channels(maps: Samples) -> Sequence[Samples]:
    """Return copies of the channels of maps [H, W, C], [H, W] each; of tensors, views."""
    return cv2.split(maps) if isinstance(maps, np.ndarray) else maps.unbind(-1)


def stacked(channels: Sequence[Samples]) -> Samples:
    """Return maps [H, W, C] whose channels are these."""
    return (
        cv2.merge(list(channels)) if isinstance(channels[0], np.ndarray) else namespace(channels[0]).stack(channels, -1)
    )


def transform(maps: Samples, make_matrix: Callable[[], FloatArray]) -> Samples:
    """Return a matrix [D, C] times the channels of each pixel of maps [H, W, C]: [H, W, D]."""
    matrix = constant(make_matrix, like=maps)
    return cv2.transform(maps, matrix) if isinstance(maps, np.ndarray) else maps @ matrix.T


def times(maps: Samples, factor: Samples) -> Samples:
    """Return each channel of maps [H, W, C] times a map [H, W]."""
    if isinstance(maps, np.ndarray):
        return cv2.multiply(maps, cv2.merge([factor] * maps.shape[2]))
    return maps * factor[..., None]


def luma_of(rgb: Samples) -> Samples:
    """Return the luma of RGB [..., 3]: [...]."""
    weights = constant(_luma_weights, like=rgb)
    return cv2.transform(rgb, weights[None]) if isinstance(rgb, np.ndarray) and rgb.ndim == 3 else rgb @ weights


def luma_of_planes(planes: Samples) -> Samples:
    """Return the luma of RGB [3, H, W]: [H, W]."""
    return namespace(planes).tensordot(constant(_luma_weights, like=planes), planes, 1)


def _luma_weights() -> FloatArray:
    return RGB_LUMA


def mix(before: Samples, after: Samples, share: float) -> Samples:
    """Return (1 - share) * before + share * after."""
    if before is after:
        return before
    if isinstance(before, np.ndarray):
        return cv2.addWeighted(before, 1 - share, after, share, 0)
    return before.lerp(after, share)


def weighted_sum(weights: FloatArray, maps: Samples | Sequence[Samples]) -> Samples:
    """Return the sum of N maps times their weights [N], which are an array."""
    first = maps[0]
    stack = maps if not isinstance(maps, Sequence) else namespace(first).stack(list(maps))
    return namespace(first).tensordot(beside(first, weights), stack, 1)


def clear_rim(planes: Samples) -> Samples:
    """Set the outer two pixels of maps [C, S, S] to 0, in place, and return them."""
    if isinstance(planes, np.ndarray):
        planes[:, :2], planes[:, -2:], planes[:, :, :2], planes[:, :, -2:] = 0, 0, 0, 0
        return planes
    return planes.mul_(constant(_inside_rim, planes.shape[-1], like=planes))


def _inside_rim(size_px: int) -> FloatArray:
    return clear_rim(np.ones((1, size_px, size_px), np.float32))[0]


def by_pixels(planes: Samples) -> Samples:
    """Return planes [C, H, W] as maps [H, W, C] in one piece."""
    return cv2.merge(list(planes)) if isinstance(planes, np.ndarray) else planes.permute(1, 2, 0).contiguous()


def zeros(*shape: int, like: Samples) -> Samples:
    """Return zeros where `like` lives."""
    return np.zeros(shape, np.float32) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def planes_of(maps: Samples) -> Samples:
    """Return a view of maps [H, W, C] as [C, H, W]."""
    return maps.transpose(2, 0, 1) if isinstance(maps, np.ndarray) else maps.permute(2, 0, 1)


def pixels_of(planes: Samples) -> Samples:
    """Return a view of planes [C, H, W] as maps [H, W, C]."""
    return planes.transpose(1, 2, 0) if isinstance(planes, np.ndarray) else planes.permute(1, 2, 0)


def by_planes(maps: Samples) -> Samples:
    """Return maps [H, W, C] as [C, H, W] in one piece."""
    return np.stack(cv2.split(maps)) if isinstance(maps, np.ndarray) else maps.permute(2, 0, 1).contiguous()


def median(maps: Samples) -> Samples:
    """Return the median over the pixels of maps [H, W(, C)], a value or [C]."""
    if isinstance(maps, np.ndarray):
        return median_of(maps.reshape(-1, *maps.shape[2:]))
    return maps.flatten(0, 1).quantile(0.5, 0)


def median_of(values: FloatArray) -> FloatArray:
    """Return the median over an array's first axis. NumPy's own function imports masked arrays, which takes 11 ms."""
    middle = [(len(values) - 1) // 2, len(values) // 2]
    return np.partition(values, middle, 0)[middle].mean(0)


def median_where(maps: Samples, where: Samples) -> Number:
    """Return the median of a map over the pixels where a bool map is true; 0 if that is nowhere."""
    if isinstance(maps, np.ndarray):
        return float(median_of(maps[where])) if where.any() else 0.0
    return maps.where(where, float("nan")).nanquantile(0.5).nan_to_num(0)


def number(value: Samples | np.floating) -> Number:
    """Return one value as a number."""
    return float(value) if isinstance(value, np.ndarray | np.floating) else value


def single(values: Samples | Number) -> Samples:
    """Return values in float32."""
    return values.float() if _is_tensor(values) else np.asarray(values, np.float32)[()]


def limit(value: Number, low: Number, high: float = float("inf")) -> Number:
    """Return a number that is not below `low` and not above `high`."""
    return min(max(value, low), high) if isinstance(value, float) else value.clip(min=low).clip(max=high)


def constant(make: Callable[..., FloatArray], *arguments: int | float, like: Samples) -> Samples:
    """Return what `make` makes of arguments, where `like` lives. On a device it is kept: it goes there once."""
    return make(*arguments) if isinstance(like, np.ndarray) else _constant(make, arguments, str(like.device))


@lru_cache(maxsize=64)
def _constant(make: Callable[..., FloatArray], arguments: tuple[int | float, ...], device: str) -> torch.Tensor:
    # A copy: constants are read-only arrays, of which torch makes no tensors without a warning.
    return settle(to_device(make(*arguments).copy(), device))


def _channels_first(maps: torch.Tensor) -> torch.Tensor:
    """Return maps [H, W(, C)] as [1, C, H, W]."""
    return maps.reshape(*maps.shape[:2], -1).permute(2, 0, 1)[None]


def _channels_last(planes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return planes [1, C, H, W] as maps, [H, W] or [H, W, C] as `like` is."""
    return planes[0, 0] if like.ndim == 2 else planes[0].permute(1, 2, 0)
