"""Who is who over the shots of a video."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from faceage.track import Track
from faceage.types import Appearance, FloatArray

SAME_PERSON = 0.65
"""Cosine of two tracks' mean identity embeddings from which they are one person's. Of 115,605 pairs of photos of two
people (FG-NET, the bundled identity network) one in a thousand reaches it, of 4,727 pairs of two adults of like age
fewer; of 383 pairs of photos of one person that are two years apart at most a fifth does. In a video, the faces of one
person are more alike, and it matters more that two people are never one than that one is found again."""


def join_tracks(tracks: Sequence[Track], appearances: Sequence[Appearance], same: float = SAME_PERSON) -> list[int]:
    """Number the people of a video, from 1 in order of appearance, and return each track's.

    Shot by shot, the most similar pair of a track and a person comes first. Two people on screen at the same time are
    never one. A person's embedding is the mean of those of their tracks, weighted by length.

    Args:
        tracks: in any order.
        appearances: one a track.
        same: cosine from which a track is a person's.
    """
    people: list[list[int]] = []
    sums: list[FloatArray] = []
    numbers = [0] * len(tracks)

    def join(row: int, person: int) -> None:
        people[person].append(row)
        sums[person] = sums[person] + len(tracks[row]) * appearances[row].embedding
        numbers[row] = person + 1

    order = sorted(
        range(len(tracks)), key=lambda row: (tracks[row].shot, tracks[row].first_frame, tracks[row].track_id)
    )
    while order:
        waiting = [row for row in order if tracks[row].shot == tracks[order[0]].shot]
        order = order[len(waiting) :]
        while waiting:
            pairs = [
                (_cosine(sums[person], appearances[row].embedding), -row, -person)
                for row in waiting
                for person, members in enumerate(people)
                if not any(_overlap(tracks[row], tracks[member]) for member in members)
            ]
            cosine, row, person = max(pairs, default=(-1.0, 0, 0))
            if cosine >= same:
                row, person = -row, -person
            else:  # nobody is like anybody: whoever appears first is somebody new
                row, person = waiting[0], len(people)
                people.append([])
                sums.append(np.zeros_like(appearances[row].embedding))
            join(row, person)
            waiting.remove(row)
    return numbers


def _cosine(total: FloatArray, embedding: FloatArray) -> float:
    return float(total @ embedding / max(float(np.linalg.norm(total) * np.linalg.norm(embedding)), 1e-9))


def _overlap(a: Track, b: Track) -> bool:
    return a.first_frame <= b.last_frame and b.first_frame <= a.last_frame
