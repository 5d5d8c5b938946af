"""Who is who over the shots of a video."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from faceage.track import Track
from faceage.types import Appearance, FloatArray

SAME_PERSON = 0.6
"""Cosine of two tracks' mean identity embeddings from which they are one person's. With the bundled identity network,
three stretches of two seconds of a talking head have 0.65 to 0.80 to one another, and 33 pairs of people who are in the
street clip at the same time at most 0.43. Of photos (FG-NET), 0.2 % of 115,605 pairs of two people reach it, 0.02 % of
4,727 pairs of two adults of like age, and 29 % of 383 pairs of one person at most two years apart: it matters more that
two people are never one than that one is found again."""


def join_tracks(tracks: Sequence[Track], appearances: Sequence[Appearance], same: float = SAME_PERSON) -> list[int]:
    """Number the people of a video, from 1 in order of appearance, and return each track's.

    Shot by shot, the most similar pair of a track and a person comes first. Two people on screen at the same time are
    never one. A person's embedding is the mean of those of their tracks, weighted by length.

    Args:
        tracks: in any order.
        appearances: one a track.
        same: cosine from which a track is a person's.
    """
    numbers = [0] * len(tracks)
    sums: list[FloatArray] = []

    def place(row: int) -> tuple[int, int, int]:
        return tracks[row].shot, tracks[row].first_frame, tracks[row].track_id

    for _, group in groupby(sorted(range(len(tracks)), key=place), key=lambda row: tracks[row].shot):
        waiting = list(group)
        placed: list[int] = []  # tracks of other shots are of other times
        while waiting:
            cosines = _cosines([appearances[row].embedding for row in waiting], sums)  # [waiting, people]
            for at, row in enumerate(waiting):
                taken = [numbers[other] - 1 for other in placed if _overlap(tracks[row], tracks[other])]
                cosines[at, taken] = -1
            best = int(cosines.argmax()) if cosines.size else 0
            if cosines.size and cosines.flat[best] >= same:
                row, person = waiting.pop(best // len(sums)), best % len(sums)
            else:  # nobody is like anybody: whoever appears first is somebody new
                row, person = waiting.pop(0), len(sums)
                sums.append(np.zeros_like(appearances[row].embedding))
            sums[person] = sums[person] + len(tracks[row]) * appearances[row].embedding
            numbers[row] = person + 1
            placed.append(row)
    return numbers


def _cosines(embeddings: list[FloatArray], sums: list[FloatArray]) -> FloatArray:
    """Return the cosine of each of F embeddings and P sums of such: float32 [F, P]."""
    if not sums:
        return np.zeros((len(embeddings), 0), np.float32)
    directions = np.stack(sums)
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-9)
    return np.stack(embeddings) @ directions.T


def _overlap(a: Track, b: Track) -> bool:
    return a.first_frame <= b.last_frame and b.first_frame <= a.last_frame
