"""FG-NET: does an aged photo come nearer to the person's real photo of that age?

For two photos of one adult, at least ten years apart, the earlier one is aged to the later one's age and the later one
to the earlier one's. Both the result and the untouched photo are compared, by a face-recognition network that the
product does not have, with the person's *real* photo of the age:

    gain = cos(aged, real) - cos(untouched, real)

Doing nothing gives 0, and any damage to the identity less. A gain is only had by changes that real ageing brings too,
so neither patterns that please an age estimator nor leaving the face alone score. Beside it stand a stranger's photo of
that age and the ceiling, other real photos of the person at that age. The intervals are by a bootstrap over people: the
pairs of one person are not independent.

References: Panis et al.: Overview of research on facial ageing using the FG-NET ageing database, IET Biometrics 2016;
MyTimeMachine, arXiv:2411.14521 (the same comparison).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from faceage.pipeline.request import Networks
from faceage.types import FloatArray, IntArray
from train.data import warp_faces
from train.evaluate.composites import SAME_FACE, age_pictures
from train.evaluate.photos import Photos, largest_faces, read_fgnet
from train.evaluate.scorecard import show, table
from train.readers.teacher import TEMPLATE_96X112, MobileFaceNet, embed

log = logging.getLogger(__name__)

ADULT_YEARS = 18
MIN_GAP_YEARS = 10
GAPS = {"10..19": (10, 20), "20..29": (20, 30), "30+": (30, 100)}
SAME_AGE_YEARS = 3
FALSE_MATCH_RATE = 0.01
RESAMPLES = 2000


@dataclass(frozen=True)
class Pairs:
    """P pairs of photos of one person: rows of the photos."""

    sources: IntArray
    """[P], the photo that is aged."""
    reals: IntArray
    """[P], the real photo of the target age."""

    def __len__(self) -> int:
        return len(self.sources)


def make_pairs(people: IntArray, ages: FloatArray) -> tuple[Pairs, Pairs]:
    """Pair the photos of each adult that are far enough apart: to be made older, and younger."""
    old_enough = (people[:, None] == people[None]) & (ages[:, None] >= ADULT_YEARS)
    earlier, later = np.nonzero(old_enough & (ages[None] - ages[:, None] >= MIN_GAP_YEARS))
    return Pairs(earlier, later), Pairs(later, earlier)


def strangers(pairs: Pairs, people: IntArray, ages: FloatArray, seed: int = 0) -> IntArray:
    """Return for each pair another person's photo of the target age: rows [P]."""
    random = np.random.default_rng(seed)
    rows = []
    for real in pairs.reals:
        off = np.where(people == people[real], np.inf, np.abs(ages - ages[real]))
        rows.append(random.choice(np.flatnonzero(off <= max(SAME_AGE_YEARS, off.min()))))
    return np.array(rows, np.int64)


def ceiling(pairs: Pairs, people: IntArray, ages: FloatArray, embeddings: FloatArray) -> FloatArray:
    """Return the mean similarity of the real photo to others of the person at that age: [P], NaN without any."""
    values = []
    for source, real in zip(pairs.sources, pairs.reals, strict=True):
        near = (people == people[real]) & (np.abs(ages - ages[real]) <= SAME_AGE_YEARS)
        near[[source, real]] = False
        values.append((embeddings[near] @ embeddings[real]).mean() if near.any() else np.nan)
    return np.array(values)


def bootstrap(values: FloatArray, people: IntArray, seed: int = 0) -> dict[str, float]:
    """Return the mean of values [P] and its 95 % interval over resampled people: mean, low, high, n, people."""
    known = ~np.isnan(values)
    values, people = values[known], people[known]
    if not len(values):
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "people": 0}
    _, who = np.unique(people, return_inverse=True)
    sums, counts = np.bincount(who, values), np.bincount(who)
    drawn = np.random.default_rng(seed).integers(0, len(counts), (RESAMPLES, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values), "people": len(counts),
    }  # fmt: skip


def match_limit(embeddings: FloatArray, people: IntArray) -> float:
    """Return the similarity that one pair of strangers in a hundred exceeds."""
    different = np.triu(people[:, None] != people[None])
    return float(np.quantile((embeddings @ embeddings.T)[different], 1 - FALSE_MATCH_RATE))


@dataclass(frozen=True)
class Aged:
    """What became of the source photos of P pairs."""

    found: np.ndarray
    """bool [P], whether the detector still finds the face."""
    embeddings: FloatArray
    """[P, 128]; NaN where it does not."""


