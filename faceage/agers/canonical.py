"""What age changes on the canonical face: prototypes, wrinkles, and how they are mixed for one person.

The change of one pixel from one age to another is linear in products of age and covariates (see
`train.space.prototypes`), so all changes of all people are mixtures of a few maps:

    change = sum_r (mixing @ (features(target) - features(source)))_r map_r

Covariates say what else a picture shows: light, colours and appearance. They are principal components, without names;
what of them goes with age is taken out. Nobody's gender or origin is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import safetensors

from faceage.checkpoint import check_whole
from faceage.geometry import face_mask
from faceage.kernels import beside, maps
from faceage.types import Appearance, FloatArray, Frame, Samples

CANONICAL_PX = 256
"""Side of the canonical picture."""
KNOTS_YEARS = np.array([14, 24, 34, 44, 54, 64, 74, 86], np.float32)
"""Between these the mean face changes linearly with age."""
COARSE_KNOTS_YEARS = np.array([20, 40, 60, 80], np.float32)
"""The same for what depends on the covariates too."""
LOG_OFFSET = 0.04
"""Added to RGB in [0, 1] before the logarithm, as `kernels.BLACK_OFFSET`."""
COVARIATE_LIMIT = 2.5
"""Covariates are cut here, in standard deviations: beyond it there are hardly any faces to learn from."""
REACH_YEARS, REACH_OVER_YEARS = 6.0, 25.0
"""A mean is milder than most of its faces: prototypes are read this far beyond the target, less for small steps."""
PROTOTYPE_GAIN = 2.0
"""For the same reason, what the change of the prototypes is multiplied by."""
PROTOTYPE_LIMITS, CHROMA_LIMIT = (0.24, 0.14), 0.08
"""Largest darkening and brightening, and largest change of chroma, as log ratios; approached softly."""
CREASE_GAIN, CREASE_LIMITS = 0.4, (0.26, 0.12)
"""What creases are multiplied by, and their limits."""
BESIDE_MOUTH, BESIDE_MOUTH_PX, BESIDE_MOUTH_GAIN = 0.65, 14.0, 4.0
"""By what share creases are weaker around the mouth, which moves: somebody else's lie wrong there, as scars do. How
wide that is: a blur of the lips, times the last figure, up to 1."""
CREASE_SHARES = (0.8, 0.5, 0.3)
"""Of the creases of the most similar old face, and of the next: one face alone often has bare places; more clutter."""
DETAIL_REDNESS, DETAIL_BLUENESS = -0.30, 0.22
"""Slopes of log R/G and log B/G on log luma in the detail of old skin: dark detail is redder. Measured: -0.40, 0.30."""
SKIN_REDNESS = 0.29
"""Median of log R/G of faces. On a face with less of it, in bluish light, these slopes are less steep: creases would be
red like scars."""
SKIN_CHROMA, FEATURE_CHROMA = 0.4, 0.9
"""Share of the prototypes' change of chroma that is kept on skin, and on brows and lips."""
WRINKLED_BY_YEARS, FIRST_WRINKLES_YEARS, ALL_WRINKLES_YEARS = 40.0, 30.0, 65.0
OVEREXPOSED, OVEREXPOSED_SHARE, OVEREXPOSED_CREASES = 0.85, 0.4, 0.4
"""Creases are weaker on overexposed faces: where this share of the thumbnail is brighter than the first figure (of 1),
this much of them is left."""
GREY_PICTURE, COLOUR_PICTURE = 0.03, 0.12
"""Mean colourfulness of a face's thumbnail (largest less smallest of R, G and B, to the largest) up to which colours
stay, and from which on they change in full."""
LIGHT_COVARIATES = 7
"""Of the covariates, the first are light and colours."""
SMOOTHED = 0.38
"""Largest share of fine detail that is taken away from younger skin."""


def hats(ages: FloatArray, knots: FloatArray = KNOTS_YEARS) -> FloatArray:
    """Return the piecewise linear basis of ages [N]: float32 [N, K], rows sum to 1."""
    ages = np.clip(ages, knots[0], knots[-1])
    return np.stack([np.interp(ages, knots, row) for row in np.eye(len(knots))], -1).astype(np.float32)


def age_features(ages: FloatArray, covariates: FloatArray) -> FloatArray:
    """Return what the prototypes are linear in, float32 [N, 8 + 4 C], for ages [N] and covariates [N, C]."""
    coarse = hats(ages, COARSE_KNOTS_YEARS)
    both = (coarse[:, :, None] * covariates[:, None, :]).reshape(len(coarse), -1)
    return np.concatenate([hats(ages), both], 1)


def limit(x: Samples, down: float, up: float) -> Samples:
    """Return x, softly limited to -down and up."""
    xp = maps.namespace(x)
    return xp.where(x > 0, up * xp.tanh(x / up), -down * xp.tanh(-x / down))


