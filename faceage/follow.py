"""Follow faces through one window of a video: forwards, backwards, and across gaps.

A `Follower` holds the faces that are in view (`live`) and those lost a short while ago (`lost`). It knows
nothing of shots, windows or smoothing: that is `faceage.track`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from faceage.kernels import cut_out
from faceage.types import Faces, FloatArray, Frame

VELOCITY_GAIN = 0.5
"""Share of the newest step in a face's velocity: a mean over about two steps halves the detector's noise."""
BOX_GAIN = 0.5
"""Share of the newest box in the one to look from next; the rest is the last one, moved by the landmarks. The
search square trembles less, and the landmarks with it (half as much on a talking head)."""
MAX_SIZE_RATIO = 1.7
"""Two boxes of one face differ by less than this in size: beyond, it is somebody nearer or farther."""
JUMP_MARGIN = 0.2
"""Of two tracks on one face, one is to blame for jumping there if its affinity to where it was expected is
lower than the other's by this much: less is noise."""
SEARCH_SIDES = 3.0
"""Side of the region in which a lost face is searched, in sides of its box."""


class FaceDetector(Protocol):
    """What the tracker needs of a detector; `detect` and `refine` may run at once in two threads."""

    def detect(self, frames: Sequence[Frame], least: float = 1.0) -> Faces:
        """Return every face of the frames, `frame_index` into the list; those of `least` smallest sides or more."""

    def refine(self, frames: Sequence[Frame], faces: Faces) -> Faces:
        """Return the given faces with better boxes, landmarks and scores, one a face, in the same order."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """How faces are followed. Distances are in sides of the face's box."""

    detect_every: int = 10
    """Frames between two detections, at least 1. New faces are found by the next and followed back."""
    complete_every: int = 4
    """A detection is complete at least once in so many, 1 or more. While little of the picture changes, the others look
    for faces of twice the smallest side only, at a quarter of the cost."""
    keep_score: float = 0.6
    """A refined face scoring less than this, in [0, 1], has been lost."""
    sure_score: float = 0.95
    """A face that was detected only once, in [0, 1], must reach this to count."""
    match_iou: float = 0.3
    """Boxes that overlap by this much, in (0, 1], can be one face..."""
    match_distance: float = 0.5
    """...and so can boxes whose centres are this near, > 0: small faces move by more than their box."""
    collapse_iou: float = 0.5
    """Two tracks that overlap by this much, in (0, 1], have fallen onto one face."""
    min_track_frames: int = 5
    """Shorter tracks are dropped, unless the shot is as short; at least 1."""
    max_gap_frames: int = 15
    """A face that comes back after at most this many frames is the same track; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("detect_every", "complete_every", "min_track_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("keep_score", "sure_score", "match_iou", "collapse_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be in [0, 1]")
        if self.match_distance <= 0 or self.max_gap_frames < 0:
            raise ValueError("match_distance must be positive and max_gap_frames not negative")


class Sight(NamedTuple):
    """One face in one frame."""

    frame: int
    box: FloatArray
    landmarks: FloatArray
    score: float
    detected: bool


@dataclass(eq=False)
class Path:
    """A face being followed, forwards or backwards."""

    sights: list[Sight]
    """Those not handed out yet, and always the newest."""
    velocity: FloatArray = field(default_factory=lambda: np.zeros(2, np.float32))
    """Pixels a frame, in the direction of following."""
    track_id: int = -1
    """Not negative once the first sight has been handed out."""
    handed_out: int = 0
    """How many of the sights have been handed out: the newest one is kept to follow on from."""
    searched: bool = False
    """Whether it was searched for in this window."""

    def add(self, sight: Sight) -> None:
        """Go on to a sight in a neighbouring frame."""
        last = self.sights[-1]
        moved = sight.landmarks.mean(0) - last.landmarks.mean(0)
        self.velocity += VELOCITY_GAIN * (moved / abs(sight.frame - last.frame) - self.velocity)
        carried = last.box + np.tile(moved, 2)
        self.sights.append(sight._replace(box=carried + BOX_GAIN * (sight.box - carried)))

    def turn(self) -> None:
        """Change the direction of following."""
        self.sights.reverse()
        self.velocity = -self.velocity

    def box_at(self, frame: int) -> FloatArray:
        """Return where the box is expected, by constant velocity: float32 [4]."""
        last = self.sights[-1]
        return last.box + np.tile(self.velocity, 2) * abs(frame - last.frame)


class Follower:
    """The faces of one shot."""

    def __init__(self, detector: FaceDetector, config: TrackConfig, frame: Frame, index: int) -> None:
        """Begin with the faces of the shot's first frame, `index` in the video."""
        self._detector = detector
        self._config = config
        self.live: list[Path] = []
        """Faces seen in the newest frame."""
        self.lost: list[Path] = []
        """Faces that may come back."""
        self.live = self._begin(_sights(detector.detect([frame]), index), frame, index)

    def follow(self, span: list[Frame], first: int, key: Future[Faces], *, is_complete: bool = True) -> None:
        """Follow all faces through a window, forwards and then the newly found ones backwards.

        Args:
            span: the window's frames, from its key frame to the next one, both included.
            first: index in the video of `span[0]`, the newest frame so far.
            key: what will have been detected in `span[-1]`.
            is_complete: whether the smallest faces were looked for too: then who was not found there is lost.
        """
        # Older tracks first, those not numbered yet last: `_drop_collapsed` relies on it.
        self.live.sort(key=lambda path: (path.track_id < 0, path.track_id))
        for path in self.live:
            path.searched = False
        for offset, frame in enumerate(span[1:-1], 1):
            self._step(frame, first + offset, None, is_complete=False)
        last = first + len(span) - 1
        unknown = self._step(span[-1], last, _sights(key.result(), last), is_complete=is_complete)
        new = self._begin(unknown, span[-1], last)
        self._follow_back(new, span, first)
        self._rejoin(new)

    def hand_out(self, end: int) -> list[tuple[Path, Sight]]:
        """Return the sights before frame `end` that were not handed out yet; forget paths lost for good."""
        rows = []
        for path in self.live + self.lost:
            rows += [(path, sight) for sight in path.sights[path.handed_out :] if sight.frame < end]
            rest = [sight for sight in path.sights if sight.frame >= end]
            path.handed_out = 0 if rest else 1
            path.sights = rest or path.sights[-1:]
        oldest = end - 1 - self._config.max_gap_frames
        self.lost = [path for path in self.lost if path.sights[-1].frame >= oldest]
        return rows

    def _step(self, frame: Frame, index: int, key: list[Sight] | None, *, is_complete: bool) -> list[Sight]:
        """Carry the live faces forward by one frame; return the detections that are nobody's.

        On a key frame (its detections are given) a face that a complete detection does not confirm is lost; on
        others, a face that cannot be carried on is searched for, once a window.
        """
        paths = self.live
        sights = self._refine(paths, frame, index)
        missing = [path for path, sight in zip(paths, sights, strict=True) if not sight and not path.searched]
        detected = self._search(missing, frame, index) if key is None else key
        expected = [sight.box if sight else path.box_at(index) for path, sight in zip(paths, sights, strict=True)]
        pairs = _assign(self._affinity(expected, [sight.box for sight in detected]))
        for row, column in pairs:
            sight = sights[row]
            sights[row] = sight._replace(detected=True) if sight else detected[column]
        self._drop_collapsed(paths, sights, index)
        self.live = []
        for path, sight in zip(paths, sights, strict=True):
            if sight is None or (is_complete and not sight.detected):
                self.lost.append(path)
            else:
                path.add(sight)
                self.live.append(path)
        matched = {column for _, column in pairs}
        return [sight for column, sight in enumerate(detected) if column not in matched]

    def _search(self, paths: list[Path], frame: Frame, index: int) -> list[Sight]:
        """Run the full detector around the places where faces are expected."""
        found = []
        for path in paths:
            path.searched = True
            box = path.box_at(index)
            reach = SEARCH_SIDES / 2 * _side(box[None])
            centre = (box[:2] + box[2:]) / 2
            region, corner = cut_out(frame, centre - reach, centre + reach)
            if region is not None:
                for sight in _sights(self._detector.detect([region]), index):
                    moved = sight.box + np.tile(corner, 2)
                    found.append(sight._replace(box=moved, landmarks=sight.landmarks + corner))
        return found

    def _refine(self, paths: list[Path], frame: Frame, index: int) -> list[Sight | None]:
        """Look for the paths' faces where they are expected in a frame; None where there is none."""
        if not paths:
            return []
        boxes = np.stack([path.box_at(index) for path in paths])
        shift = np.stack([path.velocity for path in paths])
        guess = Faces(
            frame_index=np.zeros(len(paths), np.int64),
            boxes=boxes,
            landmarks=np.stack([path.sights[-1].landmarks for path in paths]) + shift[:, None],
            scores=np.array([path.sights[-1].score for path in paths], np.float32),
        )
        found = _sights(self._detector.refine([frame], guess), index, detected=False)
        good = [
            sight.score >= self._config.keep_score and self._affinity([box], [sight.box])[0, 0] > 0
            for sight, box in zip(found, boxes, strict=True)
        ]
        return [sight if keep else None for sight, keep in zip(found, good, strict=True)]

    def _begin(self, sights: list[Sight], frame: Frame, index: int) -> list[Path]:
        """Return a path for each detection, refined as the sights after it: or it would begin with a jerk.

        Twice, because only then does the detector's box stay where it is.
        """
        paths = [Path([sight]) for sight in sights]
        for _ in range(2):
            for path, sight in zip(paths, self._refine(paths, frame, index), strict=True):
                if sight:
                    path.sights = [sight._replace(detected=True)]
        return paths

    def _follow_back(self, new: list[Path], span: list[Frame], first: int) -> None:
        """Follow new faces from the key frame that showed them back to the window's first frame at most."""
        active = new
        for offset in range(len(span) - 2, -1, -1):
            index = first + offset
            taken = [s.box for path in self.live + self.lost for s in path.sights if s.frame == index]
            going = []
            for path, sight in zip(active, self._refine(active, span[offset], index), strict=True):
                if sight is None or self._overlaps(sight, taken):
                    continue
                taken.append(sight.box)
                path.add(sight)
                going.append(path)
            active = going
        for path in new:
            path.turn()

    def _rejoin(self, new: list[Path]) -> None:
        """Continue lost tracks by the new paths that begin where they ended; the others are new tracks."""
        affinity = np.zeros((len(self.lost), len(new)), np.float32)
        for row, path in enumerate(self.lost):
            last = path.sights[-1]
            for column, other in enumerate(new):
                start = other.sights[0]
                if 0 < start.frame - last.frame <= self._config.max_gap_frames + 1:
                    # It went on as before, or it did not: a walking head turns back within the gap.
                    places = [path.box_at(start.frame), last.box]
                    affinity[row, column] = self._affinity(places, [start.box]).max()
        joined = {column: self.lost[row] for row, column in _assign(affinity)}
        for column, path in joined.items():
            path.sights += new[column].sights
            path.velocity = new[column].velocity
        self.live += [path for column, path in enumerate(new) if column not in joined]
        self.live += joined.values()
        self.lost = [path for path in self.lost if path not in joined.values()]

    def _drop_collapsed(self, paths: list[Path], sights: list[Sight | None], index: int) -> None:
        """Where two paths have fallen onto one face, lose the one that jumped there, else the younger one."""
        rows = [row for row, sight in enumerate(sights) if sight]
        for n, row in enumerate(rows):
            for other in rows[:n]:
                a, b = sights[row], sights[other]
                if not a or not b or not self._overlaps(a, [b.box]):
                    continue
                jump_a = self._affinity([paths[row].box_at(index)], [a.box])[0, 0]
                jump_b = self._affinity([paths[other].box_at(index)], [b.box])[0, 0]
                sights[other if jump_b < jump_a - JUMP_MARGIN else row] = None

    def _affinity(self, boxes: Sequence[FloatArray], others: Sequence[FloatArray]) -> FloatArray:
        """Return how well boxes fit as one face: float32 [P, D], 0 where they cannot be one, at most 2."""
        if not len(boxes) or not len(others):
            return np.zeros((len(boxes), len(others)), np.float32)
        a, b = np.stack(boxes), np.stack(others)
        side_a, side_b = _side(a)[:, None], _side(b)[None]
        side = (side_a + side_b) / 2
        offset = (a[:, None, :2] + a[:, None, 2:] - b[None, :, :2] - b[None, :, 2:]) / 2
        distance = np.linalg.norm(offset, axis=-1) / side
        iou = _iou(a, b)
        same_size = np.maximum(side_a, side_b) < MAX_SIZE_RATIO * np.minimum(side_a, side_b)
        near = (iou >= self._config.match_iou) | (distance <= self._config.match_distance)
        return np.where(same_size & near, iou + 1 / (1 + distance), 0).astype(np.float32)

    def _overlaps(self, sight: Sight, boxes: Sequence[FloatArray]) -> bool:
        """Return whether a face lies on one of the boxes."""
        return bool(len(boxes)) and bool((_iou(sight.box[None], np.stack(boxes)) >= self._config.collapse_iou).any())


def _sights(faces: Faces, frame: int, *, detected: bool = True) -> list[Sight]:
    """Return the faces of one frame one by one."""
    rows = zip(faces.boxes, faces.landmarks, faces.scores, strict=True)
    return [Sight(frame, box, landmarks, float(score), detected) for box, landmarks, score in rows]


def _side(boxes: FloatArray) -> FloatArray:
    """Return the side of the square of each box's area, in pixels."""
    return np.sqrt(np.maximum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), 1e-6))


def _iou(boxes: FloatArray, others: FloatArray) -> FloatArray:
    """Return the intersection over union of every pair: float32 [P, D]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=-1)
    return common / (_side(boxes)[:, None] ** 2 + _side(others)[None] ** 2 - common)


def _assign(affinity: FloatArray) -> list[tuple[int, int]]:
    """Return (row, column) pairs, the best fitting first, each row and column once."""
    pairs = []
    affinity = affinity.copy()
    while affinity.size and affinity.max() > 0:
        row, column = np.unravel_index(affinity.argmax(), affinity.shape)
        pairs.append((int(row), int(column)))
        affinity[row] = 0
        affinity[:, column] = 0
    return pairs
