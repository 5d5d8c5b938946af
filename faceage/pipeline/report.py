"""What was done to each photo and video: the items of `--report` and of the events of `--json`, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FaceReport:
    """What was done to one face of a photo."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom, in pixels of the upright picture."""
    source_age: float
    target_age: float
    identity: float
    """Cosine of the embeddings before and after the change."""
    weight: float
    """Share of the change that was applied: 0 for a profile, which is left alone."""


@dataclass(frozen=True, kw_only=True)
class PhotoReport:
    """What was done to one photo."""

    source: str
    target: str
    faces: tuple[FaceReport, ...] = ()
    sha256: str | None = None
    """Of the source, in hexadecimal digits; None if it could not be read."""
    error: str | None = None
    """Why nothing was written, in one line."""

    @property
    def aged(self) -> list[FaceReport]:
        """The faces that were changed."""
        return [face for face in self.faces if face.weight > 0]


@dataclass(frozen=True, kw_only=True)
class PersonReport:
    """What was done to one person of a video."""

    person: int
    """The number in the plan."""
    first_frame: int
    last_frame: int
    """Where the person is seen first and last."""
    shots: tuple[int, ...]
    """The shots that the person is in."""
    source_age: float
    target_age: float | None
    """None: the person stays as they are. Where it moves in time, the last one."""
    target_age_first: float | None
    """Where it moves in time, the first one; else None."""
    identity: float | None
    """Cosine of the embeddings before and after the change, the mean over the shots."""
    best_time_s: float
    """When the person is seen best, in seconds from the output's first frame."""
    best_box: tuple[float, float, float, float]
    """Where the face is then: left, top, right and bottom, in pixels of the upright picture."""


@dataclass(frozen=True, kw_only=True)
class VideoReport:
    """What was done to one video."""

    source: str
    target: str
    frames: int
    """Frames of the output. Where no face is to be changed, it is a copy of the source, byte for byte."""
    frames_with_faces: int
    starts_at_s: float
    """Where the output's first frame lies in the source, in seconds from its first one."""
    people: tuple[PersonReport, ...]
    seconds: float
    stage_ms: Mapping[str, float]
    """Milliseconds a frame; stages overlap, so they add up to more than the wall time."""
    damage: str | None
    """What is missing of a damaged source, in one line."""
