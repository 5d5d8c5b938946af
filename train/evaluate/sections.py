"""The sections of the scorecard that need no more of the product than the pictures it made."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from faceage.align import align_faces
from faceage.types import FloatArray, IntArray
from train.data import FaceSet
from train.evaluate.faces import (
    AGE_GROUPS,
    GENDERS,
    PICTURE_CROP_PX,
    RACES,
    Looks,
    MeanFaces,
    Panel,
    Requests,
    age_group,
    blur,
    blur_face,
    mask_in_picture,
    paste_face,
    real_pictures,
)
from train.evaluate.metrics import age_figures, kid, largest_change, luma, sharpness_ratios, touchable
from train.evaluate.scorecard import BLUR, BLUR_ALL, MEAN_1, MEAN_2, NOTHING, OTHER, REAL, REAL_PAIR, Worse, show
from train.readers.judge import HALF

log = logging.getLogger(__name__)

SEED = 0
REAL_PER_GROUP = 400
"""Training pictures an age group, about, that composites are compared with."""
MIN_SET = 2
"""Pictures that the KID of a group needs at least."""


@dataclass
class Evaluation:
    """What was asked for, what was made of it, and what the panel says of that."""

    panel: Panel
    models: tuple[str, ...]
    """The names of the models that are compared; each is a method beside the known ones."""
    val: FaceSet
    """Validation pictures of 15 years and older, at the judge's size."""
    val_looks: Looks
    own: IntArray
    """[F], rows of `val`: the drawn faces."""
    drawn: FaceSet
    """The same F faces."""
    originals: list[np.ndarray]
    """Their F pictures as in the archive, uint8 [H, W, 3]."""
    requests: Requests
    """Those whose face the product changed with every model: R."""
    thresholds: dict[str, float]
    """Per cent of false matches -> cosine."""
    pictures: dict[str, list[np.ndarray]]
    """Method -> what it made of the R originals."""
    looks: dict[str, Looks]
    """Method -> what the panel says of them."""

    def identity(self, embeddings: FloatArray, faces: IntArray) -> dict[str, float]:
        """Compare embeddings [N, 128] with those of the untouched pictures of the drawn `faces` [N]."""
        cosines = (embeddings * self.val_looks.embeddings[self.own[faces]]).sum(1)
        figures = {"n": len(cosines), "cosine": mean(cosines), "cosine_min": float(cosines.min(initial=1))}
        return figures | {f"verified_{name}": mean(cosines > limit) for name, limit in self.thresholds.items()}


def mean(values: np.ndarray) -> float:
    """Return the mean of values [N], NaN if there are none."""
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan


def add_baselines(e: Evaluation, faces: FaceSet, val_pictures: list[np.ndarray]) -> None:
    """Make the pictures of every row beside the models', and have the panel look at them all."""
    means = MeanFaces(faces, np.flatnonzero(~faces.validation))
    donors = real_pictures(e.val, e.requests, e.own, SEED)
    requests, points = e.requests, e.drawn.landmarks[e.requests.faces]
    before = [e.originals[i] for i in requests.faces]
    sources = e.drawn.ages[requests.faces]
    for method, times in ((MEAN_1, 1.0), (MEAN_2, 2.0)):
        e.pictures[method] = [
            means.age(picture, p, source, target, times)
            for picture, p, source, target in zip(before, points, sources, requests.targets, strict=True)
        ]
    e.pictures[OTHER] = [
        paste_face(picture, p, val_pictures[donor], e.val.landmarks[donor])
        for picture, p, donor in zip(before, points, donors, strict=True)
    ]
    for method, made in e.pictures.items():
        e.looks[method] = e.panel.look(made, points)
        log.info("%s: read", method)
    blurred = [blur_face(picture, p) for picture, p in zip(e.originals, e.drawn.landmarks, strict=True)]
    for method, each in ((NOTHING, e.originals), (BLUR, blurred)):  # the same for every target age
        e.pictures[method] = [each[i] for i in requests.faces]
        e.looks[method] = e.panel.look(each, e.drawn.landmarks).rows(requests.faces)
    e.looks[REAL] = e.val_looks.rows(donors)


def age_section(e: Evaluation) -> dict:
    """Return group -> method -> figures of the judged age against the requested one."""
    methods = (*e.models, NOTHING, MEAN_1, MEAN_2, REAL)
    return {
        group: {
            method: age_figures(e.requests.targets[rows], e.looks[method].ages[rows])
            | {"mean_gap": mean(e.requests.gaps[rows])}
            for method in methods
        }
        for group, rows in e.requests.groups().items()
    }


def fooled_section(e: Evaluation) -> dict:
    """Return model -> group -> how much more the loss's estimators read than the judge, and on untouched pictures."""
    section: dict[str, dict] = {}
    untouched = e.looks[NOTHING].readers - e.looks[NOTHING].ages
    for model in e.models:
        composites = e.looks[model].readers - e.looks[model].ages
        section[model] = {}
        for group, rows in e.requests.groups().items():
            toward = np.sign(e.requests.gaps[rows])
            section[model][group] = {
                "n": int(rows.sum()),
                "composites": mean(composites[rows]),
                "untouched": mean(untouched[rows]),
                "fooled": mean(toward * (composites - untouched)[rows]),
            }
    return section


def identity_section(e: Evaluation) -> dict:
    """Return group -> method -> cosine and share verified."""
    return {
        group: {
            method: e.identity(e.looks[method].embeddings[rows], e.requests.faces[rows])
            for method in (*e.models, NOTHING, MEAN_1, MEAN_2, BLUR, OTHER)
        }
        for group, rows in e.requests.groups().items()
    }


