"""The OpenVINO backend: the default on a CPU, and on one that has it in bfloat16."""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from faceage.engines import ort
from faceage.engines.aotinductor import cpu
from faceage.engines.base import BATCH, Axis, Backend, Engine, Precision, Program, Runtime, Spec
from faceage.engines.kept import keep, read_kept
from faceage.errors import EngineError
from faceage.types import FloatArray

if TYPE_CHECKING:
    import openvino

BATCH_SIZES = (8, 1)
"""Batches are cut into these, and the network is compiled for each: compiled for any size it would be up to a quarter
slower, and stop to compile for each that it meets."""
LARGE_FACE = 3 * 100 * 100
"""Values of a face from which on it keeps a core as busy as eight do: these run one by one."""
SMALL_FACE, PADDED_FROM = 3 * 50 * 50, 4
"""Of faces with fewer values eight take no longer than four one by one: so many and more are filled up to eight."""

SUFFIX = ".blob"

_FIRST = threading.Lock()


class OpenVINOEngine:
    """A network that OpenVINO compiled, behind the engine protocol."""

    backend = "openvino"
    device: str | None = None

    def __init__(self, program: Program, path: Path, config: dict[str, Any]) -> None:
        """Open what was compiled at `path` for single faces; what else is needed is compiled when it is."""
        self.name = program.name
        self._program = program
        self._path = path
        self._config = config
        self._has_batch = [any(map(_is_batch, spec.shape)) for spec in program.inputs]
        largest = max(math.prod(spec.sizes("min")) for spec in program.inputs)
        sizes = BATCH_SIZES if largest < LARGE_FACE and not _takes_any_size(program) else (1,)
        self._fewest = {size: PADDED_FROM if size > 1 and largest < SMALL_FACE else size for size in sizes}
        # A request for each call that runs at the same time, and a model of its own for each request: two that share
        # one, with two streams, wait for each other half of the time.
        self._idle: dict[int, deque[openvino.InferRequest]] = {size: deque() for size in sizes}
        self._mapped = _mapped(path)  # networks read weights from it for as long as they live
        # Those that are always filled up are needed as soon as there are some candidates.
        for size in {1, max(sizes)} if largest < SMALL_FACE else {1}:
            self._idle[size].append(self._compile(size))

    def __call__(self, *arrays: FloatArray) -> tuple[FloatArray, ...]:
        """Run the network; see `base.Engine`."""
        sizes = self._program.check(arrays)
        if 0 in sizes.values():
            return self._program.empty_outputs(sizes)
        parts, done, count = [], 0, sizes[BATCH.name]
        while done < count:
            size = next(size for size, fewest in self._fewest.items() if fewest <= count - done)
            part = slice(done, done := done + size)
            inputs = [
                _filled_up(array[part], size) if cut else array
                for array, cut in zip(arrays, self._has_batch, strict=True)
            ]
            try:
                request = self._idle[size].pop()
            except IndexError:
                request = self._compile(size)
            outputs = request.infer(inputs, share_inputs=True).to_tuple()
            parts.append(outputs if done <= count else tuple(output[: count - done] for output in outputs))
            self._idle[size].append(request)
        return parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _compile(self, size: int) -> openvino.InferRequest:
        """Compile the network for `size` faces, or open what was compiled before, which takes half as long."""
        if size == 1:
            return _core().import_model(self._mapped, "CPU", self._config).create_infer_request()
        kept = self._path.with_suffix(f".{size}.cache")
        if compiled := read_kept(kept):
            return _core().import_model(compiled, "CPU", self._config).create_infer_request()
        model = _compile(self._program, size, self._config)
        keep(kept, model.export_model().getvalue())
        return model.create_infer_request()


def _mapped(path: Path) -> openvino.Tensor:
    """Return the bytes of a file without reading them: what is copied into the tensor stays this process's own."""
    import openvino

    return openvino.Tensor(np.memmap(path, np.uint8, mode="c"), shared_memory=True)


def _filled_up(batch: FloatArray, size: int) -> FloatArray:
    """Return a batch of `size`: behind what is there come zeros."""
    if len(batch) == size:
        return batch
    return np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])


