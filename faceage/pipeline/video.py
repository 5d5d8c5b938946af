"""Age every face of a video, in two passes.

The first pass scans: it decodes, detects and tracks, and reads each person's age. It keeps only tracks, so memory is
flat. The second renders: it decodes again, ages each person at key frames, and adds the change back into every frame.
So every person is known from the first frame of a shot on, smoothing may look both ways, and rendering a stretch of
frames depends on little but the tracks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from faceage.agers.base import Key, Look
from faceage.align import align_faces, choose_size, face_weights, pose_weights, prepare_crops
from faceage.blend import blend_faces
from faceage.media.rotation import upright
from faceage.media.video import EncodeOptions, VideoReader, VideoWriter, writable
from faceage.pipeline.request import AgeRequest, Networks, StageTimer, mean_appearance, resolve_ages
from faceage.pipeline.threads import WriteBehind, read_ahead
from faceage.track import Track, TrackConfig, Tracker, Window
from faceage.types import Appearance, FloatArray, Frame

Progress = Callable[[str, int, int | None], None]
"""(pass "scan" or "render", frames done, frames in all if known)."""

KEY_EVERY_FRAMES = 12
"""Frames between two key frames of a person: the change is computed there and mixed in between. Half a second at 25
frames a second: expressions change the face, but hardly the difference that age makes to it. Frames are rendered in
chunks from one key frame to the next."""
QUEUED_FRAMES = 4
"""Frames decoded ahead, and frames waiting for the encoder: enough to keep three threads busy."""
SCAN_AHEAD_FRAMES = 12
"""Frames decoded ahead while scanning: about a window of the tracker, which takes them a window at a time."""
SAMPLES_PER_WINDOW = 1
"""Faces a track and window whose age is read, and whose appearance is measured if the ager needs it."""


@dataclass(frozen=True, kw_only=True)
class Person:
    """One track, ready to be rendered."""

    track: Track
    source_age: float
    target_age: float
    look: Look
    """What the ager decided about the person."""
    sizes_px: tuple[int, ...]
    """Sides of the crops that the person is aged in, one a view."""
    frame_to_crop: tuple[FloatArray, ...]
    """float32 [T, 2, 3] a view."""
    weights: FloatArray
    """float32 [T], in [0, 1]."""


@dataclass(kw_only=True)
class VideoReport:
    """What was done to one video."""

    source: str
    target: str
    frames: int = 0
    """Frames of the output. Where no face is to be changed, it is a copy of the source, byte for byte."""
    frames_with_faces: int = 0
    people: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    stage_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds a frame; stages overlap, so they add up to more than the wall time."""
    damage: str | None = None
    """What is missing of a damaged source, in one line."""


def age_video(
    networks: Networks,
    source: Path,
    target: Path,
    request: AgeRequest,
    *,
    encode: EncodeOptions | None = None,
    track: TrackConfig | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    progress: Progress | None = None,
) -> VideoReport:
    """Age every face of a video and write it like the source was.

    Args:
        networks: from `load_networks`.
        source: the video.
        target: the output; it appears when it is complete.
        request: whom to age, and how.
        encode: how the output is encoded.
        track: how faces are followed.
        start_s: frames before this time are left out.
        end_s: frames from this time on are left out.
        progress: called now and then, from this thread.

    Raises:
        MediaError: if the source is no video, or the output cannot be written.
        UnsupportedError: for a pixel format or container that cannot be used.
    """
    start = perf_counter()
    timer = StageTimer()
    report = VideoReport(source=str(source), target=str(target))
    notify = progress or (lambda *_: None)
    with (
        VideoReader(source, start_s=start_s, end_s=end_s) as first_pass,
        VideoReader(source, start_s=start_s, end_s=end_s) as second_pass,
        # The writer is opened before the long scan, so that an output that cannot be written is known at once.
        VideoWriter(target, second_pass, encode) as writer,
    ):
        people = scan(networks, first_pass, request, track, timer, notify)
        report.frames = first_pass.frames_read
        report.damage = first_pass.damage
        renderer = Renderer(networks, people, timer)
        if not any(person.weights.any() for person in people) and writer.can_copy_source:
            writer.copy_source()
        else:
            _render(renderer, second_pass, writer, timer, lambda done: notify("render", done, report.frames))
    report.frames_with_faces = renderer.frames_with_faces
    report.people = [renderer.describe(person) for person in people]
    report.seconds = perf_counter() - start
    report.stage_ms = timer.ms_per(report.frames)
    return report