class FGNet:
    """The photos, their embeddings, and the pairs."""

    def __init__(self, archive: Path, networks: Networks, teacher: MobileFaceNet) -> None:
        """Read the photos; the landmarks are those of the product's detector."""
        self._teacher, self._detector = teacher, networks.detector
        photos, people = read_fgnet(archive, networks.detector, ADULT_YEARS)
        self.photos, self.people = photos, people
        self.embeddings = embed_photos(teacher, photos)
        self.directions = dict(zip(("older", "younger"), make_pairs(people, photos.ages), strict=True))
        self.limit = match_limit(self.embeddings, people)

    def age(self, networks: Networks, pairs: Pairs) -> Aged:
        """Age the source of each pair to the age of its real photo, by the product."""
        photos = self.photos
        which = np.stack([pairs.sources, photos.ages[pairs.reals].astype(np.int64)], 1)
        once, back = np.unique(which, axis=0, return_inverse=True)  # an age is asked for once a photo
        rows, targets = once.T
        made = age_pictures(networks, list(photos.pictures[rows]), photos.landmarks[rows], targets.astype(np.float32))
        landmarks, scores = largest_faces(self._detector, made.pictures)
        eyes = np.linalg.norm(photos.landmarks[rows, 1] - photos.landmarks[rows, 0], axis=-1)
        off = np.linalg.norm(landmarks - photos.landmarks[rows], axis=-1).mean(-1) / eyes
        found = (scores > 0) & (off < SAME_FACE)
        # Aligned as the untouched photo was: only the change of the face counts.
        embeddings = embed_faces(self._teacher, made.pictures, photos.landmarks[rows])
        embeddings[~found] = np.nan
        back = back.reshape(-1)
        return Aged(found[back], embeddings[back])

    def figures(self, networks: Networks) -> dict:
        """Age all pairs, and return the results of both directions."""
        return {name: self._figures(pairs, self.age(networks, pairs)) for name, pairs in self.directions.items()}

    def _figures(self, pairs: Pairs, aged: Aged) -> dict:
        e, people, ages = self.embeddings, self.people[pairs.sources], self.photos.ages
        untouched = (e[pairs.sources] * e[pairs.reals]).sum(1)
        made = (aged.embeddings * e[pairs.reals]).sum(1)
        gaps = np.abs(ages[pairs.reals] - ages[pairs.sources])
        other = (e[strangers(pairs, self.people, ages)] * e[pairs.reals]).sum(1)
        best = ceiling(pairs, self.people, ages, e)
        gains = made - untouched
        by_gap = {name: (gaps >= low) & (gaps < high) for name, (low, high) in GAPS.items()}
        return {
            "gain": bootstrap(gains, people),
            "by_gap": {name: bootstrap(gains[rows], people[rows]) for name, rows in by_gap.items()},
            "gain_stranger": bootstrap(other - untouched, people),
            "gain_ceiling": bootstrap(best - untouched, people),
            "similarity": {"untouched": float(untouched.mean()), "aged": float(np.nanmean(made))},
            "identity": float(np.nanmean((aged.embeddings * e[pairs.sources]).sum(1))),
            "recognised": {
                "untouched": float((untouched > self.limit).mean()), "aged": float((made > self.limit).mean()),
            },
            "detected": float(aged.found.mean()),
            "mean_gap": float(gaps.mean()),
        }  # fmt: skip


def measure(archive: Path, models: list[Networks], teacher: MobileFaceNet) -> dict:
    """Return the results of each model, by its name."""
    photos = FGNet(archive, models[0], teacher)
    return {networks.model: photos.figures(networks) for networks in models}


def render(models: dict) -> str:
    """Return the results on FG-NET as Markdown: similarity to the real photo of the age, less the untouched photo's."""

    def interval(figures: dict) -> str:
        return f"{figures['mean']:+.3f} ({figures['low']:+.3f} .. {figures['high']:+.3f})"

    header = ["", "n", "gain (95 % by person)", *GAPS, "identity", "detected", "recognised", "untouched"]
    rows = []
    for direction in ("older", "younger"):
        for model, results in models.items():
            f = results[direction]
            figures = [each["mean"] for each in f["by_gap"].values()] + [f["identity"], f["detected"]]
            figures += [f["recognised"][key] for key in ("aged", "untouched")]
            cells = (show(figure, 3) for figure in figures)
            rows.append((f"{model}, {direction}", str(f["gain"]["n"]), interval(f["gain"]), *cells))
        some = next(iter(models.values()))[direction]
        for name, key in (("a stranger", "gain_stranger"), ("other real photos, the ceiling", "gain_ceiling")):
            rows.append((f"{name}, {direction}", str(some[key]["n"]), interval(some[key]), *[""] * 7))
    title = "## FG-NET: similarity to the person's real photo of the age, less the untouched photo's"
    return f"{title}\n\n" + table(header, rows)


def embed_photos(teacher: MobileFaceNet, photos: Photos) -> FloatArray:
    """Return unit embeddings of photos: float32 [N, 128]."""
    return embed_faces(teacher, list(photos.pictures), photos.landmarks)


def embed_faces(teacher: MobileFaceNet, pictures: list[np.ndarray], landmarks: FloatArray) -> FloatArray:
    """Return unit embeddings of the faces with landmarks [N, 5, 2]: float32 [N, 128]."""
    return embed(teacher, warp_faces(pictures, landmarks, TEMPLATE_96X112, 96, 112)).numpy()
