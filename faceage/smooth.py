"""Zero-phase smoothing of the landmarks of a track.

Each coordinate x_t of a whole track solves a penalised least-squares problem,

    min  sum_t w_t (x_t - y_t)^2 + sum_t u_t (x_{t-1} - 2 x_t + x_{t+1})^2,

which is the Rauch-Tung-Striebel smoother of a constant-velocity model (measurement precision w_t,
acceleration precision u_t) written as one five-diagonal system. It looks both ways in time, so it has no
lag; a straight motion has no acceleration and is returned as it is; frames without a measurement (w_t = 0)
are filled in. Both precisions are re-estimated a few times: w_t falls for outliers, u_t for true
accelerations, so a quick nod is not shrunk while a still head does not tremble.

Lengths are in units of the face's size, times in seconds, so neither resolution nor frame rate matters.

Reference: Eilers, Analytical Chemistry 2003 (the penalised smoother); Rauch, Tung, Striebel, AIAA 1965.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from faceage.types import FloatArray

Array = npt.NDArray[np.float64]

MEASUREMENT_NOISE = 0.004
"""Standard deviation of O-Net's landmarks, in face sizes (fourth differences of a calm head at 1080p)."""
MEASUREMENT_NOISE_PX = 0.35
"""The part of it that does not shrink with the face, in pixels (the same of small faces in a street)."""
ACCELERATION = 6.0
"""Usual acceleration of a head, in face sizes per second squared: 1 to 3 when talking, 20 to 70 when walking.
Chosen for the least error on paths of both with noise added; from 4 to 10 it hardly matters."""
ACCELERATION_FREEDOM = 2.0
"""Degrees of freedom of the accelerations' Student's t distribution: a heavy tail lets quick motion pass."""
OUTLIER_NOISE = 3.0
OUTLIER_SIZE = 0.03
OUTLIER_MOTION = 3.0
"""An outlier is off the median of its neighbours by more than so many standard deviations of the noise, plus
this part of the face, plus so many times what is usual around it: the last is much if the camera shakes."""
OUTLIER_WEIGHT = 1e-3
"""What is left of an outlier's weight."""
ROUNDS = 5
"""Estimates of the accelerations; one more moves a landmark by 0.1 % of a calm face, 1 % of a walking one."""
HALF_WINDOW = 7
"""Frames each way over which the face's size and what is usual are medians."""
MIN_SCORE = 0.1
"""Scores below count as this one: keeps the system regular."""


def smooth_landmarks(
    landmarks: FloatArray, scores: FloatArray, observed: npt.NDArray[np.bool_], frame_rate: float
) -> FloatArray:
    """Return the landmarks of one track without jitter, without lag, and with its holes filled.

    Args:
        landmarks: float32 [T, 5, 2], frame pixels, one row per consecutive frame.
        scores: float32 [T], the detector's confidence in [0, 1].
        observed: bool [T], false for the rows to fill in. The first and the last must be true.
        frame_rate: frames per second.

    Returns:
        float32 [T, 5, 2], frame pixels.
    """
    count = len(landmarks)
    if count < 3:
        return landmarks.copy()
    size = _local_size(landmarks, observed)
    noise = np.hypot(MEASUREMENT_NOISE * size, MEASUREMENT_NOISE_PX)
    flat = landmarks.reshape(count, 10).astype(np.float64)
    trust = np.clip(scores, MIN_SCORE, 1) * np.where(_outliers(flat, observed, noise, size), OUTLIER_WEIGHT, 1)
    weight = np.where(observed, trust / noise**2, 0.0)
    calm = ((frame_rate**2 / (ACCELERATION * size)) ** 2)[1:-1]
    pull = calm
    for _ in range(ROUNDS):
        smooth = solve_penalised(flat, weight, pull)
        # The acceleration of the centre of the five points: quieter than each of them, and common to all.
        centre = smooth.reshape(count, 5, 2).mean(1)
        squared = (np.diff(centre, 2, axis=0) ** 2).sum(1) * calm
        pull = calm * (ACCELERATION_FREEDOM + 2) / (ACCELERATION_FREEDOM + squared)
    return smooth.reshape(count, 5, 2).astype(np.float32)


