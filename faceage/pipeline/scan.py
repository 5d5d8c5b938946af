"""The first pass over a video: decode, detect, track, and measure who is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from faceage.align import face_quality
from faceage.checkpoint import sha256_of
from faceage.kernels import computing
from faceage.media.video import VideoReader
from faceage.pipeline.people import join_tracks
from faceage.pipeline.plan import SEGMENT_FRAMES, Plan, PlannedTrack, choose_boundaries
from faceage.pipeline.request import Networks, mean_appearance
from faceage.pipeline.threads import read_ahead, timed
from faceage.pipeline.timer import StageTimer
from faceage.track import TrackConfig, Tracker, Window
from faceage.types import Appearance, Frame

Progress = Callable[[str, int, int | None], None]
"""(pass "scan" or "render", frames done, frames in all if known)."""

AHEAD_FRAMES = 12
"""Frames decoded ahead: about a window of the tracker, which takes them a window at a time."""
WELL_KNOWN, WELL_KNOWN_EVERY = 4, 4
"""A track's best face is measured in each window; once there are so many samples, in one of so many windows."""


def scan(
    networks: Networks,
    reader: VideoReader,
    config: TrackConfig | None = None,
    *,
    sha256: str | None = None,
    segment_frames: int = SEGMENT_FRAMES,
    timer: StageTimer | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Find out everything about a video that rendering it has to know, whatever is wished.

    Args:
        networks: from `load_networks`; the ager plays no part.
        reader: of the video, or of a range of it; read to its end.
        config: how faces are followed.
        sha256: of the video, if it is known already.
        segment_frames: frames in a segment, about; see `plan.choose_boundaries`.
        timer: gets the time that each stage takes.
        progress: called now and then, from this thread.

    Raises:
        MediaError: if no frame decodes.
    """
    timer = timer or StageTimer()
    tracker = Tracker(networks.detector, config)
    samples: dict[int, _Samples] = {}
    pts: list[int] = []
    # How many frames a part of a video has shows only when they are decoded.
    total = reader.info.frame_count if reader.start_s is None and reader.end_s is None else None
    decoded = read_ahead(timed(reader, "decode", timer), AHEAD_FRAMES)
    windows = tracker.scan(_noting_times(decoded, pts))
    measured: list[Callable[[], None]] = []
    with computing(networks.device):
        while True:
            with timer("detect and track"):
                window = next(windows, None)
            if window is None:
                break
            with timer("read people"):
                measured.append(_begin_sample(networks, window, samples))
            if progress:
                progress("scan", window.first_frame + len(window.frames), total)
            del window
        for finish in measured:
            finish()
    tracks = sorted(tracker.tracks(), key=lambda track: (track.first_frame, track.track_id))
    appearances = [mean_appearance(samples[track.track_id].appearances) for track in tracks]
    people = join_tracks(tracks, appearances)
    shots = np.array(tracker.shot_starts, np.int64)
    return Plan(
        sha256=sha256 or sha256_of(reader.info.path),
        start_s=reader.start_s,
        end_s=reader.end_s,
        width=reader.info.width,
        height=reader.info.height,
        rotation=reader.info.rotation,
        time_base=reader.info.time_base,
        pts=np.array(pts, np.int64),
        shots=shots,
        boundaries=choose_boundaries(len(pts), shots, segment_frames),
        tracks=tuple(
            PlannedTrack(
                track=track,
                person=person,
                ages=np.array(samples[track.track_id].ages, np.float32),
                appearance=appearance,
            )
            for track, person, appearance in zip(tracks, people, appearances, strict=True)
        ),
        estimators=networks.estimators,
        damage=reader.damage,
        can_seek=reader.damage is None and not reader.counts_times,
    )


def _noting_times(frames: Iterable[Frame], pts: list[int]) -> Iterator[Frame]:
    for frame in frames:
        pts.append(frame.pts)
        yield frame
        del frame


@dataclass
class _Samples:
    """What was measured on a track's best faces."""

    windows: int = 0
    """Windows that the track was seen in."""
    asked: int = 0
    """Windows that it is measured in."""
    ages: list[float] = field(default_factory=list)
    appearances: list[Appearance] = field(default_factory=list)

    def wants_more(self) -> bool:
        """Return whether the track is to be measured in one more window."""
        self.windows += 1
        is_wanted = self.asked < WELL_KNOWN or self.windows % WELL_KNOWN_EVERY == 0
        self.asked += is_wanted
        return is_wanted


def _begin_sample(networks: Networks, window: Window, samples: dict[int, _Samples]) -> Callable[[], None]:
    """Measure tracks of the window on their best faces there; return what puts that into their samples.

    Nothing waits for a device in between: what was measured is needed when all tracks are known.
    """
    faces, ids = window.faces, window.track_ids
    quality = face_quality(faces.landmarks, faces.scores)
    rows = [
        max(np.flatnonzero(ids == track_id).tolist(), key=lambda row: quality[row])
        for track_id in np.unique(ids).tolist()
        if samples.setdefault(track_id, _Samples()).wants_more()
    ]
    if not rows:
        return lambda: None
    chosen = faces[np.array(rows, np.int64)]
    tracks = [samples[int(ids[row])] for row in rows]
    arrived = networks.begin_measuring(window.frames, chosen)

    def finish() -> None:
        for track, age, appearance in zip(tracks, *arrived(), strict=True):
            track.ages.append(float(age))
            track.appearances.append(appearance)

    return finish
