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

from faceage.align import align_faces, choose_size, face_weights, pose_weights
from faceage.blend import blend_faces
from faceage.geometry import apply_affine
from faceage.kernels import gather_crops
from faceage.media.rotation import upright
from faceage.media.video import EncodeOptions, VideoReader, VideoWriter, writable
from faceage.pipeline.request import AgeRequest, Networks, StageTimer
from faceage.pipeline.threads import WriteBehind, read_ahead
from faceage.track import Track, TrackConfig, Tracker, Window
from faceage.types import FloatArray, Frame

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
AGE_SAMPLES_PER_WINDOW = 1
"""Faces a track and window whose age is read."""


@dataclass(frozen=True, kw_only=True)
class Person:
    """One track, ready to be rendered."""

    track: Track
    source_age: float
    target_age: float
    size_px: int
    """Side of the crops that the person is aged in."""
    frame_to_crop: FloatArray
    """float32 [T, 2, 3]."""
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
    samples: dict[int, list[float]] = {}
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
            _read_ages(networks, window, samples)
        notify("scan", window.first_frame + len(window.frames), total)
        del window
    tracks = tracker.tracks()
    if request.faces == "largest":
        tracks = _most_prominent(tracks)
    rate = float(reader.info.average_rate or 25)
    return [_person(t, samples.get(t.track_id, []), request, networks.ager.sizes_px, rate) for t in tracks]


def _read_ages(networks: Networks, window: Window, samples: dict[int, list[float]]) -> None:
    """Read the age of each track of the window on its best faces there."""
    faces, ids = window.faces, window.track_ids
    quality = pose_weights(faces.landmarks, faces.scores) + 1e-3 * faces.scores
    rows = [
        row
        for track_id in np.unique(ids)
        for row in sorted(np.flatnonzero(ids == track_id), key=lambda r: -quality[r])[:AGE_SAMPLES_PER_WINDOW]
    ]
    ages = networks.read_ages(window.frames, faces[np.array(rows, np.int64)])
    for row, age in zip(rows, ages, strict=True):
        samples.setdefault(int(ids[row]), []).append(float(age))


def _most_prominent(tracks: list[Track]) -> list[Track]:
    """Return the track of each shot that covers the most picture, over all its frames together."""

    def size(track: Track) -> float:
        spread = track.landmarks - track.landmarks.mean(1, keepdims=True)
        return float(np.square(spread).sum())

    by_shot = itertools.groupby(sorted(tracks, key=lambda t: t.shot), key=lambda t: t.shot)
    return [max(group, key=size) for _, group in by_shot]


def _person(track: Track, ages: list[float], request: AgeRequest, sizes_px: tuple[int, ...], rate: float) -> Person:
    size = choose_size(track.landmarks, sizes_px)
    source = request.source_age if request.source_age is not None else float(np.median(ages))
    weights = face_weights(
        track.landmarks, track.scores, fade_in=not track.starts_shot, fade_out=not track.ends_shot, frame_rate=rate
    )
    return Person(
        track=track,
        source_age=source,
        target_age=float(request.target_ages(np.array([source], np.float32))[0]),
        size_px=size,
        frame_to_crop=align_faces(track.landmarks, size),
        weights=weights * request.strength,
    )


@dataclass
class _Keys:
    """What is known of one person so far: the change at the newest key frames."""

    frames: list[int] = field(default_factory=list)
    deltas: list[FloatArray] = field(default_factory=list)
    latents: FloatArray | None = None
    identity: float | None = None
    """Cosine of the embeddings before and after, at the first key frame."""

    def delta_at(self, frame: int) -> FloatArray:
        """Mix the deltas of the key frames around a frame."""
        after = int(np.searchsorted(self.frames, frame))
        if self.frames[after] == frame:
            return self.deltas[after]
        before = after - 1
        share = (frame - self.frames[before]) / (self.frames[after] - self.frames[before])
        return (1 - share) * self.deltas[before] + share * self.deltas[after]


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
            keys.frames, keys.deltas = keys.frames[-1:], keys.deltas[-1:]
            wanted.append((person, [f for f in self._key_frames(person, first, last) if f not in keys.frames]))
        while wanted := [(person, rest) for person, rest in wanted if rest]:
            # In order: each key frame of a person starts from the one before.
            batches: dict[tuple[int, bool], list[tuple[Person, int]]] = {}
            for person, rest in wanted:
                kind = person.size_px, self._keys[person.track.track_id].latents is None
                batches.setdefault(kind, []).append((person, rest.pop(0)))
            for batch in batches.values():
                self._age(frames, first, batch)

    def _age(self, frames: list[Frame], first: int, batch: list[tuple[Person, int]]) -> None:
        """Compute the change of people at a key frame each; all have one size, and all have latents or none has."""
        size = batch[0][0].size_px
        with self._timer("gather"):
            at = [(person, frame - person.track.first_frame) for person, frame in batch]
            matrices = np.stack([person.frame_to_crop[i] for person, i in at])
            landmarks = apply_affine(matrices, np.stack([person.track.landmarks[i] for person, i in at]))
            pixels = gather_crops(frames, np.array([frame - first for _, frame in batch]), matrices, size)
        with self._timer("age"):
            source = np.array([person.source_age for person, _ in batch], np.float32)
            target = np.array([person.target_age for person, _ in batch], np.float32)
            known = [z for person, _ in batch if (z := self._keys[person.track.track_id].latents) is not None]
            aged = self._networks.ager.age(pixels, landmarks, source, target, np.stack(known) if known else None)
        for i, (person, frame) in enumerate(batch):
            keys = self._keys[person.track.track_id]
            keys.frames.append(frame)
            keys.deltas.append(aged.deltas[i])
            keys.latents = aged.latents[i]
            if not np.isnan(aged.identity[i]):
                keys.identity = float(aged.identity[i])

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
            blend_faces(
                upright(frame, rotation),
                [self._keys[p.track.track_id].delta_at(index) for p, _ in present],
                [float(p.weights[at]) for p, at in present],
                [p.frame_to_crop[at] for p, at in present],
            )
        return frame
