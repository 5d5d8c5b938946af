"""What is known of a video before anything is changed: a value that can be saved, and used for any wish.

A plan is a folder of two files: `plan.json` has what is small, `plan.npz` the arrays. It holds no picture but the
thumbnails of `Appearance`, of 16x16 pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from faceage.checkpoint import sha256_of
from faceage.errors import MediaError
from faceage.media.files import write_atomically
from faceage.track import DEFAULT_FRAME_RATE, Track
from faceage.types import Appearance, FloatArray, IntArray

FORMAT_VERSION = 1
KEY_EVERY_FRAMES = 12
"""Frames between two key frames of a track: the change is computed there and mixed in between. Half a second at 25
frames a second: expressions change the face, but hardly the difference that age makes to it."""
SEGMENT_FRAMES = 504
"""Frames in a segment, about. Every segment begins with an intra picture and an empty look ahead of the encoder, which
costs bytes. With x264 at CRF 18 and its preset medium, a talking head at 1080x1080 grew by 9 % in segments of 48
frames, by 5.8 % of 96 and by 4.2 % of 192; 1,260 frames of it at 540x540 grew by 0.1 % in segments of 504. At twenty
seconds, a segment is soon done again after a run was killed."""
MIN_SEGMENT_FRAMES = 8 * KEY_EVERY_FRAMES
"""The least that is taken for the length of a segment: an encoder reorders frames within it, and an ager warms up
within the one before."""

_FACTS = ("sha256", "start_s", "end_s", "width", "height", "rotation", "estimators", "damage", "can_seek")
"""Fields of a plan that are JSON as they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedTrack:
    """A track, and what was measured on its best faces."""

    track: Track
    person: int
    """Whose it is: people are numbered from 1, in order of appearance."""
    ages: FloatArray
    """float32 [N], years, as the age estimator reads them; N is 1 or more."""
    appearance: Appearance
    """The mean over the same faces."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What is known of a video. It depends neither on the wanted ages nor on the ager."""

    sha256: str
    """Of the video file, in hexadecimal digits."""
    start_s: float | None
    end_s: float | None
    """The range that was read, as `VideoReader` has it."""
    width: int
    height: int
    """In luma samples, as the picture is stored."""
    rotation: int
    """Degrees counter-clockwise that a player turns the picture by; landmarks lie in the turned picture."""
    time_base: Fraction
    pts: IntArray
    """int64 [N], the presentation time of every frame in units of `time_base`."""
    shots: IntArray
    """int64 [S], the first frame of every shot."""
    boundaries: IntArray
    """int64 [K + 1], the first frame of every segment, and N."""
    tracks: tuple[PlannedTrack, ...]
    """By first frame and track id."""
    estimators: Mapping[str, str]
    """"age" and "identity" -> what tells the networks that measured from others."""
    damage: str | None
    """What is missing of a damaged video, in one line."""
    can_seek: bool
    """Whether reading may begin inside the video. False for damaged ones, and for those whose times are counted."""

    @property
    def frame_count(self) -> int:
        """N."""
        return len(self.pts)

    @property
    def segment_count(self) -> int:
        """K."""
        return len(self.boundaries) - 1

    @property
    def frame_rate(self) -> float:
        """The mean number of frames a second."""
        span = float((self.pts[-1] - self.pts[0]) * self.time_base)
        return (self.frame_count - 1) / span if span > 0 else DEFAULT_FRAME_RATE

    def people(self) -> dict[int, list[PlannedTrack]]:
        """Return each person's tracks, by number."""
        people: dict[int, list[PlannedTrack]] = {}
        for planned in self.tracks:
            people.setdefault(planned.person, []).append(planned)
        return dict(sorted(people.items()))

    def time_s(self, frame: int) -> float:
        """Return when a frame is shown, in seconds from the first one."""
        return float((self.pts[frame] - self.pts[0]) * self.time_base)

    def chunks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the ends [low, high) of the runs of frames between two key frames, from `first` to `last`.

        They end at multiples of `KEY_EVERY_FRAMES` and at boundaries of segments, whatever is asked for.
        """
        edges = set(range(-(-first // KEY_EVERY_FRAMES) * KEY_EVERY_FRAMES, last, KEY_EVERY_FRAMES))
        edges |= {first, last} | {int(edge) for edge in self.boundaries if first < edge < last}
        ordered = sorted(edges)
        yield from itertools.pairwise(ordered)


def person_age(tracks: Sequence[PlannedTrack]) -> float:
    """Return the age that a person seems to have: the median over all their tracks, in years."""
    return float(np.median(np.concatenate([planned.ages for planned in tracks])))


def choose_boundaries(frame_count: int, shots: IntArray, length: int = SEGMENT_FRAMES) -> IntArray:
    """Cut a video into segments: at a shot where there is one, else at a key frame of the change.

    Args:
        frame_count: N.
        shots: int64 [S], the first frame of every shot.
        length: frames in a segment, about: at least a half of it, and less than one and a half.

    Returns:
        int64 [K + 1], ascending, the first is 0 and the last N.
    """
    length = max(length, MIN_SEGMENT_FRAMES)
    boundaries = [0]
    while frame_count - (start := boundaries[-1]) >= 1.5 * length:
        near = [int(shot) for shot in shots if length / 2 <= shot - start < 1.5 * length]
        near = [shot for shot in near if frame_count - shot >= length / 2]
        grid = (start + length) // KEY_EVERY_FRAMES * KEY_EVERY_FRAMES
        boundaries.append(min(near, key=lambda shot: abs(shot - start - length)) if near else grid)
    return np.array([*boundaries, frame_count], np.int64)


def save_plan(plan: Plan, folder: Path) -> None:
    """Write a plan into a folder, which is made; a plan that is there is replaced.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "plan.npz") as file:
        np.savez_compressed(file, allow_pickle=False, **_arrays_of(plan))
    facts = _facts_of(plan) | {"arrays_sha256": sha256_of(folder / "plan.npz")}
    with write_atomically(folder / "plan.json") as file:
        file.write(json.dumps(facts, indent=1).encode())