@dataclass(frozen=True, kw_only=True)
class CovariateBasis:
    """What covariates are measured against."""

    light: FloatArray
    """[5, P], principal directions of log luma over the thumbnail's P pixels on the face."""
    light_mean: FloatArray
    """[P]."""
    appearance: FloatArray
    """[A, D], principal directions of the identity network's embeddings."""
    by_age: FloatArray
    """[8, C], the covariates' means at the knots of age."""
    scale: FloatArray
    """[C], their standard deviations."""

    @staticmethod
    def logs(thumbnails: FloatArray) -> FloatArray:
        """Return log RGB [N, 3, P] of thumbnails [N, 3, 16, 16] in [-1, 1], inside the face."""
        inside = face_mask(thumbnails.shape[-1]) > 0.3
        return np.log((thumbnails[:, :, inside] + 1) / 2 + np.float32(LOG_OFFSET))

    def raw(self, thumbnails: FloatArray, embeddings: FloatArray) -> FloatArray:
        """Return covariates [N, C] with what goes with age still in them."""
        logs = self.logs(thumbnails)
        light = (logs.mean(1) - self.light_mean) @ self.light.T
        red, blue = ((logs[:, channel] - logs[:, 1]).mean(-1, keepdims=True) for channel in (0, 2))
        return np.concatenate([light, red, blue, embeddings @ self.appearance.T], 1)

    def __call__(self, thumbnails: FloatArray, embeddings: FloatArray, ages: FloatArray) -> FloatArray:
        """Return the covariates of N faces, float32 [N, C], with deviation 1."""
        raw = self.raw(thumbnails, embeddings) - hats(ages) @ self.by_age
        return np.clip(raw / self.scale, -COVARIATE_LIMIT, COVARIATE_LIMIT).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Areas:
    """Where things are on the canonical face: float32 [256, 256] each, in [0, 1], with soft rims."""

    mask: Samples
    """1 on the face, 0 at its outline."""
    brows: Samples
    eyes: Samples
    lips: Samples
    """With the mouth."""
    mouth: Samples
    """Between the lips."""


@dataclass(frozen=True, kw_only=True)
class CanonicalModel:
    """The parameters of the space model. Its maps may lie on a device; all else are arrays."""

    basis: CovariateBasis
    areas: Areas
    mixing: FloatArray
    """[R, 8 + 4 C]."""
    luma: Samples
    """[R, H, H], log ratio of luma; exposure is taken out."""
    chroma: Samples
    """[R, H', H', 2], changes of log R/G and of log B/G."""
    wrinkles: Samples
    """[M, H'', H''], creases of old faces: log ratios of luma."""
    wrinkle_covariates: FloatArray
    """[M, C]."""

    def maps_beside(self, home: Frame | Samples) -> CanonicalModel:
        """Return the model with its maps where a frame or other samples live."""
        names = ("areas", "luma", "chroma", "wrinkles")
        return replace(self, **{name: beside(home, getattr(self, name)) for name in names})

    def mix(self, appearance: Appearance, source: float, target: float) -> FloatArray:
        """Return the canonical change of one person.

        Args:
            appearance: of the person, at the source age.
            source: present age, years.
            target: wanted age, years.

        Returns:
            float32 [256, 256, 4]: log ratio of luma, changes of log R/G and of log B/G, and the share of fine detail
            that is taken away; all 0 outside the face. It is where the model's maps are, to which go the weights of the
            mixture alone.
        """
        xp = maps.namespace(self.luma)
        covariates = self.basis(appearance.thumbnail[None], appearance.embedding[None], np.array([source], np.float32))[
            0
        ]
        years, areas = target - source, self.areas
        feature = (areas.brows + areas.lips).clip(0, 1)
        if years < 0:
            luma, chroma = self._prototypes(covariates, source, target)
            luma = limit(luma, *PROTOTYPE_LIMITS) * (1 - 0.6 * areas.brows - 0.4 * areas.eyes) * (1 - areas.mouth)
            chroma = limit(chroma, CHROMA_LIMIT, CHROMA_LIMIT)
            chroma *= (feature * FEATURE_CHROMA + (1 - feature) * SKIN_CHROMA)[..., None]
            chroma *= ((1 - areas.mouth) * (1 - 0.7 * areas.eyes))[..., None]
        else:
            luma = self._creases(covariates, source, target) * _contrast_left(appearance.thumbnail)
            chroma = xp.zeros_like(xp.stack([luma, luma], -1))
        skin = (1 - feature)[..., None]
        slopes = _redness(appearance.thumbnail) * np.array([DETAIL_REDNESS, DETAIL_BLUENESS], np.float32)
        chroma = chroma + skin * luma[..., None] * beside(luma, slopes)
        smoothed = SMOOTHED * np.clip(-years / 30, 0, 1)
        smoothed = (1 - feature - areas.eyes).clip(0, 1) * smoothed
        chroma *= colour_share(appearance.thumbnail)
        tone = xp.concatenate([luma[..., None], chroma, smoothed[..., None]], -1)
        return maps.single(tone * areas.mask[..., None])

    def _prototypes(self, covariates: FloatArray, source: float, target: float) -> tuple[Samples, Samples]:
        """Return the prototypes' change at the person's covariates: luma [256, 256] and chroma [256, 256, 2]."""
        beyond = target - REACH_YEARS * min((source - target) / REACH_OVER_YEARS, 1)
        now, then = age_features(np.array([source, beyond], np.float32), np.stack([covariates] * 2))
        weights = PROTOTYPE_GAIN * (self.mixing @ (then - now))
        luma, chroma = (maps.weighted_sum(weights, stack) for stack in (self.luma, self.chroma))
        whole = (CANONICAL_PX, CANONICAL_PX)
        return maps.resize(luma, *whole, is_cubic=True), maps.resize(chroma, *whole)

    def _creases(self, covariates: FloatArray, source: float, target: float) -> Samples:
        """Return the creases of the old faces that are most like the person, [256, 256]."""
        off = np.square(covariates - self.wrinkle_covariates)
        distance = off[:, :LIGHT_COVARIATES].sum(1) + 0.7 * off[:, LIGHT_COVARIATES:].sum(1)
        nearest = np.argsort(distance, kind="stable")[: len(CREASE_SHARES)]
        shares = np.array(CREASE_SHARES[: len(nearest)], np.float32)
        creases = maps.weighted_sum(shares, [self.wrinkles[int(row)] for row in nearest])
        creases = maps.resize(creases, CANONICAL_PX, CANONICAL_PX, is_cubic=True)
        span = ALL_WRINKLES_YEARS - FIRST_WRINKLES_YEARS
        amount = np.clip((target - source) / WRINKLED_BY_YEARS, 0, 1.15) * np.clip(
            (target - FIRST_WRINKLES_YEARS) / span, 0, 1.1
        )
        areas = self.areas
        beside_mouth = (BESIDE_MOUTH_GAIN * maps.blur(areas.lips, BESIDE_MOUTH_PX)).clip(0, 1)
        where = (1 - areas.mouth) * (1 - areas.eyes) * (1 - 0.7 * areas.brows) * (1 - BESIDE_MOUTH * beside_mouth)
        return limit(CREASE_GAIN * creases, *CREASE_LIMITS) * (where * amount)