def _render(
    renderer: Renderer, reader: VideoReader, writer: VideoWriter, timer: StageTimer, notify: Callable[[int], None]
) -> None:
    """Decode, change and encode every frame: three threads, bounded queues between them."""
    frames = read_ahead(timed(reader, "decode", timer), QUEUED_FRAMES)

    def encode(frame: Frame) -> None:
        with timer("encode"):
            writer.write(frame)

    with WriteBehind(encode, QUEUED_FRAMES) as out:
        for done, frame in enumerate(renderer.render(frames, reader.info.rotation), 1):
            out.put(frame)
            del frame
            notify(done)


def timed(items: Iterable[Frame], stage: str, timer: StageTimer) -> Iterator[Frame]:
    """Iterate, counting the time that the source takes toward a stage."""
    iterator = iter(items)
    while True:
        with timer(stage):
            item = next(iterator, None)
        if item is None:
            return
        yield item
        del item


def scan(
    networks: Networks, reader: VideoReader, request: AgeRequest, config: TrackConfig | None, timer: StageTimer,
    notify: Progress,
) -> list[Person]:  # fmt: skip
    """Return the people of a video, in order of appearance."""
    tracker = Tracker(networks.detector, config)
    samples: dict[int, _Samples] = {}
    # How many frames a part of a video has shows only when they are decoded.
    total = reader.info.frame_count if reader.start_s is None and reader.end_s is None else None
    decoded = read_ahead(timed(reader, "decode", timer), SCAN_AHEAD_FRAMES)
    frames = (upright(frame, reader.info.rotation) for frame in decoded)
    windows = tracker.scan(frames)
    while True:
        with timer("detect and track"):
            window = next(windows, None)
        if window is None:
            break
        with timer("source age"):
            _sample(networks, window, samples)
        notify("scan", window.first_frame + len(window.frames), total)
        del window
    tracks = tracker.tracks()
    if request.faces == "largest":
        tracks = _most_prominent(tracks)
    rate = float(reader.info.average_rate or 25)
    return _people(networks, tracks, [samples[t.track_id] for t in tracks], request, rate)


@dataclass
class _Samples:
    """What was measured on a track's best faces."""

    ages: list[float] = field(default_factory=list)
    appearances: list[Appearance] = field(default_factory=list)
    """As many, or none if the ager needs none."""


def _sample(networks: Networks, window: Window, samples: dict[int, _Samples]) -> None:
    """Measure each track of the window on its best faces there."""
    faces, ids = window.faces, window.track_ids
    quality = pose_weights(faces.landmarks, faces.scores) + 1e-3 * faces.scores
    rows = [
        row
        for track_id in np.unique(ids)
        for row in sorted(np.flatnonzero(ids == track_id), key=lambda r: -quality[r])[:SAMPLES_PER_WINDOW]
    ]
    chosen = faces[np.array(rows, np.int64)]
    mine = [samples.setdefault(int(ids[row]), _Samples()) for row in rows]
    for sample, age in zip(mine, networks.read_ages(window.frames, chosen), strict=True):
        sample.ages.append(float(age))
    if networks.ager.needs_appearance:
        for sample, appearance in zip(mine, networks.sample_appearances(window.frames, chosen), strict=True):
            sample.appearances.append(appearance)