def kid_section(e: Evaluation, faces: FaceSet) -> tuple[dict, dict]:
    """Return method -> KID over the pooled requests, and what they were compared with.

    The real pictures are training pictures of the half that the judge did not learn from: validation has too few.
    """
    random = np.random.default_rng(SEED)
    pooled, groups = e.requests.pooled, age_group(e.requests.targets)
    scores: dict[str, list[tuple[int, float]]] = {m: [] for m in (REAL_PAIR, *e.models, NOTHING, MEAN_1, MEAN_2, BLUR)}
    sizes = {"real": 0, "other": 0}
    for group, (first, last) in enumerate(AGE_GROUPS):
        rows = np.flatnonzero(pooled & (groups == group))
        near = np.flatnonzero(~faces.validation & (faces.ages >= first) & (faces.ages <= last))
        unseen = faces.rows(np.sort(random.permutation(near)[: 2 * REAL_PER_GROUP])).half(1 - HALF)
        if min(len(rows), len(unseen)) < MIN_SET:
            continue
        real = e.panel.features(unseen.pixels)
        other = e.val_looks.features[(e.val.ages >= first) & (e.val.ages <= last)]
        sizes["real"] += len(real)
        sizes["other"] += len(other)
        sets = {m: other if m == REAL_PAIR else e.looks[m].features[rows] for m in scores}
        for method, features in sets.items():
            scores[method].append((len(rows), kid(features, real)))
    section = {}
    for method, pairs in scores.items():
        n = sum(count for count, _ in pairs)
        total = sum(count * value for count, value in pairs)
        section[method] = {"n": sizes["other"] if method == REAL_PAIR else n, "kid": total / n if n else math.nan}
    return section, sizes | {"which": "training pictures that the judge did not learn from"}


def sharpness_section(e: Evaluation) -> dict:
    """Return method -> the median and the 5 to 95 % range of the sharpness ratios over the pooled requests."""
    section = {}
    rows = np.flatnonzero(e.requests.pooled)
    for method, made in e.pictures.items():
        ratios = []
        for i in rows:
            face = e.requests.faces[i]
            before = e.originals[face]
            inside = mask_in_picture(before, e.drawn.landmarks[face]) > 0.5
            ratios.append(sharpness_ratios(luma(made[i]), luma(before), inside))
        section[method] = {"n": len(rows)} | {
            kind: dict(
                zip(
                    ("median", "low", "high"),
                    map(float, np.quantile([r[kind] for r in ratios], (0.5, 0.05, 0.95))),
                    strict=True,
                )
            )
            for kind in ("laplacian", "gradient")
        }
    return section


def outside_section(e: Evaluation, changes: dict[str, IntArray]) -> dict:
    """Return method -> in how many pictures something changed outside the mask, and by how many codes at most.

    Args:
        e: for the pictures of which the answer is known.
        changes: model -> [R], its largest changes, in codes.
    """

    def figures(codes: IntArray) -> dict[str, int]:
        return {"n": len(codes), "changed": int((codes > 0).sum()), "max": int(codes.max(initial=0))}

    def known(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, int]:
        codes = []
        for picture, matrix in zip(e.originals, align_faces(e.drawn.landmarks, PICTURE_CROP_PX), strict=True):
            height, width = picture.shape[:2]
            codes.append(largest_change(change(picture), picture, ~touchable(matrix, PICTURE_CROP_PX, (height, width))))
        return figures(np.array(codes))

    models = {model: figures(codes) for model, codes in changes.items()}
    return models | {NOTHING: known(lambda picture: picture), BLUR_ALL: known(blur)}


def slices_section(e: Evaluation, model: str) -> dict:
    """Return a model's figures of the pooled requests by gender, race and source age, and the largest gap in a line."""
    faces = e.drawn.rows(e.requests.faces)
    spans = [f"{first}-{last}" for first, last in AGE_GROUPS]
    by = {
        "gender": (faces.genders, GENDERS),
        "race label": (faces.races, RACES),
        "source age": (age_group(faces.ages), spans),
    }
    rows = []
    for name, (labels, words) in by.items():
        for label, word in enumerate(words):
            which = np.flatnonzero(e.requests.pooled & (labels == label))
            if len(which):
                looks = e.looks[model].rows(which)
                row: dict = {"by": name, "slice": word} | e.identity(looks.embeddings, e.requests.faces[which])
                rows.append(row | age_figures(e.requests.targets[which], looks.ages))
    return {"rows": rows, "line": _worst_slices(rows)}


def _worst_slices(rows: list[dict]) -> str:
    """Name the kind of slice with the widest spread and its worst slice, for the error and for identity."""
    said = []
    kinds: tuple[tuple[str, str, str, int, Worse], ...] = (
        ("mae", "MAE", "years", 1, "up"),
        ("verified_1", "verified at 1 %", "points", 100, "down"),
    )
    for key, what, unit, scale, worse in kinds:
        groups = {by: [row for row in rows if row["by"] == by] for by in dict.fromkeys(row["by"] for row in rows)}
        spread = {by: max(r[key] for r in g) - min(r[key] for r in g) for by, g in groups.items()}
        widest = max(spread, key=lambda by: spread[by])
        worst = (min if worse == "down" else max)(rows, key=lambda r: r[key])
        if not spread[widest]:
            said.append(f"{what}: the same in every slice")
            continue
        said.append(
            f"{what}: largest gap {show(scale * spread[widest], 2, 'up')} {unit}, by {widest}; worst slice "
            f"{worst['slice']} ({show(scale * worst[key], 2, worse)}, n = {worst['n']})"
        )
    return "; ".join(said) + "."
