"""The ONNX Runtime backend, for CPUs: it opens graphs as they are. What the other backends are compared with."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from faceage.engines.base import Backend, Precision, Program, Runtime, Spec
from faceage.errors import EngineError
from faceage.types import FloatArray

if TYPE_CHECKING:
    import onnxruntime as ort

INPUT_PREFIX, OUTPUT_PREFIX = "in_", "out_"
"""Before the names of inputs and outputs in a graph."""

ERRORS_ONLY = 3
"""ONNX Runtime's log severity; its warnings are about its own optimisations."""


class OrtEngine:
    """An ONNX Runtime session behind the engine protocol."""

    backend = "onnxruntime"
    device: str | None = None

    def __init__(self, program: Program, session: ort.InferenceSession) -> None:
        self.name = program.name
        self._program = program
        self._session = session
        self._input_names = [INPUT_PREFIX + spec.name for spec in program.inputs]

    def __call__(self, *arrays: FloatArray) -> tuple[FloatArray, ...]:
        """Run the network; see `base.Engine`."""
        sizes = self._program.check(arrays)
        if 0 in sizes.values():
            return self._program.empty_outputs(sizes)
        return tuple(self._session.run(None, dict(zip(self._input_names, arrays, strict=True))))


class OnnxRuntime(Backend):
    """ONNX Runtime, on CPUs."""

    name = "onnxruntime"
    kinds = ("cpu",)
    loads_in_threads = True

    def missing(self, target: str) -> None:
        """Return None: it is always installed."""
        return None

    def best_precision(self, device: str) -> Precision:
        """Return fp32: CPUs compute fp16 in it."""
        return "fp32"

    def versions(self, spec: Spec) -> dict[str, str]:
        """Return nothing: it builds nothing."""
        return {}

    def check(self, spec: Spec) -> None:
        """Raise EngineError unless `spec` is for the CPU, in fp32."""
        if spec != Spec("cpu", "fp32"):
            raise EngineError(
                f"backend {self.name} builds for cpu in fp32, not for {spec.target} in {spec.precision}; "
                "use --backend auto"
            )

    def load(self, program: Program, path: Path | None, runtime: Runtime) -> OrtEngine:
        """Open the program's graph; see `Backend.load`."""
        return open_graph(program, program.graph, runtime.threads)


@cache
def _onnxruntime() -> ModuleType:
    """Import ONNX Runtime, which takes 20 ms: other engines are opened beside it."""
    # From 1.29 on it sends its maker what models are run, unless this is set before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def open_graph(program: Program, graph: Path | bytes, threads: int = 1, *, optimize: bool = True) -> OrtEngine:
    """Open an ONNX graph of `program`.

    Args:
        program: whose inputs and outputs it has.
        graph: the file, or its contents; the weights lie beside `program.graph` in any case.
        threads: threads of one call.
        optimize: False: run every operator as it is written, casts too.

    Raises:
        EngineError: if ONNX Runtime refuses it.
        CheckpointError: if a file is damaged.
    """
    if graph == program.graph:
        assert program.fingerprint  # raises unless its files are whole
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads take the cores that decode and encode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = ERRORS_ONLY
    if isinstance(graph, bytes):
        folder = str(program.graph.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        source = graph if isinstance(graph, bytes) else str(graph)
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no other base
        name = graph if isinstance(graph, Path) else program.name
        raise EngineError(f"ONNX Runtime cannot open {name}: {error}") from error
    return OrtEngine(program, session)
