"""What a network looks like to the engines: programs, tensor shapes, and the engine protocol."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args

import numpy as np

from faceage.errors import CheckpointError, EngineError, ShapeError
from faceage.types import FloatArray

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch import Tensor, nn

Precision = Literal["fp32", "fp16", "bf16"]
"""fp16, for GPUs: convolutions and matrix products in half precision, all else, inputs and outputs too, in float32.
bf16, for CPUs that have it: all in bfloat16 but inputs and outputs, and the networks that are `Program.exact`."""

TARGETS = {
    "cpu": "the CPU of this machine",
    "cuda": "the NVIDIA GPU of this machine",
    "portable": "NVIDIA RTX GPUs from Ampere on",
    "sm_75": "Turing, FP16 only",
    "sm_86": "Ampere",
    "sm_89": "Ada",
    "sm_120": "Blackwell",
}
"""What engines can be built for."""


@dataclass(frozen=True)
class Spec:
    """What an engine is built for."""

    target: str = "cpu"
    """A key of `TARGETS`, or "cuda:N"."""
    precision: Precision = "fp32"

    @property
    def kind(self) -> str:
        """The target, without the number of a GPU: a key of `TARGETS`."""
        return "cuda" if self.target.startswith("cuda:") else self.target

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise EngineError(f'unknown target "{self.target}"; use one of: {", ".join(TARGETS)}')
        if self.precision not in get_args(Precision):
            raise EngineError(f'unknown precision "{self.precision}"; use one of: {", ".join(get_args(Precision))}')
        if self.precision == "bf16" and self.target != "cpu":
            raise EngineError(f"bf16 is for the CPU, not for {self.target}; use --precision fp16")


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

    def sizes(self, which: Literal["min", "typical", "max"]) -> tuple[int, ...]:
        """Return the smallest, the typical or the largest shape."""
        return tuple(getattr(d, which) if isinstance(d, Axis) else d for d in self.shape)


_MEND = (
    "restore it by what brought it: pip install --force-reinstall faceage, faceage models import, "
    "or faceage models fetch facenet --overwrite"
)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A network that can be made into an engine: its ONNX graph, and its torch module. Only `network` imports torch."""

    name: str
    """Stem of its files: lower case, digits and dashes."""
    graph: Path
    """The ONNX file, see `engines.export`; it lies beside `checkpoints`."""
    checkpoints: tuple[Path, ...]
    """The safetensors files that hold its weights."""
    network: Callable[[bool], nn.Module]
    """Imports torch and returns the network, in eval mode on the CPU in float32. True: what follows from weights is
    computed here, once; False: in every call, so that an exported graph has the checkpoints' own weights."""
    examples: Callable[[], tuple[FloatArray, ...]]
    """Returns example inputs: real faces (`examples.example_faces`) where it takes faces, for engines are compared with
    their reference on them."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    """An axis that no input has (it follows from the others) counts as 0 in an empty output."""
    exact: bool = False
    """It measures and decides, for which half precision is too coarse: where that is asked for, it runs in fp32."""

    @property
    def sidecar(self) -> Path:
        """The JSON file beside the graph: hashes of the graph and of its weights, and the graph's parity with torch."""
        return self.graph.with_suffix(".json")

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the graph and of its weights: all that decides the result.

        Raises:
            CheckpointError: if there is no graph, or a file is not the one that was exported.
        """
        try:
            record = json.loads(self.sidecar.read_text())
            known = {self.graph: record["graph"]} | {path: record["weights"][path.name] for path in self.checkpoints}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the graph {self.graph} is missing or damaged ({error}); {_MEND}") from error
        for path, digest in known.items():
            if not path.is_file() or sha256_of_file(path) != digest:
                raise CheckpointError(f"{path} is damaged: its hash is not the one in {self.sidecar.name}; {_MEND}")
        return fingerprint(*known.values())

    def spec(self, target: str, precision: Precision) -> Spec:
        """Return what its engine is built for where a whole model is to run on `target` in `precision`.

        Turing (sm_75) has no fp32 matrix products in TensorRT for RTX: there all is fp16.
        """
        return Spec(target, "fp32" if self.exact and target != "sm_75" else precision)

    def check(self, arrays: Sequence[FloatArray | Tensor]) -> dict[str, int]:
        """Return the sizes of the changing axes of `arrays`, the inputs of a call: arrays or tensors.

        Raises:
            ShapeError: if their number, a dtype or a shape differs from `inputs`.
        """
        sizes: dict[str, int] = {}
        shapes = [tuple(array.shape) for array in arrays]
        if len(arrays) != len(self.inputs) or any(
            str(array.dtype).removeprefix("torch.") != "float32" for array in arrays
        ):
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

    @property
    def backend(self) -> str:
        """The backend's name, as in `registry.BACKENDS`."""

    @property
    def device(self) -> str | None:
        """The GPU that it runs on, "cuda:N"; None: the CPU."""

    def __call__(self, *arrays: FloatArray) -> tuple[FloatArray, ...]:
        """Run the network.

        Engines on a GPU take and give CUDA tensors too, without a way through the host's memory.

        Args:
            *arrays: float32, shaped as the program's `inputs`. A batch of 0 gives empty outputs.

        Returns:
            float32 arrays, shaped as the program's `outputs`.

        Raises:
            ShapeError: if an input does not fit.
        """
        ...


