"""Pictures aged by the product's own path, as `faceage images` does."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from faceage.pipeline.photos import AgedPhoto, age_frames
from faceage.pipeline.request import AgeRequest, Networks
from faceage.types import RGB, FloatArray, Frame, IntArray
from train.evaluate.metrics import largest_change, touchable

BATCH_PICTURES = 8
SAME_FACE = 0.5
"""The product's face is the one that was asked for if their landmarks are nearer than this, in eye distances."""


@dataclass(frozen=True)
class Composites:
    """What the product made of R pictures."""

    pictures: list[np.ndarray]
    shares: FloatArray
    """[R], the share of the change that the face got: 0 where it was left alone, NaN where it was not found."""
    source_ages: FloatArray
    """[R], years, as the product estimated it; NaN where the face was not found."""
    outside: IntArray
    """[R], the largest change outside the masks of all faces that were found, in codes."""


class _Made(NamedTuple):
    """A row of `Composites`."""

    picture: np.ndarray
    share: float
    source_age: float
    outside: int


def age_pictures(
    networks: Networks,
    pictures: list[np.ndarray],
    landmarks: FloatArray,
    targets: FloatArray,
    *,
    is_present_age: bool = False,
) -> Composites:
    """Age pictures as `faceage images` does, each to its own target.

    Args:
        networks: of a model.
        pictures: uint8 [H, W, 3], RGB: R of them.
        landmarks: float32 [R, 5, 2], which face is meant.
        targets: float32 [R], years.
        is_present_age: the targets are given as the present ages too, instead of letting the product estimate those.
    """
    jobs = []
    for target in np.unique(targets):
        rows = np.flatnonzero(targets == target)
        jobs += [rows[i : i + BATCH_PICTURES] for i in range(0, len(rows), BATCH_PICTURES)]

    def work(rows: IntArray) -> list[_Made]:
        frames = [Frame(planes=(pictures[i].copy(),), pixel_format="rgb24", color=RGB) for i in rows]
        target = float(targets[rows[0]])
        request = AgeRequest(age=target, source_age=target if is_present_age else None)
        photos = age_frames(networks, frames, request)
        return [
            _inspect(frame.planes[0], pictures[i], photo, landmarks[i])
            for i, frame, photo in zip(rows, frames, photos, strict=True)
        ]

    made: dict[int, _Made] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows, done in zip(jobs, pool.map(work, jobs), strict=True):
            made |= dict(zip(rows.tolist(), done, strict=True))
    columns = zip(*(made[i] for i in range(len(pictures))), strict=True)
    after, shares, source_ages, outside = columns
    return Composites(list(after), np.array(shares), np.array(source_ages), np.array(outside))


def _inspect(after: np.ndarray, before: np.ndarray, photo: AgedPhoto, landmarks: FloatArray) -> _Made:
    """Measure what was done to one picture; `landmarks` [5, 2] say which face was meant."""
    share, source_age = math.nan, math.nan
    eyes = np.linalg.norm(landmarks[1] - landmarks[0])
    off = np.linalg.norm(photo.faces.landmarks - landmarks, axis=-1).mean(-1) / eyes
    if len(off) and off.min() < SAME_FACE:
        share, source_age = float(photo.weights[off.argmin()]), float(photo.source_ages[off.argmin()])
    inside = np.zeros(after.shape[:2], bool)
    for matrix, size, weight in zip(photo.frame_to_crop, photo.sizes_px, photo.weights, strict=True):
        if weight > 0:
            inside |= touchable(matrix, int(size), after.shape[:2])
    return _Made(after, share, source_age, largest_change(after, before, ~inside))
