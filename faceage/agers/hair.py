"""Grey hair: hair loses colour and gains luma where it is darker than grey hair would be; its strands stay.

With m the mask, a = grey m, Y the luma, base its mean over some strands, and L what grey hair has in the light that is
on the face:

    Y' = Y + a LIFT max(L - base, 0) + a d (Y - base),        chroma' = (1 - a FADE) chroma

with d = DETAIL max(1 - base / L, 0): dark hair shows its strands least. It is linear in Y, so the picture's own strands
are scaled at its own resolution. Working in the signal, not in its logarithm, leaves the noise of dark hair alone.

Reference: Panhard, Lozano, Loussouarn, Br. J. Dermatol. 2012 (how grey people are by age).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from faceage.kernels import BLACK_OFFSET, RGB_LUMA
from faceage.types import Change, FloatArray

HALF_GREY_YEARS, GREY_SPREAD_YEARS = 64.0, 8.5
"""Age at which hair is half grey, and how fast it goes: 0.35 is salt and pepper, 0.7 grey."""
LIFT, DETAIL, FADE = 0.72, 1.6, 0.85
GREY_SHARE = 0.78
"""Luma of grey hair, as a share of that of the face's skin."""
GREY_RANGE = (0.36, 0.75)
BASE_SIGMA, NOISE_SIGMA, NOISE_RANGE = 0.0125, 3, 0.03
"""Widths of the base's blur, in sides of the crop, and of the filter that takes out noise before it."""
GUIDE_RADIUS, GUIDE_EPSILON = 0.02, 1e-3
UNSURE, SURE = 0.4, 0.8
"""Probability of hair up to which nothing turns grey, and from which it does in full."""
BRIGHTER = (0.12, 0.3)
"""How much brighter than the strands around it a pixel may be, and from where on it is no hair."""
MARGIN = 0.006
"""Width of the margin to a bright background, in sides of the crop."""
FACE_CENTRE, REACH = 0.45, (0.29, 0.37)
"""Height of the face's middle in the crop, and how far from it hair may be; in sides of the crop, of which a face takes
0.29."""
ONE_KEY_FADE = 4.0
"""Hair that is in one key frame only turns grey within 1 / this of the way to the other one, less and less."""
RIM = 0.06
"""The mask falls to 0 over this share of the crop at its rims: long hair fades out there."""


@dataclass(frozen=True, kw_only=True)
class HairKey:
    """What was seen of one head at a key frame; float32 [S, S] each but the last."""

    mask: FloatArray
    """Share of hair in a pixel."""
    base: FloatArray
    """Luma in [0, 1], without strands."""
    chroma: FloatArray
    """[S/2, S/2, 3], RGB less luma."""
    skin_luma: float
    """Of the face's skin."""


def grey_amount(source: float, target: float) -> float:
    """Return how grey hair gets, 0 to 1, beyond how grey it is at the source age; 0 for younger targets."""
    now, then = (1 / (1 + np.exp(-(age - HALF_GREY_YEARS) / GREY_SPREAD_YEARS)) for age in (source, target))
    return float(max(0.0, (then - now) / (1 - now)))