class OpeningEngine:
    """An engine that another thread opens: whoever needs it waits for it, and gets the error if there is one."""

    def __init__(self, name: str, opening: Future[Engine]) -> None:
        self.name = name
        self._opening = opening

    @property
    def backend(self) -> str:
        """See `Engine`."""
        return self._opening.result().backend

    @property
    def device(self) -> str | None:
        """See `Engine`."""
        return self._opening.result().device

    def __call__(self, *arrays: FloatArray) -> tuple[FloatArray, ...]:
        """Run the network; see `Engine`."""
        return self._opening.result()(*arrays)


class Backend(ABC):
    """What builds and runs engines: one class a backend, each in its own file, without state. See `registry`."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    """The kinds of device that it runs on: "cpu", "cuda"."""
    loads_in_threads: ClassVar[bool] = False
    """Whether several engines may be built and opened at the same time in one process."""
    cuts_batches: ClassVar[bool] = False
    """Whether its engines cut each batch into the sizes that they are compiled for."""

    def check_device(self, device: str) -> None:
        """Raise EngineError if it does not run on this kind of device."""
        if device.partition(":")[0] not in self.kinds:
            where = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}
            here = " and ".join(where[kind] for kind in self.kinds)
            raise EngineError(
                f"backend {self.name} runs on {here}, not on {where.get(device, device)}; "
                f"use --device {self.kinds[0]} or --backend auto"
            )

    @abstractmethod
    def missing(self, target: str) -> str | None:
        """Return why it cannot build for a target here, or run there, and the command that mends it, or None."""

    def unfit(self, device: str) -> str | None:
        """Return why it is not for a device of one of its kinds, and what mends that if anything does, or None."""
        return self.missing(device.partition(":")[0])

    @abstractmethod
    def best_precision(self, device: str) -> Precision:
        """Return the fastest precision on a device that it runs on."""

    def suffix(self, program: Program, target: str) -> str | None:
        """Return the end of its files' names; None: there is nothing to build, and `load` takes no file."""
        return None

    @abstractmethod
    def versions(self, spec: Spec) -> dict[str, str]:
        """Return what the file depends on beside the program: versions, and the machine if it is for that one alone."""

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise EngineError if it builds nothing for `spec`."""

    def build(self, program: Program, spec: Spec, path: Path) -> None:
        """Write the engine's file.

        Raises:
            EngineError: if it cannot be built.
        """
        raise EngineError(f"backend {self.name} has no engines to build; use --backend auto")

    def emulate(self, program: Program, spec: Spec) -> Engine:
        """Return what goes into the builder, run on the CPU: the most that can be compared where the engine cannot run.

        Only of a backend that builds for devices which are not there.
        """
        raise NotImplementedError

    def targets(self, device: str) -> list[str]:
        """Return the targets whose engines run on a device, best first.

        Raises:
            EngineError: if there are none, or the device is not there.
        """
        self.check_device(device)
        return [device.partition(":")[0]]

    @abstractmethod
    def load(self, program: Program, path: Path | None, runtime: Runtime) -> Engine:
        """Open an engine's file.

        Args:
            program: what was built.
            path: the file; None where there is nothing to build.
            runtime: of this backend; its precision is the one that the file was built for.

        Raises:
            UnfitEngineError: if it is for another GPU or driver.
            EngineError: if the file cannot be opened.
        """


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs networks: where, by what, and how. `registry.choose_runtime` finds the best one of a machine."""

    backend: Backend
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""
    threads: int = 1
    """Threads of one call on the CPU."""
    precision: Precision = "fp32"
    fallbacks: tuple[Backend, ...] = ()
    """What a network that the backend cannot build or open here is run by, in this order."""

    def describe(self) -> dict[str, str]:
        """Return its parts as text, for reports and keys; the threads are left out, for they change no result."""
        return {"backend": self.backend.name, "device": self.device, "precision": self.precision}


def fingerprint(*parts: str | bytes | Path) -> str:
    """Return the sha256 (hex) over `parts`: text, bytes, and the contents of files."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        # Each part is hashed by itself first, so that moving a byte between two parts changes the result.
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file; one that has not changed is read once, by whichever thread comes first."""
    status = path.stat()
    with _HASHING[path]:
        return _sha256(path, status.st_mtime_ns, status.st_size)


_HASHING: dict[Path, threading.Lock] = defaultdict(threading.Lock)


@cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