def _compile(program: Program, size: int, config: dict[str, Any]) -> openvino.CompiledModel:
    graph = _core().read_model(program.graph)
    shapes = [
        [size if _is_batch(axis) else -1 if isinstance(axis, Axis) else axis for axis in spec.shape]
        for spec in program.inputs
    ]
    graph.reshape(dict(enumerate(shapes)))
    return _core().compile_model(graph, "CPU", config)


class OpenVINO(Backend):
    """OpenVINO, on CPUs. Its engines are what it compiled for this CPU.

    What takes pictures of any size is opened by ONNX Runtime, which has nothing to compile for each of them, unless it
    need not be exact: in half precision it takes a third of the time, and sizes are few where pictures are large.
    """

    name = "openvino"
    kinds = ("cpu",)
    loads_in_threads = True
    cuts_batches = True

    def suffix(self, program: Program, target: str) -> str | None:
        """Return the end of its files' names; None for what ONNX Runtime opens."""
        return None if program.exact and _takes_any_size(program) else SUFFIX

    def missing(self, target: str) -> None:
        """Return None: it is always installed."""
        return None

    def best_precision(self, device: str) -> Precision:
        """Return bf16 where the CPU computes in it."""
        return "bf16" if has_bf16() else "fp32"

    def versions(self, spec: Spec) -> dict[str, str]:
        """Return the version of OpenVINO, and the processor that it compiled for."""
        return {"openvino": version(), "machine": cpu()}

    def check(self, spec: Spec) -> None:
        """Raise EngineError unless `spec` is what it builds: for the CPU, in fp32, or in bf16 where the CPU has it."""
        if spec.target != "cpu" or spec.precision == "fp16":
            raise EngineError(
                f"backend {self.name} builds for cpu in fp32 or bf16, not for {spec.target} in {spec.precision}; "
                "use --backend auto"
            )
        if spec.precision == "bf16" and not has_bf16():
            raise EngineError("this CPU does not compute in bf16; use --precision fp32")

    def build(self, program: Program, spec: Spec, path: Path) -> None:
        """Compile the graph for single faces."""
        try:
            compiled = _compile(program, 1, _config(Runtime(backend=self, precision=spec.precision)))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile {program.graph}: {error}") from error
        path.write_bytes(compiled.export_model().getvalue())

    def load(self, program: Program, path: Path | None, runtime: Runtime) -> Engine:
        """Open what was compiled for this CPU; see `Backend.load`."""
        if path is None:
            return ort.open_graph(program, program.graph, runtime.threads)
        try:
            return OpenVINOEngine(program, path, _config(runtime))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot open {path}: {error}") from error


def _config(runtime: Runtime) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[runtime.precision],
        "INFERENCE_NUM_THREADS": runtime.threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # it would pin all of them to the first core
    }


def _takes_any_size(program: Program) -> bool:
    return any(isinstance(axis, Axis) and not _is_batch(axis) for spec in program.inputs for axis in spec.shape)


def _is_batch(axis: int | Axis) -> bool:
    return isinstance(axis, Axis) and axis.name == BATCH.name


@cache
def has_bf16() -> bool:
    """Return whether this CPU computes in bfloat16."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def version() -> str:
    """Return OpenVINO's version and build."""
    _core()
    import openvino

    return openvino.__version__


@cache
def _core() -> openvino.Core:
    # OpenVINO's converter, which may be absent, tells a server of the import, and takes half of its time.
    converter = "openvino.tools.ovc"
    left_out = sys.modules.setdefault(converter, cast(ModuleType, None)) is None
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f"OpenVINO cannot be imported ({error}); run: pip install --force-reinstall openvino, "
            "or use --backend onnxruntime"
        ) from error
    finally:
        if left_out:
            sys.modules.pop(converter, None)
    # Its table of types is made when an inference first needs it. Two threads that do so at once wait for each other
    # for ever (2026.4): one has the table's guard and wants Python's lock, the other has the lock and wants the guard.
    with _FIRST:
        openvino.Type.f32.to_dtype()
    return openvino.Core()
