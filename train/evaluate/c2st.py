"""Classifier two-sample test: can a classifier that is trained afterwards tell made faces from real ones of the age?

AUC on held-out faces of a logistic regression on LBP histograms, band energies and statistics of chroma, all inside the
face: 0.5 where nothing tells the two apart, 1 where everything does. A loss cannot learn to please it, for it is
trained anew on what was made, and it sees what an age estimator does not: texture and tint that no real face has. Both
sets must have gone through the same alignment, resampling and compression (`train.evaluate.appearance.view`).

On the fine band (log luma finer than S/8, divided by its local deviation) neither light, tint nor contrast counts: what
is left is the pattern of wrinkles and pores.

References: Lopez-Paz, Oquab: Revisiting classifier two-sample tests, ICLR 2017; Ojala et al.: Multiresolution
gray-scale and rotation invariant texture classification with local binary patterns, TPAMI 2002.
"""

from __future__ import annotations

import cv2
import numpy as np

from faceage.geometry import face_mask
from faceage.types import FloatArray, IntArray
from train.evaluate.bands import REGIONS, band_energies, blur, log_luma, region_mask, split_bands

FINE_SIGMA = 1 / 16
"""Blur that separates the fine band, in sides of the crop: half a period of S/8."""
LBP_SCALES = (1, 2, 4)
"""The picture is reduced by these before its patterns are counted."""
RIDGE = 0.03
"""Weight of the squared coefficients, of standardised features, beside the mean loss."""
FOLDS, REPEATS = 5, 2


def _uniform_codes() -> IntArray:
    """Return the bin of each 8-bit pattern: 58 with at most two changes around the circle, and one for the others."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(1)
    codes = np.full(256, 58)
    codes[changes <= 2] = np.arange((changes <= 2).sum())
    return codes


_CODES = _uniform_codes()
_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def lbp_histogram(maps: FloatArray, mask: np.ndarray) -> FloatArray:
    """Count uniform local binary patterns of float32 [N, S, S] where `mask` [S, S] is true.

    Returns:
        Square roots of the frequencies: float32 [N, 59].
    """
    inner = maps[:, 1:-1, 1:-1]
    side = maps.shape[1]
    code = np.zeros(inner.shape, np.uint8)
    for bit, (y, x) in enumerate(_NEIGHBOURS):
        code |= (maps[:, 1 + y : side - 1 + y, 1 + x : side - 1 + x] >= inner).astype(np.uint8) << bit
    bins = _CODES[code[:, mask[1:-1, 1:-1]]]
    counts = np.stack([np.bincount(row, minlength=59) for row in bins])
    return np.sqrt(counts / counts.sum(1, keepdims=True)).astype(np.float32)


def _patterns(maps: FloatArray) -> FloatArray:
    """Return LBP histograms at all `LBP_SCALES`: float32 [N, 59 x scales]."""
    columns = []
    for scale in LBP_SCALES:
        side = maps.shape[1] // scale
        small = np.stack([cv2.resize(each, (side, side), interpolation=cv2.INTER_AREA) for each in maps])
        columns.append(lbp_histogram(small, face_mask(side) > 0.5))
    return np.concatenate(columns, 1)


def _by_region(maps: FloatArray) -> FloatArray:
    """Return the mean and deviation of float32 [N, S, S] in each region: float32 [N, 2 R]."""
    parts = [maps[:, region_mask(region, maps.shape[1])] for region in REGIONS]
    return np.stack([figure for part in parts for figure in (part.mean(1), part.std(1))], 1)


def full_features(crops: np.ndarray) -> FloatArray:
    """Return what the classifier sees of uint8 RGB [N, S, S, 3]: float32 [N, D]."""
    luma = log_luma(crops)
    logs = np.log(crops.astype(np.float32) / 255 + 0.04)
    energies = band_energies(crops).reshape(len(crops), -1)
    chroma = [_by_region(logs[..., channel] - logs[..., 1]) for channel in (0, 2)]
    return np.concatenate([_patterns(luma), energies, _by_region(luma - luma.mean((1, 2), keepdims=True)), *chroma], 1)


def fine_band(crops: np.ndarray) -> np.ndarray:
    """Return log luma finer than S/8, divided by its local deviation: float32 [N, S, S]."""
    luma = log_luma(crops)
    sigma = FINE_SIGMA * crops.shape[1]
    fine = luma - blur(luma, sigma)
    return fine / (np.sqrt(blur(fine * fine, sigma)) + 0.01)


def fine_features(crops: np.ndarray) -> FloatArray:
    """Return what the classifier sees of the fine band alone: float32 [N, D]."""
    fine = fine_band(crops)
    squared = np.square(split_bands(fine))
    energies = [np.log(squared[:, :, region_mask(region, crops.shape[1])].mean(-1).T + 1e-6) for region in REGIONS]
    skewness = [np.mean(fine[:, region_mask(region, crops.shape[1])] ** 3, 1, keepdims=True) for region in REGIONS]
    return np.concatenate([_patterns(fine), *energies, *skewness], 1)


def fit_logistic(x: FloatArray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fit a ridge logistic regression by Newton's method.

    Args:
        x: float [N, D], standardised; a column of ones is added.
        y: float [N], 0 or 1.
        weights: float [N], of the samples; they sum to 1.

    Returns:
        Coefficients, the constant last: float64 [D + 1].
    """
    x = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    ridge = np.full(x.shape[1], RIDGE)
    ridge[-1] = 1e-6  # the constant is free
    coefficients = np.zeros(x.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(x @ coefficients, -30, 30)))
        gradient = x.T @ (weights * (p - y)) + ridge * coefficients
        hessian = (x.T * (weights * p * (1 - p))) @ x + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        coefficients -= step
        if np.abs(step).max() < 1e-4:
            break
    return coefficients