def solve_penalised(values: Array, weight: Array, pull: Array) -> Array:
    """Minimise sum weight (x - values)^2 + sum pull (second difference of x)^2, for each column.

    The normal matrix is five-diagonal and shared by the columns: L D L^T, then two substitutions.

    Args:
        values: float64 [T, C]; rows of weight 0 are ignored.
        weight: float64 [T], not negative, at least two of them positive.
        pull: float64 [T - 2], positive, for the second differences about rows 1 .. T - 2.

    Returns:
        float64 [T, C].
    """
    count = len(values)
    u = np.zeros(count + 1)  # u[t] belongs to the second difference about row t; none about the ends
    u[1 : count - 1] = pull
    diagonal = weight + 4 * u[:count] + u[1:]
    diagonal[1:] += u[: count - 1]
    first = (-2 * (u[:-1] + u[1:])).tolist()  # to the next row
    second = u[1:].tolist()  # to the row after it
    pivot, low1, low2 = diagonal.tolist(), [0.0] * count, [0.0] * count
    solved = weight[:, None] * values
    for t in range(count):
        if t > 0:
            first[t] -= low1[t - 1] * pivot[t - 1] * low2[t - 1]
            pivot[t] -= low1[t - 1] ** 2 * pivot[t - 1]
            solved[t] -= low1[t - 1] * solved[t - 1]
        if t > 1:
            pivot[t] -= low2[t - 2] ** 2 * pivot[t - 2]
            solved[t] -= low2[t - 2] * solved[t - 2]
        low1[t], low2[t] = first[t] / pivot[t], second[t] / pivot[t]
    solved /= np.array(pivot)[:, None]
    for t in range(count - 2, -1, -1):
        solved[t] -= low1[t] * solved[t + 1]
        if t < count - 2:
            solved[t] -= low2[t] * solved[t + 2]
    return solved


def _local_size(landmarks: FloatArray, observed: npt.NDArray[np.bool_]) -> Array:
    """Return the face's size in each row, in pixels, slowly varying: float64 [T].

    The larger of eye distance and eyes-to-mouth distance: a head's turn shrinks the first, a nod the other.
    """
    eyes = np.linalg.norm(landmarks[:, 1] - landmarks[:, 0], axis=-1)
    middle = (landmarks[:, 0] + landmarks[:, 1] - landmarks[:, 3] - landmarks[:, 4]) / 2
    size = np.maximum(eyes, np.linalg.norm(middle, axis=-1))
    rows = np.flatnonzero(observed)
    size = np.interp(np.arange(len(size)), rows, size[rows])
    return np.maximum(np.median(_neighbours(size, HALF_WINDOW, mode="edge"), -1), 1.0)


def _outliers(flat: Array, observed: npt.NDArray[np.bool_], noise: Array, size: Array) -> npt.NDArray[np.bool_]:
    """Return which rows are far off what the rows around them say, and alone in that: bool [T]."""
    rows = np.flatnonzero(observed)
    outlier = np.zeros(len(flat), bool)
    if len(rows) < 5:
        return outlier
    # A cubic through rows -2, -1, 1, 2 misses row 0 by a sixth of the fourth difference.
    near = _neighbours(flat[rows], 2, mode="reflect")  # [R, 10, 5]
    rough = np.abs(near @ np.array([1, -4, 6, -4, 1])) / 6
    # The median of five tells which row is to blame, even of two in a row.
    off = np.abs(flat[rows] - np.median(near, -1))
    rough, off = _rms(rough), _rms(off)
    usual = np.median(_neighbours(off, HALF_WINDOW, mode="edge"), -1)
    limit = OUTLIER_NOISE * noise[rows] + OUTLIER_SIZE * size[rows] + OUTLIER_MOTION * usual
    reach = _neighbours(rows, 2, mode="reflect")
    gapless = reach[:, -1] - reach[:, 0] == 4
    outlier[rows] = (_neighbours(rough, 2, mode="edge").max(-1) > limit) & (off > limit) & gapless
    return outlier


def _rms(offsets: Array) -> Array:
    """Return the root mean square length of five points' offsets [T, 10]: float64 [T]."""
    return np.sqrt((offsets**2).sum(1) / 5)


def _neighbours(values: npt.NDArray, reach: int, *, mode: Literal["edge", "reflect"]) -> npt.NDArray:
    """Return each row with those around it, on a last axis [2 reach + 1].

    The ends are continued by their last row ("edge") or point-symmetrically, as a motion goes on ("reflect").
    """
    padding = ((reach, reach),) + ((0, 0),) * (values.ndim - 1)
    if mode == "edge":
        padded = np.pad(values, padding, mode="edge")
    else:
        padded = np.pad(values, padding, mode="reflect", reflect_type="odd")
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0)
