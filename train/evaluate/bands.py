"""Energy of the frequency bands of a face's log luma, by region, against real faces of the age.

For band b and region r of a face, E[r, b] = log mean_r(band_b^2), where band_b is the difference of two Gaussian blurs
of log(luma + 0.04). A set of faces is compared with real ones by |mean E - mean E of the real|, averaged over the
bands. Log luma makes the measure independent of exposure. Wrinkles of the wrong size or in the wrong place, a blur, and
noise each move some band of some region away from the real mean, in either direction: more contrast everywhere does not
help.

Reference: Tiddeman, Burt, Perrett: Prototyping and transforming facial textures for perception research, IEEE CG&A 2001
(averaging loses band energy).
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from faceage.types import FloatArray

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Rec. 601."""
OFFSET = 0.04
"""Added before the logarithm, of samples in [0, 1]: noise in the shadows weighs no more than detail."""
SIGMAS = (1 / 192, 1 / 96, 1 / 48, 1 / 24, 1 / 12)
"""Blurs between which the bands lie, in sides of the crop."""
REGIONS = {
    "forehead": ((0.28, 0.05, 0.72, 0.19),),
    "eyes": ((0.12, 0.22, 0.88, 0.42),),
    "cheeks": ((0.14, 0.42, 0.36, 0.66), (0.64, 0.42, 0.86, 0.66)),
    "mouth": ((0.27, 0.60, 0.73, 0.84),),
}
"""Left, top, right, bottom of boxes in the aligned crop, in sides of the crop."""


def region_mask(region: str, size_px: int) -> np.ndarray:
    """Return where a region of the aligned crop is: bool [S, S]."""
    mask = np.zeros((size_px, size_px), bool)
    for box in REGIONS[region]:
        left, top, right, bottom = (round(size_px * part) for part in box)
        mask[top:bottom, left:right] = True
    return mask


def log_luma(crops: np.ndarray) -> FloatArray:
    """Return log(luma + 0.04) of uint8 RGB [N, S, S, 3]: float32 [N, S, S]."""
    return np.log(crops.astype(np.float32) @ (LUMA / 255) + OFFSET)


def blur(maps: np.ndarray, sigma_px: float) -> np.ndarray:
    """Blur float32 [N, S, S] or [N, S, S, C]; the border is mirrored."""
    return np.stack([cv2.GaussianBlur(each, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101) for each in maps])


def split_bands(maps: FloatArray) -> FloatArray:
    """Return differences of Gaussians of float32 [N, S, S], fine to coarse: float32 [B, N, S, S]."""
    blurred = [blur(maps, sigma * maps.shape[1]) for sigma in SIGMAS]
    return np.stack([maps - blurred[0], *(a - b for a, b in pairwise(blurred))])


def band_energies(crops: np.ndarray) -> FloatArray:
    """Return log mean energies of uint8 RGB [N, S, S, 3] by region and band: float32 [N, R, B]."""
    squared = np.square(split_bands(log_luma(crops)))
    columns = [squared[:, :, region_mask(region, crops.shape[1])].mean(-1).T for region in REGIONS]
    return np.log(np.stack(columns, 1) + 1e-8)


def energy_errors(made: FloatArray, real: FloatArray) -> dict[str, float]:
    """Return each region's |mean log energy - that of real faces|, averaged over the bands, and their mean.

    Args:
        made: [N, R, B], from `band_energies`.
        real: [M, R, B], of real faces of the age.
    """
    errors = np.abs(made.mean(0) - real.mean(0)).mean(1)
    return dict(zip(REGIONS, errors.tolist(), strict=True)) | {"mean": float(errors.mean())}
