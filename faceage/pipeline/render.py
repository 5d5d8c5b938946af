"""The second pass over a video: change the frames of any stretch of it.

What comes out depends on the plan and the wish alone, not on the stretch: key frames lie at fixed places of the video,
and what an ager remembers from key frame to key frame begins anew at every boundary of a segment. There an ager that
remembers is warmed up on the key frames before, so that the new beginning is not seen.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from faceage.agers.base import Ager, Key, Look, mix_changes
from faceage.align import align_faces, choose_size, face_weights, prepare_views
from faceage.blend import blend_faces
from faceage.errors import MediaError
from faceage.geometry import apply_affine
from faceage.kernels import beside
from faceage.media.video import writable
from faceage.pipeline.plan import KEY_EVERY_FRAMES, Plan, PlannedTrack, person_age
from faceage.pipeline.request import AgeRequest, Networks, source_ages, target_at
from faceage.pipeline.timer import StageTimer
from faceage.track import Track
from faceage.types import Appearance, Change, FloatArray, Frame

DRAWN_BETWEEN = 2
"""Changes drawn from a key frame to the next one: at the first, and halfway; other frames get mixtures. From one of
these to the next hardly anything moves on the face, and mixing costs less than drawing. Root mean square difference to
drawing in each frame, in codes of the luma that changes, on a talking head and on a street: 0.3 and 0.7 with two, 0.8
and 2.0 with one, whose wrinkles are seen double."""
TURNED, TURNED_PX = 0.012, 180
"""Farthest that a landmark may be from where it is at the nearer key frame, in sides of the aligned crop: between key
frames changes are mixed, not moved, and in a quick nod hair would be grey where it was and where it will be. In faces
whose crops have less than so many pixels of the frame it is not seen."""
MIN_KEY_FRAMES = 3
"""Key frames are no nearer to each other for it."""

People = Mapping[int, AgeRequest | None]
"""Number of a person -> how this one is aged; None: not at all."""


@dataclass(frozen=True, kw_only=True)
class AgedTrack:
    """A track that is to be changed, and how."""

    track: Track
    person: int
    appearance: Appearance
    source_age: float
    target_ages: FloatArray
    """float32 [T], years."""
    sizes_px: tuple[int, ...]
    """Sides of the crops that the face is aged in, one a view."""
    frame_to_crop: tuple[FloatArray, ...]
    """float32 [T, 2, 3] a view."""
    weights: FloatArray
    """float32 [T], in [0, 1]."""

    def key_frames(self) -> list[int]:
        """Return the frames at which the change is computed: the grid's, the track's ends, and more in quick turns.

        Intervals in which the weight is 0 throughout need none.
        """
        first, last = self.track.first_frame, self.track.last_frame
        grid = range(-(-first // KEY_EVERY_FRAMES) * KEY_EVERY_FRAMES, last + 1, KEY_EVERY_FRAMES)
        visible = self.weights > 0

        def matters(frame: int) -> bool:
            at = frame - first
            return bool(visible[max(0, at - KEY_EVERY_FRAMES) : at + KEY_EVERY_FRAMES + 1].any())

        regular = [frame for frame in sorted({first, last, *grid}) if matters(frame)]
        spans = [span for span in itertools.pairwise(regular) if span[1] - span[0] <= KEY_EVERY_FRAMES]
        between = [self._turns(low - first, high - first) for low, high in spans]
        return sorted({*regular, *(first + at for some in between for at in some)})

    def _turns(self, low: int, high: int) -> list[int]:
        """Return the rows between two, at which the head has turned far from both, and from each other."""
        matrices, rows = self.frame_to_crop[0][low : high + 1], slice(low, high + 1)
        sides = self.sizes_px[0] / np.sqrt(np.abs(np.linalg.det(matrices[:, :, :2])))
        if high - low < 2 * MIN_KEY_FRAMES or np.median(sides) < TURNED_PX:
            return []
        landmarks = apply_affine(matrices, self.track.landmarks[rows]) / self.sizes_px[0]
        off = np.min(
            [np.linalg.norm(landmarks - end, axis=-1).max(-1) for end in (landmarks[0], landmarks[-1])], axis=0
        )
        if off.max() < TURNED:
            return []
        middle = int(np.clip(low + off.argmax(), low + MIN_KEY_FRAMES, high - MIN_KEY_FRAMES))
        return [*self._turns(low, middle), middle, *self._turns(middle, high)]


def decide(
    networks: Networks,
    plan: Plan,
    request: AgeRequest | None,
    people: People | None = None,
    *,
    first: int = 0,
    last: int | None = None,
) -> list[AgedTrack]:
    """Decide how each track of a plan is changed; tracks that are to stay as they are are left out.

    Args:
        networks: the ager's views say how faces are aligned.
        plan: of the video.
        request: for everybody whom `people` does not name; None: they stay as they are.
        people: for people by their numbers in the plan.
        first: tracks that end before this frame are left out too.
        last: and those that begin at this frame or later; None: at the video's end.

    Raises:
        MediaError: if `people` names somebody who is not there.
    """
    everybody = plan.people()
    named = people or {}
    last = plan.frame_count if last is None else last
    if unknown := sorted(named.keys() - everybody.keys()):
        raise MediaError(
            f"there is no person {unknown[0]} in the video, which has {len(everybody)}; "
            "`faceage scan` shows the people and their numbers"
        )
    chosen: list[tuple[PlannedTrack, AgeRequest]] = []
    for planned in plan.tracks:
        mine = named.get(planned.person, request)
        if mine is not None:
            chosen.append((planned, mine))
    if request is not None and request.faces == "largest":
        prominent = _most_prominent([planned.track for planned in plan.tracks])
        chosen = [(p, r) for p, r in chosen if p.person in named or p.track.track_id in prominent]
    times_s = (plan.pts - plan.pts[0]) * float(plan.time_base) + (plan.start_s or 0.0)
    ages = {number: person_age(tracks) for number, tracks in everybody.items()}
    return [
        _aged(networks, plan, planned, mine, ages[planned.person], times_s)
        for planned, mine in chosen
        if planned.track.first_frame < last and planned.track.last_frame >= first
    ]


def _aged(
    networks: Networks, plan: Plan, planned: PlannedTrack, request: AgeRequest, read: float, times_s: FloatArray
) -> AgedTrack:
    track, views = planned.track, networks.ager.views
    sizes = tuple(choose_size(track.landmarks, view) for view in views)
    weights = face_weights(
        track.landmarks, track.scores,
        fade_in=not track.starts_shot, fade_out=not track.ends_shot, frame_rate=plan.frame_rate,
    )  # fmt: skip
    return AgedTrack(
        track=track,
        person=planned.person,
        appearance=planned.appearance,
        source_age=float(source_ages(np.array([read], np.float32), request)[0]),
        target_ages=target_at(read, request, times_s[track.first_frame : track.last_frame + 1]),
        sizes_px=sizes,
        frame_to_crop=tuple(
            align_faces(track.landmarks, size, view.template) for size, view in zip(sizes, views, strict=True)
        ),
        weights=weights * request.strength,
    )


def _most_prominent(tracks: list[Track]) -> set[int]:
    """Return the id of the track of each shot that covers the most picture, over all its frames together."""

    def size(track: Track) -> float:
        spread = track.landmarks - track.landmarks.mean(1, keepdims=True)
        return float(np.square(spread).sum())

    by_shot = itertools.groupby(sorted(tracks, key=lambda t: t.shot), key=lambda t: t.shot)
    return {max(group, key=size).track_id for _, group in by_shot}


@dataclass
class _Keys:
    """What is known of one track in one chain so far: the newest key frames."""

    frames: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    """The ager's, one a frame, where the frames live."""
    looks: list[_Decided] = field(default_factory=list)
    """What the ager decided, one a frame."""
    newest: Key | None = None
    """The last key on the host, from which the next one is found."""
    drawn: dict[tuple[int, int], Sequence[Change | None]] = field(default_factory=dict)
    """The changes that are mixed now, by key frame and how many parts of the interval after it they lie behind it."""

    def forget(self) -> None:
        """Keep the newest key frame alone."""
        self.frames, self.keys, self.looks = self.frames[-1:], self.keys[-1:], self.looks[-1:]

    def draw(self, ager: Ager, frame: int) -> _Drawn:
        """Return the change in a frame between the first and the last key frame; one at or after the last one drawn."""
        after = int(np.searchsorted(self.frames, frame))
        if self.frames[after] == frame:
            ends, share = [(after, 0)], 0.0
        else:
            before = after - 1
            parts = DRAWN_BETWEEN * (frame - self.frames[before])
            part, rest = divmod(parts, self.frames[after] - self.frames[before])
            share = rest / (self.frames[after] - self.frames[before])
            ends = [(before, part), (before, part + 1) if part + 1 < DRAWN_BETWEEN else (after, 0)]
        places = [(self.frames[row], part) for row, part in ends]
        self.drawn = {
            place: self.drawn[place] if place in self.drawn else self._draw(ager, *end)
            for place, end in zip(places, ends, strict=True)
        }
        changes = [self.drawn[place] for place in places]
        return _Drawn(changes[0], changes[-1], share)

    def _draw(self, ager: Ager, row: int, part: int) -> Sequence[Change | None]:
        """Return the change so many parts of the interval behind the key frame of a row."""
        after, share = row + (part > 0), part / DRAWN_BETWEEN
        keys = self.keys[row], self.keys[after], share
        (target_before, look_before), (target_after, look_after) = self.looks[row], self.looks[after]
        drawn = ager.draw(look_before, *keys)
        if target_after == target_before:
            return drawn
        return mix_changes(drawn, ager.draw(look_after, *keys), share)


