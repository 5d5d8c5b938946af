"""What a scorecard measures, as functions of arrays: ages, identity, pictures, motion.

Nothing here knows of the product or of a data set, so each can be tried on arrays with a known answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from faceage.geometry import face_mask
from faceage.types import FloatArray

Bools = npt.NDArray[np.bool_]


def age_figures(requested: np.ndarray, judged: np.ndarray) -> dict[str, float]:
    """Compare ages [N] with those that were asked for.

    Returns:
        n; mae and bias (judged - requested) in years; Pearson's r, NaN where either does not vary.
    """
    error = np.asarray(judged, np.float64) - requested
    varies = len(error) > 2 and np.ptp(requested) > 0 and np.ptp(judged) > 0
    return {
        "n": len(error),
        "mae": float(np.abs(error).mean()) if len(error) else math.nan,
        "bias": float(error.mean()) if len(error) else math.nan,
        "r": float(np.corrcoef(requested, judged)[0, 1]) if varies else math.nan,
    }


def match_thresholds(embeddings: FloatArray, rates: Sequence[float]) -> tuple[list[float], int]:
    """Return the cosines that a pair of different pictures exceeds at the given rates.

    Every pair counts as one of strangers. Where the same person is among the pictures twice, the threshold is too high
    and fewer are verified, never more.

    Args:
        embeddings: float32 [N, D], unit vectors.
        rates: false matches allowed, as a share of the pairs.

    Returns:
        A threshold a rate: at most that share of the pairs lies above it; and the number of pairs.
    """
    cosines = embeddings @ embeddings.T
    cosines = cosines[np.triu_indices(len(embeddings), 1)]
    order = np.sort(cosines)[::-1]
    return [float(order[math.floor(rate * len(order))]) for rate in rates], len(order)


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Return the kernel inception distance of two sets of features [N, D] and [M, D]; NaN for fewer than two.

    The unbiased estimate of the squared maximum mean discrepancy under k(x, y) = (x.y / D + 1)^3: 0 on average for two
    sets of one distribution (so it can be negative), and not biased by the sets' sizes.

    Reference: Binkowski et al.: Demystifying MMD GANs, ICLR 2018, section 4 (with Inception's features there).
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def luma(picture: np.ndarray) -> FloatArray:
    """Return the luma of an RGB picture, uint8 [H, W, 3]: float32 [H, W], 0 to 255 (Rec. 601)."""
    return picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def sharpness_ratios(after: FloatArray, before: FloatArray, inside: Bools) -> dict[str, float]:
    """Compare the detail of two lumas [H, W] inside a mask: 1 is as sharp, below is softer, above is harsher.

    Returns:
        laplacian: the ratio of the root mean square Laplacians, the finest detail; gradient: that of the mean lengths
        of the gradients, coarser.
    """

    def laplacian(y: FloatArray) -> float:
        return float(np.sqrt(np.square(cv2.Laplacian(y, cv2.CV_32F))[inside].mean()))

    def gradient(y: FloatArray) -> float:
        gx, gy = (cv2.Sobel(y, cv2.CV_32F, dx, 1 - dx) for dx in (1, 0))
        return float(np.hypot(gx, gy)[inside].mean())

    return {
        name: measure(after) / max(measure(before), 1e-6)
        for name, measure in (("laplacian", laplacian), ("gradient", gradient))
    }


def picture_mask(frame_to_crop: FloatArray, size_px: int, shape: tuple[int, int]) -> FloatArray:
    """Return the blend mask of one aligned crop in its picture: float32 `shape` [H, W], in [0, 1].

    Args:
        frame_to_crop: float32 [2, 3], picture pixels to pixels of a crop with side `size_px`.
        size_px: side of the crop.
        shape: height and width of the picture.
    """
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(face_mask(size_px), frame_to_crop, shape[::-1], flags=flags)


def touchable(frame_to_crop: FloatArray, size_px: int, shape: tuple[int, int]) -> Bools:
    """Return which pixels of a picture the blend of one crop may change at all: bool `shape` [H, W].

    Arguments as `picture_mask`. `kernels.apply_change` spreads each crop pixel of the mask by a cubic of two pixels
    and a bilinear step of one at most; where the crop is finer than the picture, by a tent of the picture's pixel. One
    more is for the rounding of positions here.
    """
    crop_px_per_sample = math.sqrt(abs(np.linalg.det(frame_to_crop[:, :2])))
    reach = 4 if crop_px_per_sample < 1 else math.ceil(crop_px_per_sample) + 2
    support = cv2.dilate((face_mask(size_px) > 0).astype(np.uint8), np.ones((2 * reach + 1,) * 2, np.uint8))
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(support, frame_to_crop, shape[::-1], flags=flags) > 0


def largest_change(after: np.ndarray, before: np.ndarray, where: Bools) -> int:
    """Return the largest difference of two uint8 pictures [H, W, 3] where a mask [H, W] is true, in codes."""
    difference = np.abs(after.astype(np.int16) - before)[where]
    return int(difference.max(initial=0))


def optical_flow(now: npt.NDArray[np.uint8], before: npt.NDArray[np.uint8]) -> FloatArray:
    """Return where each pixel of `now` [H, W] was in `before`: float32 [H, W, 2], (x, y) offsets in pixels.

    Reference: Kroeger et al.: Fast optical flow using dense inverse search, ECCV 2016.
    """
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return flow.calc(now, before, None)


def warp_residual(now: FloatArray, before: FloatArray, flow: FloatArray, inside: Bools) -> tuple[float, float]:
    """Return (sum |now - before moved by the flow|, sum |now|) inside a mask: their ratio is the warp error.

    Args:
        now: float32 [H, W], the change that was made to this frame's luma.
        before: float32 [H, W], that of the frame before.
        flow: float32 [H, W, 2] of the source, as `optical_flow` returns it.
        inside: bool [H, W].
    """
    y, x = np.mgrid[: now.shape[0], : now.shape[1]].astype(np.float32)
    moved = cv2.remap(before, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return float(np.abs(now - moved)[inside].sum()), float(np.abs(now)[inside].sum())


def landmark_jitter(landmarks: FloatArray) -> float:
    """Return the root mean square second difference of landmarks over time, in distances between the eyes.

    Args:
        landmarks: float32 [T, 5, 2], one row a frame, NaN where there is none. True accelerations count too: compare
            two versions of the same track.

    Returns:
        NaN if no three rows follow one another.
    """
    eyes = np.linalg.norm(landmarks[:, 1] - landmarks[:, 0], axis=-1)[1:-1, None]
    trembling = np.linalg.norm(np.diff(landmarks, 2, axis=0), axis=-1) / eyes
    known = np.isfinite(trembling)
    return float(np.sqrt(np.square(trembling[known]).mean())) if known.any() else math.nan
