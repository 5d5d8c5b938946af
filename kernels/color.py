"""The affine maps between a frame's native code values and RGB in [-1, 1].

With E'Y in [0, 1] and E'PB, E'PR in [-0.5, 0.5]:

    E'Y  = Kr R + Kg G + Kb B,   E'PB = (B - E'Y) / (2 (1 - Kb)),   E'PR = (R - E'Y) / (2 (1 - Kr))

and n-bit codes, H.273 eqs. 20-31:

    limited   Y = 2^(n-8) (219 E'Y + 16),   C = 2^(n-8) (224 E'P + 128)
    full      Y = (2^n - 1) E'Y,            C = (2^n - 1) E'P + 2^(n-1)

Convention: component order is Y, U (PB), V (PR), or R, G, B. Codes are the plain n-bit values; the unused
low bits of a layout such as P010 are the caller's to shift away.

Reference: ITU-T H.273 (2021), tables 4 and 8; ITU-R BT.601-7, BT.709-6, BT.2020-2 (non-constant luminance);
SMPTE 240M.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from faceage.types import ColorSpec, Frame

LUMA_WEIGHTS = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
}
"""Kr and Kb of each matrix."""
_KR, _KB = LUMA_WEIGHTS["bt601"]
RGB_LUMA = np.array([_KR, 1 - _KR - _KB, _KB], np.float32)
"""Weights of R, G and B in the luma of packed RGB."""


def color_of(frame: Frame) -> ColorSpec:
    """Return the colour that the frame's samples really have.

    The pixel format wins where the tags contradict it: packed RGB has no YUV matrix, FFmpeg's yuvj
    formats are full range, and gray tagged as RGB is luma (any matrix: its chroma is zero).
    """
    color = frame.color
    if frame.layout.planes[0].components.startswith("RGB"):
        return dataclasses.replace(color, matrix="rgb")
    if frame.pixel_format.startswith("yuvj"):
        color = dataclasses.replace(color, full_range=True)
    return dataclasses.replace(color, matrix="bt601") if color.matrix == "rgb" else color


@lru_cache(maxsize=64)
def yuv_to_rgb(color: ColorSpec, bit_depth: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the map from native codes to RGB in [-1, 1]: rgb = matrix @ codes + offset.

    Args:
        color: the matrix and the range; the siting plays no part. Matrix "rgb" only scales.
        bit_depth: n, the bits of a code.

    Returns:
        float64 [3, 3] and float64 [3], read-only (they are cached).
    """
    if color.matrix == "rgb":
        linear, zero = np.eye(3), np.zeros(3)
    else:
        kr, kb = LUMA_WEIGHTS[color.matrix]
        kg = 1 - kr - kb
        b, r = 2 * (1 - kb), 2 * (1 - kr)
        linear = np.array([[1, 0, r], [1, -b * kb / kg, -r * kr / kg], [1, b, 0]])
        zero = np.array([0.0, 2 ** (bit_depth - 1), 2 ** (bit_depth - 1)])
    if color.full_range:
        span = np.full(3, 2.0**bit_depth - 1)
    else:
        unit = 2.0 ** (bit_depth - 8)
        if color.matrix == "rgb":
            span, zero = np.full(3, 219 * unit), np.full(3, 16 * unit)
        else:
            span, zero = np.array([219, 224, 224]) * unit, zero + np.array([16 * unit, 0, 0])
    matrix = 2 * linear / span
    offset = -matrix @ zero - 1
    matrix.setflags(write=False)
    offset.setflags(write=False)
    return matrix, offset


@lru_cache(maxsize=64)
def rgb_to_yuv_delta(color: ColorSpec, bit_depth: int) -> npt.NDArray[np.float64]:
    """Return the linear map from a difference in RGB [-1, 1] units to a difference in native codes.

    Returns:
        float64 [3, 3], read-only: delta_codes = matrix @ delta_rgb.
    """
    matrix = np.asarray(np.linalg.inv(yuv_to_rgb(color, bit_depth)[0]), np.float64)
    matrix.setflags(write=False)
    return matrix


def luma_codes(color: ColorSpec, bit_depth: int) -> tuple[float, float]:
    """Return the native code of E'Y = 0 and how many codes E'Y = 0 .. 1 spans; of matrix "rgb", those of R, G and B."""
    if color.full_range:
        return 0.0, 2.0**bit_depth - 1
    unit = 2.0 ** (bit_depth - 8)
    return 16 * unit, 219 * unit