def _most_prominent(tracks: list[Track]) -> list[Track]:
    """Return the track of each shot that covers the most picture, over all its frames together."""

    def size(track: Track) -> float:
        spread = track.landmarks - track.landmarks.mean(1, keepdims=True)
        return float(np.square(spread).sum())

    by_shot = itertools.groupby(sorted(tracks, key=lambda t: t.shot), key=lambda t: t.shot)
    return [max(group, key=size) for _, group in by_shot]


def _people(
    networks: Networks, tracks: list[Track], samples: list[_Samples], request: AgeRequest, rate: float
) -> list[Person]:
    """Decide how each track is aged, from its samples."""
    ager = networks.ager
    estimated = np.array([np.median(sample.ages) for sample in samples], np.float32)
    source, target = resolve_ages(estimated, request)
    appearances = [mean_appearance(sample.appearances) for sample in samples] if ager.needs_appearance else []
    people = []
    for i, (track, look) in enumerate(zip(tracks, ager.look(appearances, source, target), strict=True)):
        sizes = tuple(choose_size(track.landmarks, view) for view in ager.views)
        weights = face_weights(
            track.landmarks, track.scores, fade_in=not track.starts_shot, fade_out=not track.ends_shot, frame_rate=rate
        )
        people.append(
            Person(
                track=track,
                source_age=float(source[i]),
                target_age=float(target[i]),
                look=look,
                sizes_px=sizes,
                frame_to_crop=tuple(
                    align_faces(track.landmarks, size, view.template)
                    for size, view in zip(sizes, ager.views, strict=True)
                ),
                weights=weights * request.strength,
            )
        )
    return people


@dataclass
class _Keys:
    """What is known of one person so far: the newest key frames."""

    frames: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    """The ager's, one a frame."""
    identity: float | None = None
    """Cosine of the embeddings before and after, at the first key frame."""

    def around(self, frame: int) -> tuple[Key, Key, float]:
        """Return the keys before and after a frame, and where it lies between them: the arguments of `Ager.draw`."""
        after = int(np.searchsorted(self.frames, frame))
        if self.frames[after] == frame:
            return self.keys[after], self.keys[after], 0.0
        before = after - 1
        share = (frame - self.frames[before]) / (self.frames[after] - self.frames[before])
        return self.keys[before], self.keys[after], share


