"""Grey hair: hair loses colour and gains luma where it is darker than grey hair would be; its strands stay.

With m the mask, a = grey m, Y the luma, base its mean over some locks, and L what grey hair has in the light that is on
the face:

    Y' = Y + a LIFT max(L - base, 0) + a d (Y - base),        chroma' = (1 - a FADE) chroma + a FADE C

with C the chroma that grey hair has in this light, and d = DETAIL max(1 - base / L, 0)^2: dark hair shows its strands,
and the light on its locks, least. It is linear in Y, so the picture's own strands are scaled at its own resolution.
Working in the signal, not in its logarithm, leaves the noise of dark hair alone. Where black hair shows no strands,
some are drawn: they are added to LIFT. Brows turn grey in the same way.

Reference: Panhard, Lozano, Loussouarn, Br. J. Dermatol. 2012 (how grey people are by age).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from faceage.kernels import BLACK_OFFSET, maps
from faceage.types import Change, FloatArray, Rect, Samples, enclosing

HALF_GREY_YEARS, GREY_SPREAD_YEARS = 64.0, 8.5
"""Age at which hair is half grey, and how fast it goes: 0.35 is salt and pepper, 0.7 grey."""
LIFT, DETAIL, FADE = 0.82, 2.8, 0.85
WHITE, WHITE_CONTRAST = (0.7, 1.0), 0.55
"""How grey hair is from which on its strands and locks get less contrast, and where it is nearly white; what share of
`DETAIL` and `STRANDS` it has then: with all of it black hair would shine like metal."""
GREY_COLOUR = np.array([[-0.03, 0.24, -0.28], [0.01, 0.0, 0.63]], np.float32)
"""Linear map from (1, log R/G, log B/G of the skin) to log R/G and log B/G of grey hair, which has the colour of the
light: least squares over 281 grey heads of All-Age-Faces, 62 years and older."""
GREY_COLOURS, COLOURFUL = 0.12, 0.1
"""Limit of these logs of grey hair; sum of those of the skin, without signs, from which on hair has colour."""
GREY_SHARE = 0.9
"""Luma of grey hair, as a share of that of the face's skin."""
GREY_RANGE = (0.4, 0.75)
BROW_GREY, BROW_SIGMA, SKIN_SIGMA = 0.5, 0.008, 0.05
"""How grey brows get while hair turns grey; the widths of the blurs of their luma and of the skin around them, in sides
of the face's crop."""
BROW_DARKER = (0.1, 0.3)
"""By what share brows are darker than the skin."""
BROW_CHROMA = 0.4
"""How much of the chroma around them brows have."""
STRANDS, STRANDS_SEEN = 0.5, 0.06
"""Deviation of the strands that are drawn on black hair without any, beside `LIFT`; and the deviation of luma among the
picture's own from which on none are drawn."""
STRAND_SIGMAS, STRAND_SHARES = (0.9, 2.5, 7.0), (1.5, 1.2, 0.4)
"""Widths of strands and of locks in pixels, and how much each counts."""
BASE_SIGMA, STRANDS_SIGMA = 0.035, 0.0125
"""Widths of the base's blur, and of a narrower one that shows what is no strand, in sides of the crop."""
NOISE_SIGMA, NOISE_RANGE = 3, 0.03
"""Widths of the filter that takes out noise before them, in pixels and in luma."""
GUIDE_RADIUS, GUIDE_EPSILON = 0.02, 1e-3
UNSURE, SURE = 0.4, 0.8
"""Probability of hair up to which nothing turns grey, and from which it does in full."""
BRIGHTER = (0.12, 0.3)
"""How much brighter than the strands around it a pixel may be, and from where on it is no hair."""
MAGENTA = (0.6, 0.85)
"""What `_magenta` returns up to which it may be hair, and from which on it is cloth."""
MARGIN = 0.003
"""Width of the margin to a bright background, in sides of the crop."""
FACE_CENTRE, REACH, OWN_REACH = 0.45, (0.36, 0.43), 0.2
"""Height of the face's middle in the crop, how far from it hair may be, and how near some of it must come; in sides of
the crop, of which a face takes 0.29."""
UPWARDS = 0.8
"""Distances above the face count less: heads are longer than wide."""
DARK = (0.15, 0.5)
"""On the way from the luma of the hair to that of the skin: what is darker than the first turns grey in full, what is
brighter than the second not at all. A head moves between key frames: where hair was or will be, there is skin or
background now."""
MIN_CONTRAST = 0.1
"""Least difference of the two lumas that `DARK` is a share of."""
RIM = 0.06
"""The mask falls to 0 over this share of the crop at its rims: long hair fades out there."""
HINT, FILTERS_REACH = 0.1, 0.1
"""Probability of hair from which on there may be some nearby, and how far from there the filters see or reach, in sides
of the crop. The rest of the crop is left out."""
BROWS_REACH = 0.035
"""The same beside the area of the brows, whose filters are narrower."""
SKIN_SHRUNK = 4
"""The blur that shows the skin around the brows is so wide that it is computed at a quarter of the crop's side."""