class _Drawn(NamedTuple):
    """The changes of a face in a frame, one a view: a mixture of two that were drawn."""

    before: Sequence[Change | None]
    after: Sequence[Change | None]
    share: float
    """Of the second."""


class _Decided(NamedTuple):
    """What the ager decided about a person, for one target age; where the frames live."""

    target: float
    look: Look


Chain = dict[int, _Keys]
"""Track id -> its keys, since the boundary that the chain belongs to."""


class Renderer:
    """Changes the frames of any stretch of a video between two boundaries of its plan."""

    def __init__(self, networks: Networks, plan: Plan, tracks: list[AgedTrack], timer: StageTimer) -> None:
        self._networks, self._plan, self.timer = networks, plan, timer
        self._tracks = sorted(tracks, key=lambda aged: (aged.track.first_frame, aged.track.track_id))
        self._key_frames = {aged.track.track_id: aged.key_frames() for aged in tracks}
        self._boundaries = {int(edge) for edge in plan.boundaries[:-1]}
        self._looks: dict[int, _Decided] = {}  # of the tracks in view
        self.identities: dict[int, float] = {}
        """Track id -> cosine of the embeddings before and after at its first key frame, if that was rendered."""

    def first_key(self, track_id: int) -> int:
        """Return the first key frame of a track that is changed."""
        return self._key_frames[track_id][0]

    def begin(self, first: int) -> int:
        """Return the frame that rendering from a boundary has to read from."""
        return max(0, first - self._warm_up(first))

    def render(self, frames: Iterable[Frame], first: int, last: int) -> Iterator[Frame]:
        """Yield the frames from `first` to before `last`, those with a face in them changed.

        Args:
            frames: from `begin(first)` on, as they are stored, to `last` at least, if the video has that one.
            first: a boundary of the plan.
            last: another.
        """
        source = iter(frames)
        held: list[Frame] = []
        chain: Chain = {}
        upcoming: Chain = {}  # of the next boundary
        waiting, in_view = deque(self._tracks), list[AgedTrack]()
        for low, high in self._plan.chunks(self.begin(first), last):
            # The chunk's last frame belongs to the next one; here it only ends the last interval between key frames.
            held += itertools.islice(source, high - low + 1 - len(held))
            while waiting and waiting[0].track.first_frame < high:
                in_view.append(waiting.popleft())
            in_view = [aged for aged in in_view if aged.track.last_frame >= low]
            self._looks = {t: look for t, look in self._looks.items() if t in {a.track.track_id for a in in_view}}
            if low in self._boundaries and low >= first:
                chain, upcoming = upcoming, {}
            if low >= first:
                self._extend(chain, in_view, held, low, is_shown=True)
            following = self._boundary_after(low) if low >= first else first
            if low < following < max(last, first + 1) and following - low <= self._warm_up(following):
                self._extend(upcoming, in_view, held, low, is_shown=False)
            for index in range(low, high):
                frame = held.pop(0)
                if index >= first:
                    yield self._blend(chain, in_view, frame, index)
                del frame

    def _look(self, aged: AgedTrack, index: int, frame: Frame) -> _Decided:
        """Return what the ager decides about a person at a key frame; nothing new where the target has not moved."""
        target = float(aged.target_ages[index - aged.track.first_frame])
        known = self._looks.get(aged.track.track_id)
        if known and known.target == target:
            return known
        ager = self._networks.ager
        source, wanted = np.array([aged.source_age], np.float32), np.array([target], np.float32)
        (look,) = ager.look([aged.appearance] if ager.needs_appearance else [], source, wanted, frame)
        decided = self._looks[aged.track.track_id] = _Decided(target, look)
        return decided

    def _boundary_after(self, frame: int) -> int:
        edges = self._plan.boundaries
        return int(edges[np.searchsorted(edges, frame, side="right")])

    def _warm_up(self, boundary: int) -> int:
        """Return how many frames before a boundary an ager begins: none where a shot begins, or nobody is."""
        keys = self._networks.ager.warm_up_keys
        if not keys or not boundary or boundary in self._plan.shots:
            return 0
        if not any(aged.track.first_frame < boundary <= aged.track.last_frame for aged in self._tracks):
            return 0
        edges = self._plan.boundaries
        before = int(edges[np.searchsorted(edges, boundary) - 1])
        return min(keys * KEY_EVERY_FRAMES, boundary - before)

    def _extend(
        self, chain: Chain, in_view: list[AgedTrack], frames: list[Frame], first: int, *, is_shown: bool
    ) -> None:
        """Compute the change of everybody in view at the key frames among `frames`, in batches of one of each track."""
        last = first + len(frames) - 1
        for gone in chain.keys() - {aged.track.track_id for aged in in_view}:
            del chain[gone]
        wanted: list[tuple[AgedTrack, list[int]]] = []
        for aged in in_view:
            mine = chain.setdefault(aged.track.track_id, _Keys())
            mine.forget()
            missing = [f for f in self._key_frames[aged.track.track_id] if first <= f <= last and f not in mine.frames]
            wanted.append((aged, missing))
        while wanted := [(aged, rest) for aged, rest in wanted if rest]:
            # In order: each key frame of a track starts from the one before.
            batches: dict[tuple[int, ...], list[tuple[AgedTrack, int]]] = {}
            for aged, rest in wanted:
                batches.setdefault(aged.sizes_px, []).append((aged, rest.pop(0)))
            for batch in batches.values():
                self._age(chain, frames, first, batch, is_shown=is_shown)

    def _age(
        self, chain: Chain, frames: list[Frame], first: int, batch: list[tuple[AgedTrack, int]], *, is_shown: bool
    ) -> None:
        """Compute the change of tracks at a key frame each; all have the same sizes."""
        ager = self._networks.ager
        with self.timer("gather"):
            landmarks = np.stack([aged.track.landmarks[frame - aged.track.first_frame] for aged, frame in batch])
            indices = np.array([frame - first for _, frame in batch])
            crops = prepare_views(frames, indices, landmarks, ager.views, batch[0][0].sizes_px)
        known = [chain[aged.track.track_id] for aged, _ in batch]
        with self.timer("age"):
            decided = [self._look(aged, frame, frames[0]) for aged, frame in batch]
            looks = [each.look for each in decided]
            keys = ager.observe(looks, crops, [mine.newest for mine in known])
            is_first = [frame == self._key_frames[aged.track.track_id][0] for aged, frame in batch]
            if is_shown and any(is_first):
                rows = [row for row, first_time in enumerate(is_first) if first_time]
                changes = [ager.draw(looks[row], keys[row], keys[row], 0.0)[0] for row in rows]
                measured = self._networks.measure_identity(crops[0][np.array(rows)], changes)
                for row, identity in zip(rows, measured, strict=True):
                    self.identities[batch[row][0].track.track_id] = float(identity)
            for mine, key, each, (_, frame) in zip(known, keys, decided, batch, strict=True):
                mine.frames.append(frame)
                mine.keys.append(beside(frames[0], key))
                mine.looks.append(each)
                mine.newest = key

    def _blend(self, chain: Chain, in_view: list[AgedTrack], frame: Frame, index: int) -> Frame:
        """Return the frame with everybody's change added."""
        present = [
            (aged, at)
            for aged in in_view
            if 0 <= (at := index - aged.track.first_frame) < len(aged.track) and aged.weights[at] > 0
        ]
        if not present:
            return frame
        with self.timer("blend"):
            frame = writable(frame)
            for aged, at in present:
                before, after, share = chain[aged.track.track_id].draw(self._networks.ager, index)
                weights = [float(aged.weights[at])] * len(before)
                matrices = [matrix[at] for matrix in aged.frame_to_crop]
                blend_faces(frame, before, weights, matrices, following=after, share=share)
        return frame