def auc(negative: FloatArray, positive: FloatArray) -> float:
    """Return the probability that a positive's score is above a negative's; ties count half."""
    above = positive[:, None] - negative[None]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def held_out_auc(made: FloatArray, real: FloatArray, seed: int = 0) -> dict[str, float]:
    """Train and test the classifier by cross validation over faces.

    Args:
        made: features [N, D], one row a face.
        real: features [M, D], of other people.
        seed: of the folds.

    Returns:
        auc, the mean over `REPEATS` divisions into folds; error, its standard error by a bootstrap over the faces.
    """
    x = np.concatenate([made, real])
    y = np.repeat([0.0, 1.0], [len(made), len(real)])
    random = np.random.default_rng(seed)
    scores = np.zeros((REPEATS, len(x)))
    for repeat in range(REPEATS):
        fold = np.empty(len(x), int)
        for kind in (0, 1):  # as many of a kind in each fold
            rows = np.flatnonzero(y == kind)
            fold[random.permutation(rows)] = np.arange(len(rows)) % FOLDS
        for i in range(FOLDS):
            train, test = fold != i, fold == i
            mean, deviation = x[train].mean(0), x[train].std(0) + 1e-6
            weights = np.where(y[train] == 0, 0.5 / (y[train] == 0).sum(), 0.5 / (y[train] == 1).sum())
            coefficients = fit_logistic((x[train] - mean) / deviation, y[train], weights)
            scores[repeat, test] = (x[test] - mean) / deviation @ coefficients[:-1] + coefficients[-1]
    areas = [auc(row[y == 0], row[y == 1]) for row in scores]
    ranks = scores.argsort(1).argsort(1).mean(0)
    below, above = ranks[y == 0], ranks[y == 1]
    drawn = [auc(random.choice(below, len(below)), random.choice(above, len(above))) for _ in range(100)]
    return {"auc": float(np.mean(areas)), "error": float(np.std(drawn))}