@dataclass(frozen=True, kw_only=True)
class HairKey:
    """What was seen of one head, or of its brows, at a key frame.

    What turning all grey would do to a pixel of hair; it is linear in the share of hair, and in how grey it gets. Far
    from hair it is 0.
    """

    mask: Samples
    """float32 [S, S], share of hair in a pixel."""
    gain: Samples
    """float32 [S, S], of luma, as `types.Change.gain`."""
    lift: Samples
    """float32 [S, S], added to luma in [0, 1]."""
    chroma: Samples
    """float32 [S/2, S/2, 3], added to RGB in [0, 1]; without luma."""
    dark: tuple[maps.Number, maps.Number]
    """As `types.Change.dark`."""
    part: Rect
    """The pixels with hair in them, and some more; its edges are even."""


def grey_amount(source: float, target: float) -> float:
    """Return how grey hair gets, 0 to 1, beyond how grey it is at the source age; 0 for younger targets."""
    now, then = (1 / (1 + np.exp(-(age - HALF_GREY_YEARS) / GREY_SPREAD_YEARS)) for age in (source, target))
    return float(max(0.0, (then - now) / (1 - now)))


def find_hair(pixels: Samples, logit: Samples, grey: float) -> HairKey:
    """Return what greying needs of one head, where its pixels live.

    Args:
        pixels: float32 [3, S, S], RGB in [-1, 1].
        logit: float32 [C, C], the network's; its rims are softer than strands.
        grey: how grey it is to get, 0 to 1.
    """
    contrast = 1 - (1 - WHITE_CONTRAST) * float(np.clip((grey - WHITE[0]) / (WHITE[1] - WHITE[0]), 0, 1))
    xp, size = maps.namespace(pixels), pixels.shape[-1]
    probability = maps.resize(1 / (1 + xp.exp(-logit)), size, size)
    part = _part(probability > HINT, round(FILTERS_REACH * size))
    inner = _slices(part)
    rgb = (maps.by_pixels(pixels[:, *inner]) + 1) / 2
    luma = maps.luma_of(rgb)
    mask = ((_guided(probability[inner], luma, size) - UNSURE) / (SURE - UNSURE)).clip(0, 1)
    mask = mask * mask * (3 - 2 * mask) * _own_head(mask, inner, size)
    mask = mask * _ramp((MAGENTA[1] - _magenta(rgb)) / (MAGENTA[1] - MAGENTA[0]))
    calm = maps.bilateral(luma, NOISE_SIGMA, NOISE_RANGE, NOISE_SIGMA)
    detail = luma - _within(calm, mask, STRANDS_SIGMA * size)
    # What is far brighter than the strands around it is the background behind them. A margin is left to it: the head
    # moves between key frames, and a bright background that is taken for hair would shine.
    dark = _ramp((BRIGHTER[1] - detail) / (BRIGHTER[1] - BRIGHTER[0]))
    margin = 2 * round(MARGIN * size) + 1
    mask = mask * maps.mean_around(maps.erode(dark, margin), margin)
    base = maps.resize(_within(maps.halve(calm), maps.halve(mask), BASE_SIGMA * size / 2), *mask.shape)
    seen = xp.sqrt(maps.blur(xp.square(detail), STRANDS_SIGMA * size))
    middle = pixels[:, int(0.42 * size) : int(0.52 * size), int(0.42 * size) : int(0.58 * size)]
    skin = maps.single((maps.median(maps.by_pixels(middle)) + 1) / 2)
    strands = contrast * STRANDS * maps.constant(_strands, size, like=luma)[inner] * _ramp(1 - seen / STRANDS_SEEN)
    skin_luma = maps.number(maps.luma_of(skin))
    return _key(
        mask, base, rgb - luma[..., None], skin_luma, LIFT + strands, part, size, contrast * DETAIL, _grey_chroma(skin)
    )