class Renderer:
    """Adds the people's change to the frames of a video, in order."""

    def __init__(self, networks: Networks, people: list[Person], timer: StageTimer) -> None:
        self._networks = networks
        self._timer = timer
        self._waiting = sorted(people, key=lambda p: p.track.first_frame)
        self._in_view: list[Person] = []
        self._keys = {person.track.track_id: _Keys() for person in people}
        self.frames_with_faces = 0

    def describe(self, person: Person) -> dict:
        """Return what was done to one person, for the report."""
        keys = self._keys[person.track.track_id]
        return {
            "track": person.track.track_id,
            "shot": person.track.shot,
            "first_frame": person.track.first_frame,
            "last_frame": person.track.last_frame,
            "source_age": round(person.source_age, 1),
            "target_age": round(person.target_age, 1),
            "identity": None if keys.identity is None else round(keys.identity, 3),
        }

    def render(self, frames: Iterator[Frame], rotation: int) -> Iterator[Frame]:
        """Yield the frames, those with a face in them changed."""
        first = 0
        chunk = list(itertools.islice(frames, KEY_EVERY_FRAMES + 1))
        while chunk:
            # The chunk's last frame belongs to the next one; here it only ends the last interval between key frames.
            shown = chunk[:KEY_EVERY_FRAMES]
            self._age_key_frames([upright(f, rotation) for f in chunk], first)
            rest = chunk[KEY_EVERY_FRAMES:]
            del chunk
            while shown:
                yield self._blend(shown.pop(0), first, rotation)
                first += 1
            chunk = rest + list(itertools.islice(frames, KEY_EVERY_FRAMES + 1 - len(rest)))

    def _age_key_frames(self, frames: list[Frame], first: int) -> None:
        """Compute the change of every person at the key frames among `frames`, in batches of one of each person."""
        last = first + len(frames) - 1
        self._in_view = [p for p in self._in_view if p.track.last_frame >= first]
        while self._waiting and self._waiting[0].track.first_frame <= last:
            self._in_view.append(self._waiting.pop(0))
        wanted: list[tuple[Person, list[int]]] = []
        for person in self._in_view:
            keys = self._keys[person.track.track_id]
            keys.frames, keys.keys = keys.frames[-1:], keys.keys[-1:]
            wanted.append((person, [f for f in self._key_frames(person, first, last) if f not in keys.frames]))
        while wanted := [(person, rest) for person, rest in wanted if rest]:
            # In order: each key frame of a person starts from the one before.
            batches: dict[tuple[int, ...], list[tuple[Person, int]]] = {}
            for person, rest in wanted:
                batches.setdefault(person.sizes_px, []).append((person, rest.pop(0)))
            for batch in batches.values():
                self._age(frames, first, batch)

    def _age(self, frames: list[Frame], first: int, batch: list[tuple[Person, int]]) -> None:
        """Compute the change of people at a key frame each; all have the same sizes."""
        ager = self._networks.ager
        with self._timer("gather"):
            landmarks = np.stack([person.track.landmarks[frame - person.track.first_frame] for person, frame in batch])
            indices = np.array([frame - first for _, frame in batch])
            crops = [
                prepare_crops(frames, indices, landmarks, view, size)
                for view, size in zip(ager.views, batch[0][0].sizes_px, strict=True)
            ]
        known = [self._keys[person.track.track_id] for person, _ in batch]
        with self._timer("age"):
            looks = [person.look for person, _ in batch]
            keys = ager.observe(looks, crops, [mine.keys[-1] if mine.keys else None for mine in known])
            rows = [row for row, mine in enumerate(known) if mine.identity is None]
            if rows:
                changes = [ager.draw(looks[row], keys[row], keys[row], 0.0)[0] for row in rows]
                measured = self._networks.measure_identity(crops[0][np.array(rows)], changes)
                for row, identity in zip(rows, measured, strict=True):
                    known[row].identity = float(identity)
        for mine, key, (_, frame) in zip(known, keys, batch, strict=True):
            mine.frames.append(frame)
            mine.keys.append(key)

    @staticmethod
    def _key_frames(person: Person, first: int, last: int) -> list[int]:
        """Return the key frames of a person among `first` to `last`: the grid's, and the ends of the track.

        Intervals in which the person's weight is 0 throughout need none.
        """
        track = person.track
        low, high = max(first, track.first_frame), min(last, track.last_frame)
        if low > high:
            return []
        grid = range(-(-low // KEY_EVERY_FRAMES) * KEY_EVERY_FRAMES, high + 1, KEY_EVERY_FRAMES)
        wanted = sorted({low, high} | set(grid)) if low <= high else []
        visible = person.weights > 0

        def matters(frame: int) -> bool:
            at = frame - track.first_frame
            return bool(visible[max(0, at - KEY_EVERY_FRAMES) : at + KEY_EVERY_FRAMES + 1].any())

        return [frame for frame in wanted if matters(frame)]

    def _blend(self, frame: Frame, index: int, rotation: int) -> Frame:
        """Return the frame with everybody's change added."""
        present = [
            (person, at)
            for person in self._in_view
            if 0 <= (at := index - person.track.first_frame) < len(person.track) and person.weights[at] > 0
        ]
        if not present:
            return frame
        self.frames_with_faces += 1
        with self._timer("blend"):
            frame = writable(frame)
            ours = upright(frame, rotation)
            for person, at in present:
                before, after, share = self._keys[person.track.track_id].around(index)
                changes = self._networks.ager.draw(person.look, before, after, share)
                matrices = [matrix[at] for matrix in person.frame_to_crop]
                blend_faces(ours, changes, [float(person.weights[at])] * len(changes), matrices)
        return frame
