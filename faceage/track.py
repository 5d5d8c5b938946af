"""Who is who: follow every face through a video.

Tracking is offline: it reads the whole clip once before anything is rendered, so it may look ahead and
back. The stream is cut into windows between *key frames*, `detect_every` frames apart and at both ends of a
shot. The full detector runs on key frames only, and while the picture hardly changes on some of them for larger faces
only; in between, every face is carried from frame to frame by the detector's last network alone (`refine`). A face that
a key frame shows for the first time is followed backwards into the window before it, so nobody appears late.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from faceage.cuts import split_spans
from faceage.follow import FaceDetector, Follower, TrackConfig
from faceage.kernels import Thumbnail
from faceage.smooth import smooth_landmarks
from faceage.types import Faces, FloatArray, Frame, IntArray

T = TypeVar("T")

DEFAULT_FRAME_RATE = 25.0
"""Frames per second, for frames without time stamps."""
COARSE_LEAST = 2.0
"""Side of the smallest faces that a coarse detection looks for, in smallest sides."""
CHANGED_LUMA, CHANGED_FRACTION = 8.0, 0.25
"""A detection is complete if more than this fraction of the picture's thumbnail has changed by more than these codes of
8 bits since the last complete one. A street changes so much in ten frames, somebody who talks does not."""
TRUSTED_GAP_FRAMES = 2
"""Filled frames within this distance of a seen one keep its score; deeper in a gap the face is hidden."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A run of consecutive frames of one shot, with the faces found in them."""

    first_frame: int
    """Index in the video of `frames[0]`."""
    frames: list[Frame]
    faces: Faces
    """As measured, not smoothed, by frame and track; `frame_index` counts from the window's first frame."""
    track_ids: IntArray
    """int64 [F]. Ids that `Tracker.tracks` does not have were false alarms."""
    shot: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Track:
    """One person in one shot: a face in every frame from the first to the last."""

    track_id: int
    shot: int
    first_frame: int
    """Index in the video of the first row."""
    landmarks: FloatArray
    """float32 [T, 5, 2], frame pixels, smoothed, one row per consecutive frame."""
    scores: FloatArray
    """float32 [T], the detector's confidence in [0, 1]; 0 where the face was hidden for longer."""
    starts_shot: bool
    """Whether the face is there from the first frame of its shot, so that it need not fade in."""
    ends_shot: bool
    """Whether it is there until the last one."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def last_frame(self) -> int:
        """Index in the video of the last row."""
        return self.first_frame + len(self) - 1


class _Found(NamedTuple):
    """The rows of one window or one track."""

    track_ids: IntArray
    frames: IntArray
    landmarks: FloatArray
    scores: FloatArray
    detected: npt.NDArray[np.bool_]


class Tracker:
    """Follows every face of a video: iterate over `scan`, then take `tracks`."""

    def __init__(self, detector: FaceDetector, config: TrackConfig | None = None) -> None:
        self._detector = detector
        self._config = config or TrackConfig()
        self._next_id = 0
        self._found: list[_Found] = []
        self.shot_starts: list[int] = []
        """The first frame of every shot read so far."""
        self._frame_count = 0
        self._times_s = (0.0, 0.0)

    def scan(self, frames: Iterable[Frame]) -> Iterator[Window]:
        """Read the video once, and yield it window by window.

        Only two windows and the few frames that the cut detector looks ahead are held at a time. The key frames at
        the ends of both are detected in threads of their own while the first is being followed.
        """
        follower: Follower | None = None
        with ThreadPoolExecutor(2) as workers:
            spans = (
                (span, ends_shot, least, workers.submit(self._detector.detect, span[-1:], least))
                for span, ends_shot, least in self._spans(frames)
            )
            for span, ends_shot, least, found in _one_ahead(spans):
                first = self._frame_count
                if follower is None:
                    self.shot_starts.append(first)
                    follower = Follower(self._detector, self._config, span[0], first)
                if len(span) > 1:
                    follower.follow(span, first, found, is_complete=least == 1)
                shown = span if ends_shot else span[:-1]
                self._times_s = (self._times_s[0] if first else span[0].time_s, shown[-1].time_s)
                self._frame_count += len(shown)
                yield self._hand_out(follower, shown, first)
                del span, shown  # or they would be held while the next span is read
                follower = None if ends_shot else follower

    def _spans(self, frames: Iterable[Frame]) -> Iterator[tuple[list[Frame], bool, float]]:
        """Yield the spans of the video, whether they end their shots, and the least face to detect at their ends."""
        seen: Thumbnail | None = None  # the newest complete detection of the shot
        ago = 0
        for span, ends_shot, now in split_spans(frames, self._config.detect_every):
            ago += 1
            # The first key frame after a shot's start is complete too: people may look away at first.
            is_complete = seen is None or ends_shot or ago >= self._config.complete_every or _has_changed(seen, now)
            yield span, ends_shot, 1.0 if is_complete else COARSE_LEAST
            if is_complete:
                seen, ago = None if ends_shot else now, 0

    def tracks(self) -> list[Track]:
        """Return the smoothed tracks of all windows read so far, false alarms left out, ordered by id."""
        if not self._next_id:
            return []
        found = _Found(*(np.concatenate(column) for column in zip(*self._found, strict=True)))
        order = np.lexsort((found.frames, found.track_ids))
        ends = np.flatnonzero(np.diff(found.track_ids[order])) + 1
        tracks = [self._finish(_Found._make(column[rows] for column in found)) for rows in np.split(order, ends)]
        return [track for track in tracks if track is not None]

    def _hand_out(self, follower: Follower, shown: list[Frame], first: int) -> Window:
        """Number the new tracks and return the window of the frames `shown`."""
        rows = follower.hand_out(first + len(shown))
        for path, _ in sorted(rows, key=lambda row: (row[1].frame, *row[1].box)):
            if path.track_id < 0:
                path.track_id = self._next_id
                self._next_id += 1
        rows.sort(key=lambda row: (row[1].frame, row[0].track_id))
        sights = [sight for _, sight in rows]
        count = len(sights)
        faces = Faces(
            frame_index=np.array([sight.frame - first for sight in sights], np.int64),
            boxes=np.array([sight.box for sight in sights], np.float32).reshape(count, 4),
            landmarks=np.array([sight.landmarks for sight in sights], np.float32).reshape(count, 5, 2),
            scores=np.array([sight.score for sight in sights], np.float32),
        )
        ids = np.array([path.track_id for path, _ in rows], np.int64)
        detected = np.array([sight.detected for sight in sights], bool)
        self._found.append(_Found(ids, faces.frame_index + first, faces.landmarks, faces.scores, detected))
        shot = len(self.shot_starts) - 1
        return Window(first_frame=first, frames=shown, faces=faces, track_ids=ids, shot=shot)

    def _finish(self, found: _Found) -> Track | None:
        """Fill and smooth one track; None for a false alarm."""
        first, last = int(found.frames[0]), int(found.frames[-1])
        shot = bisect.bisect_right(self.shot_starts, first) - 1
        shot_end = self.shot_starts[shot + 1] if shot + 1 < len(self.shot_starts) else self._frame_count
        shortest = min(self._config.min_track_frames, shot_end - self.shot_starts[shot])
        if len(found.frames) < shortest:
            return None
        if found.detected.sum() < 2 and found.scores[found.detected].max(initial=0) < self._config.sure_score:
            return None
        rows = found.frames - first
        every = np.arange(last - first + 1)
        observed = np.isin(every, rows)
        landmarks = np.zeros((len(every), 5, 2), np.float32)
        landmarks[rows] = found.landmarks
        scores = np.interp(every, rows, found.scores).astype(np.float32)
        near = np.convolve(observed, np.ones(2 * TRUSTED_GAP_FRAMES + 1))[TRUSTED_GAP_FRAMES:-TRUSTED_GAP_FRAMES]
        scores[near < 0.5] = 0
        return Track(
            track_id=int(found.track_ids[0]),
            shot=shot,
            first_frame=first,
            landmarks=smooth_landmarks(landmarks, scores, observed, self._frame_rate()),
            scores=scores,
            starts_shot=first == self.shot_starts[shot],
            ends_shot=last == shot_end - 1,
        )

    def _frame_rate(self) -> float:
        """Return the mean frames per second of what was read."""
        start, end = self._times_s
        return (self._frame_count - 1) / (end - start) if end > start else DEFAULT_FRAME_RATE


def _has_changed(before: Thumbnail, after: Thumbnail) -> bool:
    """Return whether so much of a picture has changed that small new faces are likely."""
    return float((np.abs(after.luma - before.luma) > CHANGED_LUMA).mean()) > CHANGED_FRACTION


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Iterate, taking each item before the one before it is handed out."""
    for item in items:
        previous = item
        break
    else:
        return
    for item in items:
        yield previous
        previous = item
    yield previous