def _part(where: Samples, reach_px: int) -> Rect:
    """Return the rectangle around all pixels of a bool map [H, W], and so many pixels more; its edges are even.

    Of a tensor it is the whole: nobody waits for its device to know. If there are none, it lies at the first pixel.
    """
    height, width = where.shape
    if not isinstance(where, np.ndarray):
        return 0, 0, width, height

    def span(axis: int, size: int) -> tuple[int, int]:
        found = np.flatnonzero(where.any(axis))
        first, last = (int(found[0]), int(found[-1])) if len(found) else (0, 0)
        return max(first - reach_px, 0) // 2 * 2, min(last + reach_px + 2, size) // 2 * 2

    (left, right), (top, bottom) = span(0, width), span(1, height)
    return left, top, right, bottom


def _slices(part: Rect) -> tuple[slice, slice]:
    """Return the rows and the columns of a part."""
    left, top, right, bottom = part
    return slice(top, bottom), slice(left, right)


def _halved(part: Rect) -> tuple[slice, slice]:
    """Return the rows and the columns of a part in maps of half the side."""
    left, top, right, bottom = part
    return slice(top // 2, bottom // 2), slice(left // 2, right // 2)


def _magenta(rgb: Samples) -> Samples:
    """Return log R/G + log B/G of RGB [H, W, 3], hardly that of dark noise: [H, W]. Red hair has little blue."""
    red, green, blue = maps.channels(maps.namespace(rgb).log(rgb.clip(min=0) + BLACK_OFFSET))
    return red + blue - 2 * green


def _grey_chroma(skin: Samples) -> Samples:
    """Return RGB less luma of grey hair of luma 1 beside skin of a colour [3]; see `GREY_COLOUR`."""
    xp = maps.namespace(skin)
    red, green, blue = skin.clip(min=0.02)
    one = green / green
    logs = xp.stack([one, xp.log(red / green), xp.log(blue / green)])
    share = (abs(logs[1:]).sum() / COLOURFUL).clip(0, 1)  # hair of black-and-white pictures stays without colour
    matrix = maps.constant(_grey_colour, like=logs)
    red, blue = xp.exp(share * (matrix @ logs).clip(-GREY_COLOURS, GREY_COLOURS))
    colour = xp.stack([red, one, blue])
    return colour / maps.luma_of(colour) - 1


def _grey_colour() -> FloatArray:
    return GREY_COLOUR


def _within(x: Samples, mask: Samples, sigma: float) -> Samples:
    """Return a blur of x that sees only what is in the mask; far from it, the mean of that."""
    mean = maps.number((x * mask).sum() / maps.limit(mask.sum(), 1e-6))
    return maps.blur((x - mean) * mask, sigma) / (maps.blur(mask, sigma) + 1e-3) + mean


def _key(
    mask: Samples,
    base: Samples,
    chroma: Samples,
    skin_luma: maps.Number,
    lift: Samples | float,
    part: Rect,
    size_px: int,
    detail: float,
    grey: Samples | float = 0.0,
) -> HairKey:
    """Put the module's formula together, from what was seen in a part of the crop.

    Args:
        mask: float32 [H, W], as `HairKey.mask`.
        base: float32 [H, W].
        chroma: float32 [H, W, 3], RGB less luma.
        skin_luma: of the face.
        lift: the formula's LIFT, one or a map.
        part: of the crop.
        size_px: S, its side.
        detail: the formula's DETAIL.
        grey: RGB less luma of grey hair of luma 1; 0: it has none.
    """
    # On dark skin grey hair is as bright as the skin; never brighter, for that would be another light.
    target = maps.limit(GREY_SHARE * skin_luma, maps.limit(skin_luma, 0, GREY_RANGE[0]), GREY_RANGE[1])
    target = maps.single(target)
    darker = (target - base).clip(min=0)
    hair_luma = maps.number((base * mask).sum() / maps.limit(mask.sum(), 1e-6))
    contrast = maps.limit(skin_luma - hair_luma, MIN_CONTRAST)
    gain = detail * maps.namespace(base).square(darker / maps.limit(target, 1e-3))
    chroma = FADE * (grey * (base + LIFT * darker)[..., None] - chroma)

    def place(values: Samples, inner: tuple[slice, slice], side: int) -> Samples:
        whole = maps.zeros(side, side, *values.shape[2:], like=values)
        whole[inner] = values
        return whole

    inner, (left, top, _, _) = _slices(part), part
    x0, y0, x1, y1 = _part(mask > 0, 2)  # maps of half the side are enlarged, which reads their neighbours
    last = size_px - 2  # a change is 0 on its crop's outer two pixels
    return HairKey(
        mask=place(mask, inner, size_px),
        gain=place(gain, inner, size_px),
        lift=place(lift * darker - gain * (base + BLACK_OFFSET), inner, size_px),
        chroma=place(maps.halve(chroma), _halved(part), size_px // 2),
        dark=(hair_luma + DARK[0] * contrast, hair_luma + DARK[1] * contrast),
        part=(max(x0 + left, 2), max(y0 + top, 2), min(x1 + left, last), min(y1 + top, last)),
    )


def find_brows(rgb: Samples, area: Samples) -> HairKey:
    """Return what greying needs of the brows, where the face lives.

    Args:
        rgb: float32 [S, S, 3] in [0, 1], a face.
        area: float32 [S, S], 1 where brows can be. Of it, what is darker than the skin around it is hair.
    """
    size = rgb.shape[0]
    small = maps.shrink(rgb, size // SKIN_SHRUNK)
    bare = 1 - maps.shrink(area, size // SKIN_SHRUNK)
    sigma = SKIN_SIGMA * size / SKIN_SHRUNK
    skin = maps.blur(maps.luma_of(small) * bare, sigma) / maps.blur(bare, sigma).clip(min=1e-3)
    part = _part(area > 0, round(BROWS_REACH * size))
    inner = _slices(part)
    skin, rgb, area = maps.resize(skin, size, size)[inner], rgb[inner], area[inner]
    luma = maps.luma_of(rgb)
    low, high = BROW_DARKER
    mask = _ramp(((skin - luma) / skin.clip(min=0.05) - low) / (high - low)) * area
    mask = maps.blur(mask, BROW_SIGMA * size)
    # Of skin its chroma is, mostly: brows are thin, and what is left of them without it would be blue.
    chroma = BROW_CHROMA * (rgb - luma[..., None])
    base, skin_luma = maps.blur(luma, BROW_SIGMA * size), maps.median_where(skin, area > 0.5)
    return _key(mask, base, chroma, skin_luma, LIFT, part, size, DETAIL)


def draw_hair(grey: float, before: HairKey, after: HairKey, share: float) -> Change:
    """Return the change of a head's hair; `grey` in [0, 1], the rest as `agers.base.Ager.draw`."""
    size = before.mask.shape[0]
    whole, none = ((1 - share) * a + share * b for a, b in zip(before.dark, after.dark, strict=True))
    change = Change(
        delta=maps.zeros(3, size, size, like=before.mask),
        gain=maps.zeros(size, size, like=before.mask),
        dark=None if before is after else (whole, none),  # a picture's own key frame shows its hair as it is
        part=enclosing(before.part, after.part),
    )
    add_hair(change, grey, before, after, share)
    return change


def add_hair(change: Change, grey: float, before: HairKey, after: HairKey, share: float) -> None:
    """Add the change of hair to another one of the same crop, in place; the hair lies in its part."""
    assert change.gain is not None
    part = enclosing(before.part, after.part)
    inner, half = _slices(part), _halved(part)
    amount = grey * maps.mix(before.mask[inner], after.mask[inner], share)
    change.gain[inner] += amount * maps.mix(before.gain[inner], after.gain[inner], share)
    chroma = 2 * maps.mix(before.chroma[half], after.chroma[half], share)
    faded = maps.times(chroma, maps.resize(amount, *chroma.shape[:2]))
    lift = 2 * amount * maps.mix(before.lift[inner], after.lift[inner], share)
    for plane, component in zip(change.delta, maps.channels(faded), strict=True):
        plane[inner] += lift + maps.resize(component, *lift.shape)


def _guided(p: Samples, guide: Samples, size_px: int) -> Samples:
    """Return the guided filter of p by a picture (He, Sun, Tang, ECCV 2010): rims move to the picture's edges.

    Its width goes with the side of the crop.
    """
    side = 2 * max(2, round(GUIDE_RADIUS * size_px)) + 1

    def mean(x: Samples) -> Samples:
        return maps.mean_around(x, side, is_replicated=True)

    mean_p, mean_i = mean(p), mean(guide)
    slope = (mean(p * guide) - mean_p * mean_i) / (mean(guide * guide) - mean_i * mean_i + GUIDE_EPSILON)
    return mean(slope) * guide + mean(mean_p - slope * mean_i)


def _own_head(mask: Samples, inner: tuple[slice, slice], size_px: int) -> Samples:
    """Return which hair of a mask [H, W] is the crop's own head's: its neighbours' hair is theirs to change.

    Hair hangs together: what does not come near the face is somebody else's.

    Args:
        mask: of a part of the crop.
        inner: its rows and columns.
        size_px: the crop's side.
    """
    hair = maps.dilate(maps.erode(maps.single(mask > 0.5), 3), 3)
    own = maps.connected(hair, maps.constant(_near_face, size_px, like=mask)[inner])
    rim = 2 * round(RIM * size_px / 4) + 1
    return maps.mean_around(maps.dilate(own, rim), rim) * maps.constant(_reach, size_px, like=mask)[inner]


@cache
def _near_face(size_px: int) -> np.ndarray:
    """Return where some hair of a crop's own head is: bool [S, S]."""
    return _away(size_px) < OWN_REACH


@cache
def _reach(size_px: int) -> FloatArray:
    """Return where all hair of a crop's own head can be: float32 [S, S].

    It falls smoothly to 0, and to exactly 0 on the outer two pixels.
    """
    near, far = REACH
    distance = np.minimum(np.arange(size_px), np.arange(size_px)[::-1]) - 1.5
    rim = _ramp(distance / (RIM * size_px))
    within = _ramp((far - _away(size_px)) / (far - near)) * rim[:, None] * rim[None, :]
    within.flags.writeable = False
    return within


def _away(size_px: int) -> FloatArray:
    """Return distances from a vertical line through the face, from its middle downwards: float32 [S, S]."""
    pixels = ((np.arange(size_px) + 0.5) / size_px).astype(np.float32)
    beside = pixels[None, :] - 0.5
    above = UPWARDS * np.minimum(pixels[:, None] - FACE_CENTRE, 0)
    return np.hypot(beside, above)


@cache
def _strands(size_px: int) -> FloatArray:
    """Return strands as hair falls: over the top of the head and down beside the face; float32 [S, S], deviation 1."""
    pixels = ((np.arange(size_px) + 0.5) / size_px).astype(np.float32)
    beside = np.broadcast_to(pixels[None, :] - 0.5, (size_px, size_px))
    y = np.broadcast_to(pixels[:, None] - FACE_CENTRE, (size_px, size_px))
    across = np.hypot(beside, np.minimum(y, 0))
    along = 0.25 * np.arctan2(beside, -np.minimum(y, 0) + 1e-6) + np.sign(beside) * np.maximum(y, 0)
    random = np.random.default_rng(7)
    noise = random.standard_normal((2 * size_px, size_px)).astype(np.float32)
    scales = [cv2.GaussianBlur(noise, (0, 0), sigma, sigmaY=0.07 * size_px) for sigma in STRAND_SIGMAS]
    noise = np.sum([part * scale / scale.std() for part, scale in zip(STRAND_SHARES, scales, strict=True)], axis=0)
    wave = cv2.GaussianBlur(random.standard_normal((size_px, size_px)).astype(np.float32), (0, 0), 0.06 * size_px)
    across = across + 0.012 * wave / wave.std()
    strands = cv2.remap(noise, across * size_px, (along + 1) * size_px, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    strands = np.clip(strands / strands.std(), -2, 2)
    strands.flags.writeable = False
    return strands


def _ramp(x: Samples) -> Samples:
    x = maps.single(x.clip(0, 1))
    return x * x * (3 - 2 * x)