def fingerprint(plan: Plan) -> str:
    """Return what tells a plan from others: a SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(_facts_of(plan), sort_keys=True).encode())
    for name, array in _arrays_of(plan).items():
        digest.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _arrays_of(plan: Plan) -> dict[str, np.ndarray]:
    tracks = [planned.track for planned in plan.tracks]
    none = np.zeros(0, np.float32)
    return {
        "pts": plan.pts,
        "shots": plan.shots,
        "boundaries": plan.boundaries,
        "lengths": np.array([len(track) for track in tracks], np.int64),
        "landmarks": np.concatenate([np.zeros((0, 5, 2), np.float32), *(track.landmarks for track in tracks)]),
        "scores": np.concatenate([none, *(track.scores for track in tracks)]),
        "age_counts": np.array([len(planned.ages) for planned in plan.tracks], np.int64),
        "ages": np.concatenate([none, *(planned.ages for planned in plan.tracks)]),
        "embeddings": np.array([planned.appearance.embedding for planned in plan.tracks], np.float32),
        "thumbnails": np.array([planned.appearance.thumbnail for planned in plan.tracks], np.float32),
    }


def _facts_of(plan: Plan) -> dict:
    tracks = [
        {
            "track_id": planned.track.track_id,
            "person": planned.person,
            "shot": planned.track.shot,
            "first_frame": planned.track.first_frame,
            "starts_shot": planned.track.starts_shot,
            "ends_shot": planned.track.ends_shot,
        }
        for planned in plan.tracks
    ]
    facts = {name: getattr(plan, name) for name in _FACTS} | {"estimators": dict(plan.estimators)}
    return facts | {"format_version": FORMAT_VERSION, "time_base": str(plan.time_base), "tracks": tracks}


def load_plan(folder: Path) -> Plan:
    """Read a plan.

    Raises:
        MediaError: if there is none, or it is damaged or of another version.
    """
    path = folder / "plan.json"
    try:
        facts = json.loads(path.read_bytes())
        version = facts["format_version"]
    except OSError as error:
        raise MediaError(
            f"{folder} has no plan ({error.strerror}: {path.name}); make one with `faceage scan`"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MediaError(f"the plan {path} is damaged ({error}); scan the video again") from error
    if version != FORMAT_VERSION:
        raise MediaError(f"the plan {path} has format {version}, expected {FORMAT_VERSION}; scan the video again")
    try:
        if sha256_of(folder / "plan.npz") != facts["arrays_sha256"]:
            raise ValueError("plan.npz is not the one that it was written with")
        with np.load(folder / "plan.npz", allow_pickle=False) as arrays:
            return _plan_of(facts, dict(arrays))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, zipfile.BadZipFile) as error:
        raise MediaError(f"the plan {path} is damaged ({error}); scan the video again") from error


def _plan_of(facts: dict, arrays: dict[str, np.ndarray]) -> Plan:
    count = len(facts["tracks"])
    columns = {
        "landmarks": np.split(arrays["landmarks"], np.cumsum(arrays["lengths"])[:-1]),
        "scores": np.split(arrays["scores"], np.cumsum(arrays["lengths"])[:-1]),
        "ages": np.split(arrays["ages"], np.cumsum(arrays["age_counts"])[:-1]),
        "embeddings": list(arrays["embeddings"]),
        "thumbnails": list(arrays["thumbnails"]),
    }
    if any(len(column) < count for column in columns.values()):
        raise ValueError(f"it has {count} tracks, and less in its arrays")
    tracks = []
    for i, row in enumerate(facts["tracks"]):
        person = int(row.pop("person"))
        tracks.append(
            PlannedTrack(
                track=Track(landmarks=columns["landmarks"][i], scores=columns["scores"][i], **row),
                person=person,
                ages=columns["ages"][i],
                appearance=Appearance(embedding=columns["embeddings"][i], thumbnail=columns["thumbnails"][i]),
            )
        )
    values = {name: facts[name] for name in _FACTS} | {name: arrays[name] for name in ("pts", "shots", "boundaries")}
    return Plan(time_base=Fraction(facts["time_base"]), tracks=tuple(tracks), **values)
