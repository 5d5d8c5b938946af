"""The ONNX Runtime backend, for CPUs: it compiles nothing."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from faceage.engines.base import Backend, Precision, Program, Runtime, Spec
from faceage.errors import EngineError
from faceage.types import FloatArray

# From 1.29 on ONNX Runtime sends its maker what models are run, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 20
"""The ONNX operator set of the files."""

INPUT_PREFIX, OUTPUT_PREFIX = "in_", "out_"
"""Before the names of inputs and outputs in the file."""

ERRORS_ONLY = 3
"""ONNX Runtime's log severity; its warnings are about its own optimisations."""


class OrtEngine:
    """An ONNX Runtime session behind the engine protocol."""

    backend = "onnxruntime"

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

    def suffix(self, target: str) -> str:
        """Return the end of its files' names."""
        return ".onnx"

    def missing(self, target: str) -> None:
        """Return None: it is always installed."""
        return None

    def best_precision(self, device: str) -> Precision:
        """Return fp32: CPUs compute fp16 in it."""
        return "fp32"

    def versions(self, spec: Spec) -> dict[str, str]:
        """Return the versions that the result depends on; torch is the exporter."""
        return {"onnxruntime": version("onnxruntime"), "torch": version("torch"), "opset": str(OPSET)}

    def check(self, spec: Spec) -> None:
        """Raise EngineError unless `spec` is what it builds: for the CPU, in fp32, for CPUs compute fp16 in fp32."""
        if spec != Spec("cpu", "fp32"):
            raise EngineError(
                f"backend {self.name} builds for cpu in fp32, not for {spec.target} in {spec.precision}; "
                "use --backend auto"
            )

    def build(self, program: Program, exported: ExportedProgram, spec: Spec, path: Path) -> None:
        """Write `exported` to `path` as one ONNX file, weights inside."""
        import torch

        log = logging.getLogger("onnxscript")
        level = log.level
        log.setLevel(logging.ERROR)  # it reports each rewrite it tries
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                onnx_program = torch.onnx.export(
                    exported,
                    # With prefixes, because the exporter names values inside the graph after their operators, and
                    # an output called "mean" would meet one of those.
                    input_names=[INPUT_PREFIX + spec.name for spec in program.inputs],
                    output_names=[OUTPUT_PREFIX + spec.name for spec in program.outputs],
                    opset_version=OPSET,
                    dynamo=True,
                    verbose=False,
                )
        finally:
            log.setLevel(level)
        assert onnx_program is not None  # it is None only for the exporter that `dynamo` turns off
        onnx_program.save(str(path), external_data=False)

    def load(self, program: Program, path: Path | None, runtime: Runtime) -> OrtEngine:
        """Open the ONNX file at `path`; see `Backend.load`."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = runtime.threads
        options.inter_op_num_threads = 1
        # Spinning threads take the cores that decode and encode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = ERRORS_ONLY
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no other base
            raise EngineError(f"ONNX Runtime cannot open {path}: {error}") from error
        return OrtEngine(program, session)