def find_hair(pixels: FloatArray, logit: FloatArray) -> HairKey:
    """Return what greying needs of one head.

    Args:
        pixels: float32 [3, S, S], RGB in [-1, 1].
        logit: float32 [C, C], the network's; its rims are softer than strands.
    """
    size = pixels.shape[-1]
    rgb = (pixels.transpose(1, 2, 0) + 1) / 2
    luma = rgb @ RGB_LUMA
    probability = cv2.resize(1 / (1 + np.exp(-logit)), (size, size), interpolation=cv2.INTER_LINEAR)
    mask = np.clip((_guided(probability, luma) - UNSURE) / (SURE - UNSURE), 0, 1)
    mask = mask * mask * (3 - 2 * mask) * _own_head(size)
    calm = cv2.bilateralFilter(luma, NOISE_SIGMA, NOISE_RANGE, NOISE_SIGMA)
    weight = cv2.GaussianBlur(mask, (0, 0), BASE_SIGMA * size)
    base = cv2.GaussianBlur(calm * mask, (0, 0), BASE_SIGMA * size) / np.maximum(weight, 1e-3)
    base = np.where(weight > 1e-3, base, luma).astype(np.float32)
    # What is far brighter than the strands around it is the background behind them. A margin is left to it: the head
    # moves between key frames, and a bright background that is taken for hair would shine.
    dark = _ramp((BRIGHTER[1] - (luma - base)) / (BRIGHTER[1] - BRIGHTER[0]))
    margin = 2 * round(MARGIN * size) + 1
    mask = mask * cv2.blur(cv2.erode(dark, np.ones((margin, margin), np.uint8)), (margin, margin))
    half = (size // 2, size // 2)
    skin = slice(int(0.42 * size), int(0.52 * size))
    return HairKey(
        mask=mask,
        base=base,
        chroma=cv2.resize(rgb - luma[..., None], half, interpolation=cv2.INTER_AREA),
        skin_luma=float(np.median(luma[skin, int(0.42 * size) : int(0.58 * size)])),
    )


def draw_hair(grey: float, before: HairKey, after: HairKey, share: float) -> Change:
    """Return the change of a head's hair; `grey` in [0, 1], the rest as `agers.base.Ager.draw`."""
    t = np.float32(share)

    def mix(a: FloatArray, b: FloatArray) -> FloatArray:
        return a if before is after else (1 - t) * a + t * b

    mask = before.mask if before is after else _moving_mask(before.mask, after.mask, share)
    base, chroma = mix(before.base, after.base), mix(before.chroma, after.chroma)
    size = mask.shape[0]
    skin = (1 - share) * before.skin_luma + share * after.skin_luma
    # On dark skin grey hair is as bright as the skin; never brighter, for that would be another light.
    target = np.float32(np.clip(GREY_SHARE * skin, min(GREY_RANGE[0], skin), GREY_RANGE[1]))
    amount = np.float32(grey) * mask
    darker = np.maximum(target - base, 0)
    gain = amount * darker * (DETAIL / target)
    lift = LIFT * amount * darker - gain * (base + np.float32(BLACK_OFFSET))
    faded = cv2.resize(amount, chroma.shape[:2])[..., None] * chroma * np.float32(-2 * FADE)
    delta = cv2.resize(faded, (size, size)).transpose(2, 0, 1) + 2 * lift
    return Change(delta=clear_rim(np.ascontiguousarray(delta)), gain=gain)


def _moving_mask(before: FloatArray, after: FloatArray, share: float) -> FloatArray:
    """Return where hair is between two key frames: where it is in both, and near one of them where it is in that one.

    A head that nods moves its hair against its face. Where hair was, there is skin or background then: lit like hair,
    it would shine. Hair that stays dark at its rim for some frames is hardly seen.
    """
    both = np.minimum(before, after)
    leaving, arriving = (np.float32(max(0.0, 1 - ONE_KEY_FADE * s) ** 2) for s in (share, 1 - share))
    return both + leaving * (before - both) + arriving * (after - both)


def clear_rim(maps: FloatArray) -> FloatArray:
    """Set the outer two pixels of maps [C, S, S] to 0, in place, and return them."""
    maps[:, :2], maps[:, -2:], maps[:, :, :2], maps[:, :, -2:] = 0, 0, 0, 0
    return maps


def _guided(p: FloatArray, guide: FloatArray) -> FloatArray:
    """Return the guided filter of p by a picture (He, Sun, Tang, ECCV 2010): rims move to the picture's edges."""
    radius = max(2, round(GUIDE_RADIUS * p.shape[0]))
    window = (2 * radius + 1, 2 * radius + 1)

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, window, borderType=cv2.BORDER_REPLICATE)

    mean_p, mean_i = mean(p), mean(guide)
    slope = (mean(p * guide) - mean_p * mean_i) / (mean(guide * guide) - mean_i * mean_i + GUIDE_EPSILON)
    return mean(slope) * guide + mean(mean_p - slope * mean_i)


@cache
def _own_head(size_px: int) -> FloatArray:
    """Return where a crop's own head can have hair, float32 [S, S]: its neighbours' hair is theirs to change.

    1 within `REACH` of a vertical line through the face, from its middle downwards; it falls smoothly to 0 at the
    second figure, and to exactly 0 on the outer two pixels.
    """
    pixels = ((np.arange(size_px) + 0.5) / size_px).astype(np.float32)
    beside = pixels[None, :] - 0.5
    above = np.minimum(pixels[:, None] - FACE_CENTRE, 0)
    near, far = REACH
    own = _ramp((far - np.hypot(beside, above)) / (far - near))
    distance = np.minimum(np.arange(size_px), np.arange(size_px)[::-1]) - 1.5
    rim = _ramp(distance / (RIM * size_px))
    own = own * rim[:, None] * rim[None, :]
    own.flags.writeable = False
    return own


def _ramp(x: np.ndarray) -> FloatArray:
    x = np.clip(x, 0, 1).astype(np.float32)
    return x * x * (3 - 2 * x)