def _contrast_left(thumbnail: FloatArray) -> float:
    """Return how much of the creases' contrast is left in the exposure of a face: 0.4 to 1."""
    inside = face_mask(thumbnail.shape[-1]) > 0.3
    bright = float((((thumbnail.mean(0) + 1) / 2)[inside] > OVEREXPOSED).mean())
    return 1 - (1 - OVEREXPOSED_CREASES) * min(bright / OVEREXPOSED_SHARE, 1.0)


def _redness(thumbnail: FloatArray) -> float:
    """Return the share of `DETAIL_REDNESS` that a face gets: 0 to 1."""
    red, green, _ = CovariateBasis.logs(thumbnail[None])[0]
    return float(np.clip((red - green).mean() / SKIN_REDNESS, 0, 1))


def colour_share(thumbnail: FloatArray) -> float:
    """Return how much of a change of colour a face gets: 1, and 0 on a black-and-white picture."""
    rgb = (thumbnail[:, face_mask(thumbnail.shape[-1]) > 0.3] + 1) / 2
    colourful = float((np.ptp(rgb, axis=0) / (rgb.max(0) + np.float32(LOG_OFFSET))).mean())
    return float(np.clip((colourful - GREY_PICTURE) / (COLOUR_PICTURE - GREY_PICTURE), 0, 1))


def read_canonical(checkpoint: Path) -> CanonicalModel:
    """Read the parameters of a space model; no torch.

    Raises:
        CheckpointError: if the file is damaged.
    """
    check_whole(checkpoint)
    with safetensors.safe_open(checkpoint, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    parts = {name: value.astype(np.float32) for name, value in arrays.items() if value.dtype.kind == "f"}

    def group(prefix: str) -> dict[str, FloatArray]:
        return {name.removeprefix(prefix): value for name, value in parts.items() if name.startswith(prefix)}

    areas = {
        name.removeprefix("areas."): cv2.resize(value, (CANONICAL_PX, CANONICAL_PX)).astype(np.float32) / 255
        for name, value in arrays.items()
        if name.startswith("areas.")
    }
    top, left = (int(v) for v in arrays["wrinkle_corner"])
    small = arrays["wrinkles"].astype(np.float32) * parts["wrinkle_scale"]
    (side,) = (int(v) for v in arrays["wrinkle_px"])
    stored = np.zeros((len(small), side, side), np.float32)
    stored[:, top : top + small.shape[1], left : left + small.shape[2]] = small
    return CanonicalModel(
        basis=CovariateBasis(**group("basis.")),
        areas=Areas(**areas),
        mixing=parts["mixing"],
        luma=parts["luma"],
        chroma=parts["chroma"],
        wrinkles=stored,
        wrinkle_covariates=parts["wrinkle_covariates"],
    )
