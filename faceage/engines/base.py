"""What a network looks like to the engines: programs, tensor shapes, and the engine protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from faceage.errors import EngineError, ShapeError
from faceage.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Axis:
    """An axis whose size may change from call to call."""

    name: str
    """Axes of one program with the same name have the same size."""
    min: int = 1
    """Smallest size an engine must take."""
    typical: int = 8
    """The size to optimise for."""
    max: int = 1024
    """Largest size an engine must take; at run time the callers respect it."""
    multiple: int = 1
    """Every size is a multiple of this; `min` and `max` are too."""


BATCH = Axis("batch")
"""The usual first axis."""


@dataclass(frozen=True)
class TensorSpec:
    """One float32 input or output of a network."""

    name: str
    shape: tuple[int | Axis, ...]
    """A number for a fixed axis, an `Axis` for one that may change."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A network that can be made into an engine. Making one, or hashing one, does not import torch."""

    name: str
    """Stem of the engine's file: lower case, digits and dashes."""
    fingerprint: str
    """Hash over everything that decides the result: weights, dimensions, source; see `fingerprint`."""
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    """Imports torch and returns the network, in eval mode on the CPU in float32, and example inputs."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    """An axis that no input has (it follows from the others) counts as 0 in an empty output."""
    parity_floor_db: float = 60.0
    """An engine whose PSNR against torch is lower than this is refused."""

    def check(self, arrays: tuple[FloatArray, ...]) -> dict[str, int]:
        """Return the sizes of the changing axes of `arrays`, the inputs of a call.

        Raises:
            ShapeError: if their number, a dtype or a shape differs from `inputs`.
        """
        sizes: dict[str, int] = {}
        shapes = [tuple(array.shape) for array in arrays]
        if len(arrays) != len(self.inputs) or any(array.dtype != np.float32 for array in arrays):
            raise ShapeError(f"{self.name} takes {len(self.inputs)} float32 arrays, got {shapes}")
        for shape, spec in zip(shapes, self.inputs, strict=True):
            fits = len(shape) == len(spec.shape)
            for size, axis in zip(shape, spec.shape, strict=False):
                if isinstance(axis, Axis):
                    fits &= sizes.setdefault(axis.name, size) == size and size % axis.multiple == 0
                else:
                    fits &= size == axis
            if not fits:
                named = [d.name if isinstance(d, Axis) else d for d in spec.shape]
                raise ShapeError(f"{self.name}: input {spec.name} must be {named}, got {shape} (sizes so far {sizes})")
        return sizes

    def empty_outputs(self, sizes: dict[str, int]) -> tuple[FloatArray, ...]:
        """Return the outputs of a call whose batch is empty; `sizes` are those from `check`."""
        shapes = [[sizes.get(d.name, 0) if isinstance(d, Axis) else d for d in spec.shape] for spec in self.outputs]
        return tuple(np.zeros(shape, np.float32) for shape in shapes)


class Engine(Protocol):
    """A network that is ready to run. Calls are safe from several threads at once."""

    name: str
    """The program's name."""
    backend: str
    """The backend's name, as in `store.BACKENDS`."""

    def __call__(self, *arrays: FloatArray) -> tuple[FloatArray, ...]:
        """Run the network.

        Args:
            *arrays: float32, shaped as the program's `inputs`. A batch of 0 gives empty outputs.

        Returns:
            float32 arrays, shaped as the program's `outputs`.

        Raises:
            ShapeError: if an input does not fit.
        """
        ...


def fingerprint(*parts: str | bytes | Path) -> str:
    """Return the sha256 (hex) over `parts`: text, bytes, and the contents of files."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        # Each part is hashed by itself first, so that moving a byte between two parts changes the result.
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def module_file(name: str) -> Path:
    """Return the source file of a module without importing it (its parent packages are imported).

    Raises:
        EngineError: if the module is not installed.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise EngineError(f"the Python module {name} is not installed; run: pip install --force-reinstall faceage")
    return Path(spec.origin)
