"""What agers draw changes with: operations on small maps of a face, where the maps live.

A map is float32 [H, W], or [H, W, C] with few channels: arrays, which OpenCV works on, or tensors of any device, which
PyTorch does. Both compute, with pixel centres at integers:

    remap(m, w)[p]    = bilinear sample of m at w[p], zero outside
    resize(m, h, w)   = bilinear sample of m at ((x + 0.5) W / w - 0.5, (y + 0.5) H / h - 0.5), borders replicated
    halve(m)          = mean of 2 x 2 pixels
    blur(m, sigma)    = m convolved with a Gaussian that ends at 4 sigma, borders mirrored

Tolerance: 1e-5 of the range of m in `resize`, `halve` and `blur`. `remap` differs by up to 1/64 of the difference of
neighbouring pixels where a map has not 1 or 3 channels: OpenCV then rounds positions to 1/32 of a pixel.
Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from faceage.kernels.apply_change import RGB_LUMA
from faceage.kernels.transfer import to_device
from faceage.types import FloatArray, Samples

if TYPE_CHECKING:
    import torch


def remap(maps: Samples, where: Samples) -> Samples:
    """Return maps [H, W(, C)] read at positions `where` [H', W', 2], x and y in their pixels: [H', W'(, C)]."""
    if isinstance(maps, np.ndarray):
        return cv2.remap(maps, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    import torch

    height, width = maps.shape[:2]
    grid = torch.stack([2 * where[..., 0] / (width - 1) - 1, 2 * where[..., 1] / (height - 1) - 1], -1)
    read = torch.nn.functional.grid_sample(_channels_first(maps), grid[None], padding_mode="zeros", align_corners=True)
    return _channels_last(read, maps)


def resize(maps: Samples, height: int, width: int) -> Samples:
    """Return maps [H, W(, C)] in another size."""
    if isinstance(maps, np.ndarray):
        return cv2.resize(maps, (width, height), interpolation=cv2.INTER_LINEAR)
    import torch

    size = (height, width)
    return _channels_last(torch.nn.functional.interpolate(_channels_first(maps), size, mode="bilinear"), maps)


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
    import torch

    reach = round(8 * sigma + 1) // 2  # OpenCV's choice
    kernel = constant(cv2.getGaussianKernel, 2 * reach + 1, sigma, cv2.CV_32F, like=maps).flatten()
    planes = _channels_first(maps).transpose(0, 1)  # [C, 1, H, W]
    padded = torch.nn.functional.pad(planes, (reach,) * 4, mode="reflect")
    along_x = torch.nn.functional.conv2d(padded, kernel[None, None, None, :])
    return _channels_last(torch.nn.functional.conv2d(along_x, kernel[None, None, :, None]).transpose(0, 1), maps)


def exp(maps: Samples) -> Samples:
    """Return e to the power of each value."""
    return cv2.exp(maps) if isinstance(maps, np.ndarray) else maps.exp()


def channel(maps: Samples, number: int) -> Samples:
    """Return a copy of one channel of maps [H, W, C]: [H, W]."""
    return cv2.extractChannel(maps, number) if isinstance(maps, np.ndarray) else maps[..., number].clone()


def transform(maps: Samples, make_matrix: Callable[[], FloatArray]) -> Samples:
    """Return a matrix [D, C] times the channels of each pixel of maps [H, W, C]: [H, W, D]."""
    matrix = constant(make_matrix, like=maps)
    return cv2.transform(maps, matrix) if isinstance(maps, np.ndarray) else maps @ matrix.T


def luma_of(rgb: Samples) -> Samples:
    """Return the luma of RGB [H, W, 3]: [H, W]."""
    return rgb @ constant(_luma_weights, like=rgb)


def _luma_weights() -> FloatArray:
    return RGB_LUMA


def mix(before: Samples, after: Samples, share: float) -> Samples:
    """Return (1 - share) * before + share * after."""
    if before is after:
        return before
    if isinstance(before, np.ndarray):
        return cv2.addWeighted(before, 1 - share, after, share, 0)
    return before.lerp(after, share)


def clear_rim(planes: Samples) -> Samples:
    """Set the outer two pixels of maps [C, S, S] to 0, in place, and return them."""
    if isinstance(planes, np.ndarray):
        planes[:, :2], planes[:, -2:], planes[:, :, :2], planes[:, :, -2:] = 0, 0, 0, 0
        return planes
    return planes.mul_(constant(_inside_rim, planes.shape[-1], like=planes))


def _inside_rim(size_px: int) -> FloatArray:
    return clear_rim(np.ones((1, size_px, size_px), np.float32))[0]


def zeros(*shape: int, like: Samples) -> Samples:
    """Return zeros where `like` lives."""
    return np.zeros(shape, np.float32) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def planes_of(maps: Samples) -> Samples:
    """Return a view of maps [H, W, C] as [C, H, W]."""
    return maps.transpose(2, 0, 1) if isinstance(maps, np.ndarray) else maps.permute(2, 0, 1)


def by_planes(maps: Samples) -> Samples:
    """Return maps [H, W, C] as [C, H, W] in one piece."""
    planes = planes_of(maps)
    return np.ascontiguousarray(planes) if isinstance(planes, np.ndarray) else planes.contiguous()


def constant(make: Callable[..., FloatArray], *arguments: int | float, like: Samples) -> Samples:
    """Return what `make` makes of arguments, where `like` lives. On a device it is kept: it goes there once."""
    return make(*arguments) if isinstance(like, np.ndarray) else _constant(make, arguments, str(like.device))


@lru_cache(maxsize=64)
def _constant(make: Callable[..., FloatArray], arguments: tuple[int | float, ...], device: str) -> torch.Tensor:
    # A copy: constants are read-only arrays, of which torch makes no tensors without a warning.
    return to_device(make(*arguments).copy(), device)


def _channels_first(maps: torch.Tensor) -> torch.Tensor:
    """Return maps [H, W(, C)] as [1, C, H, W]."""
    return maps.reshape(*maps.shape[:2], -1).permute(2, 0, 1)[None]


def _channels_last(planes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return planes [1, C, H, W] as maps, [H, W] or [H, W, C] as `like` is."""
    return planes[0, 0] if like.ndim == 2 else planes[0].permute(1, 2, 0)
