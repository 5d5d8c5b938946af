"""What the pipeline asks of a network that ages faces, and what it has to know of one before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from faceage.checkpoint import read_header
from faceage.engines.base import Engine, Program
from faceage.errors import CheckpointError
from faceage.geometry import TEMPLATES
from faceage.types import Appearance, Change, Crops, FloatArray, Frame, Samples, View

Composite = Literal["delta", "replace"]

Look = Any
"""What an ager has decided about one person in one shot: opaque to the pipeline, never changed once it is made."""
Key = Any
"""What an ager's networks made of one face at one key frame: opaque to the pipeline, never changed once it is made.

Keys are arrays or tensors, or dataclasses with such in them: `kernels.beside` brings them to a device.
"""


class Ager(Protocol):
    """Ages people. Calls are independent of one another and may come from several threads.

    Photos: look, observe, and draw with the same key before and after. Videos: look once a person and shot, observe at
    key frames, draw in every frame.
    """

    @property
    def views(self) -> tuple[View, ...]:
        """The crops that it takes of a face, and draws its change in. The first is the view "face"."""

    @property
    def needs_appearance(self) -> bool:
        """Whether `look` is to be given appearances, which take time to measure."""

    @property
    def warm_up_keys(self) -> int:
        """How many key frames before a cut `observe` is to be given, so that the cut is not seen.

        0: `previous` plays no part.
        """

    def look(
        self,
        appearances: Sequence[Appearance],
        source_age: FloatArray,
        target_age: FloatArray,
        home: Frame | Samples | None = None,
    ) -> Sequence[Look]:
        """Decide how people are to be changed, once a person and shot.

        Args:
            appearances: one a person; none at all where `needs_appearance` is False.
            source_age: float32 [F], years, in the range that `pipeline.request.resolve_ages` gives.
            target_age: float32 [F], years, in the same range.
            home: a frame or samples, where looks with maps in them are to live; None: they are arrays.
        """

    def observe(self, looks: Sequence[Look], crops: Sequence[Crops], previous: Sequence[Key | None]) -> Sequence[Key]:
        """Run the networks on a batch of faces at a key frame each.

        Args:
            looks: of the F people. F may be 0.
            crops: one a view, in the order of `views`, of the same F faces; each in one of its view's sizes. Of arrays,
                or of tensors on the device of the ager's engines.
            previous: what an earlier call gave for the same person, to start from; None for people seen first.
        """

    def draw(self, look: Look, before: Key, after: Key, share: float) -> Sequence[Change | None]:
        """Return a person's change in one frame, one a view, masked; None where a view is not changed.

        It is drawn where the look and the keys live: with arrays, or with tensors, for which nothing waits.

        Args:
            look: the person's.
            before: the key of the nearest key frame not after this frame.
            after: the key of the next one; `before` itself on a key frame.
            share: where the frame lies between the two, 0 is before: the change is mixed linearly.
        """


def mix_changes(before: Sequence[Change | None], after: Sequence[Change | None], share: float) -> list[Change | None]:
    """Mix the changes that two looks make of one face, view by view: (1 - share) of the one, `share` of the other."""
    mixed: list[Change | None] = []
    for first, second in zip(before, after, strict=True):
        parts = [part.scaled(weight) for part, weight in ((first, 1 - share), (second, share)) if part is not None]
        mixed.append(None if not parts else parts[0] if len(parts) == 1 else parts[0].plus(parts[1]))
    return mixed


class Ages(NamedTuple):
    """The `Look` of an ager that knows people only by their ages, in years."""

    source: float
    target: float

    @classmethod
    def rows(cls, source_age: FloatArray, target_age: FloatArray) -> list[Ages]:
        """Return one a person; arguments as `Ager.look`."""
        return [cls(float(source), float(target)) for source, target in zip(source_age, target_age, strict=True)]

    @staticmethod
    def columns(looks: Sequence[Ages]) -> tuple[FloatArray, FloatArray]:
        """Return the source and the target ages: float32 [F] each."""
        return np.array([look.source for look in looks], np.float32), np.array(
            [look.target for look in looks], np.float32
        )


@dataclass(frozen=True)
class ModelFiles:
    """The checkpoints of one model."""

    name: str
    architecture: str
    """A name in `agers.registry.ARCHITECTURES`."""
    paths: dict[str, Path]
    """Role to file."""

    @property
    def generator(self) -> Path:
        """What draws the aged face: every architecture has it."""
        return self.paths["generator"]

    @property
    def age(self) -> Path:
        """What reads ages."""
        return self.paths["age"]

    @property
    def identity(self) -> Path:
        """What tells people apart."""
        return self.paths["identity"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One kind of ager: what its module tells the rest of the package. `agers.registry` lists them."""

    name: str
    """Also the name of the bundled model of this architecture."""
    roles: Mapping[str, str]
    """Role of a checkpoint -> its architecture, which is also the stem of its file. "generator" must be there;
    `registry.SHARED_ROLES` must not."""
    programs: Callable[[ModelFiles, Path], dict[str, Program]]
    """(files, the identity network's checkpoint) -> the programs of its own roles, by name."""
    make: Callable[..., Ager]
    """(files, engine, **options) -> the ager. `engine` gives the engine of a program's name: one of `programs`,
    "identity" or "age"."""
    always: tuple[str, ...] = ()
    """Names of programs that most changes need and `make` does not ask for: they are loaded with the others."""
    options: tuple[str, ...] = ()
    """Keyword arguments of `load_networks` that are for this architecture, and go to `make` when they are given."""
    check: Callable[[dict[str, Path]], None] = lambda paths: None
    """Raises CheckpointError if the checkpoints of a model, by role, do not belong together."""


EngineOf = Callable[[str], Engine]


def read_view(checkpoint: Path, sizes_px: Sequence[int]) -> View:
    """Return the view that a checkpoint's network was trained on, in crops of the given sizes.

    Raises:
        CheckpointError: if this version does not know its template.
    """
    name = read_header(checkpoint).dims.get("template", "face")
    if name not in TEMPLATES:
        raise CheckpointError(
            f'{checkpoint} was trained on crops of template "{name}", this version knows {", ".join(TEMPLATES)}; '
            "update faceage"
        )
    return View(name, TEMPLATES[name], tuple(sizes_px))
