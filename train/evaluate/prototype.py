"""How near the prototype of made faces comes to that of real faces of the age, and what of a change is none of ageing.

A prototype is the per-pixel mean of log RGB over aligned faces, mirrored ones included, after each face's mean log luma
(its exposure) is removed. With the prototypes b of the untouched faces, m of the made and r of the real ones,

    recovery = <m - b, r - b> / |r - b|^2

is 0 for doing nothing and 1 for the whole change; more of the change than there is gives more than 1. Both products are
corrected for the noise of the finite sets, so that the mean of a small set is not taken for a change. It is hard to
game because it is a property of the whole set: patterns that please an estimator but differ from face to face, or do
not follow the shading of real old faces, average out.

"Dirt" is what of the change real ageing does not explain, three figures in log units that are 0 for doing nothing:
the fraction of pixels whose luma changes by more than a factor of e^0.25, the left-right asymmetry of the change, and
the root mean square of its low frequencies off the direction r - b. Wrinkles are fine, so they are in none of them
unless they are too deep; blotches, lopsided shading and tints are. It must be read beside recovery.

References: Burt, Perrett: Perception of age in adult Caucasian male faces, Proc. R. Soc. B 1995; Tiddeman et al. 2001.
"""

from __future__ import annotations

import cv2
import numpy as np

from faceage.geometry import face_mask
from faceage.types import FloatArray
from train.evaluate.bands import LUMA, OFFSET, blur, log_luma

PROTOTYPE_PX = 64
LOW_SIGMA = 1 / 16
"""Blur of what counts as low frequencies, in sides of the crop."""
LARGE = 0.25
"""A log ratio of luma that is taken for dirt."""


def log_colours(crops: np.ndarray) -> FloatArray:
    """Return log RGB of uint8 crops [N, S, S, 3] at 64 px, each less its mean log luma: float32 [N, 64, 64, 3]."""
    size = (PROTOTYPE_PX, PROTOTYPE_PX)
    small = np.stack([cv2.resize(crop, size, interpolation=cv2.INTER_AREA) for crop in crops]).astype(np.float32)
    logs = np.log(small / 255 + OFFSET)
    exposure = (logs @ LUMA)[:, _inside()].mean(1)
    return logs - exposure[:, None, None, None]


def _inside() -> np.ndarray:
    return face_mask(PROTOTYPE_PX) > 0.5


def _symmetric(logs: FloatArray) -> np.ndarray:
    """Return the mean of each picture and its mirror image, inside the face: [N, D]."""
    both = (logs + logs[:, :, ::-1]) / 2
    return both[:, _inside()].reshape(len(logs), -1)


def recovery(made: FloatArray, before: FloatArray, real: FloatArray, *, are_pairs: bool = True) -> dict[str, float]:
    """Return how much of the change between two prototypes was made.

    Args:
        made: [N, 64, 64, 3], from `log_colours`.
        before: [N, 64, 64, 3], the untouched faces.
        real: [M, 64, 64, 3], of the target age.
        are_pairs: made[i] is before[i], changed; else two independent sets.

    Returns:
        recovery; off, the length of what lies off the direction, in lengths of the whole change.
    """
    m, b, r = (_symmetric(logs) for logs in (made, before, real))
    noise_b = b.var(0, ddof=1).sum() / len(b)
    noise_r = r.var(0, ddof=1).sum() / len(r)
    shared = ((m - m.mean(0)) * (b - b.mean(0))).sum() / (len(b) - 1) / len(b) if are_pairs else 0.0
    change, whole = m.mean(0) - b.mean(0), r.mean(0) - b.mean(0)
    # E<change, whole> holds the variance of b's mean, and loses what m's mean shares with it.
    along = change @ whole - noise_b + shared
    length = whole @ whole - noise_b - noise_r
    noise = (m - b).var(0, ddof=1).sum() / len(b) if are_pairs else m.var(0, ddof=1).sum() / len(m) + noise_b
    own = change @ change - noise
    off = max(own - along**2 / length, 0.0)
    return {"recovery": float(along / length), "off": float(np.sqrt(off / length))}


def dirt(made: np.ndarray, before: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Measure what of a change is none of ageing, in log units, averaged over faces.

    Args:
        made: uint8 [N, S, S, 3], aligned crops.
        before: uint8 [N, S, S, 3], the same faces untouched.
        real: uint8 [M, S, S, 3], real faces of the target age.

    Returns:
        large, a fraction of pixels; asymmetry and low, root mean squares of log ratios.
    """
    inside = face_mask(made.shape[1]) > 0.5
    ratio = log_luma(made) - log_luma(before)
    # Blurred a little: a fold of one side is no asymmetry.
    odd = blur((ratio - ratio[:, :, ::-1]) / 2, LOW_SIGMA / 4 * made.shape[1])
    logs, untouched, old = (log_colours(crops) for crops in (made, before, real))
    whole = old.mean(0) - untouched.mean(0)
    direction = blur(((whole + whole[:, ::-1]) / 2)[None], LOW_SIGMA * PROTOTYPE_PX)[:, _inside()].reshape(-1)
    low = blur(logs - untouched, LOW_SIGMA * PROTOTYPE_PX)[:, _inside()].reshape(len(made), -1)
    along = low @ direction / (direction @ direction)
    rest = low - along[:, None] * direction
    return {
        "large": float((np.abs(ratio[:, inside]) > LARGE).mean()),
        "asymmetry": float(np.sqrt(np.square(odd[:, inside]).mean(1)).mean()),
        "low": float(np.sqrt(np.square(rest).mean(1)).mean()),
    }
