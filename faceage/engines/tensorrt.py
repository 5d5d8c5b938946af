"""The TensorRT backend, for NVIDIA GPUs, in two flavours that the target decides.

`portable` and `sm_*`: TensorRT for RTX. It builds in seconds on any machine, with a GPU or without, and compiles the
last bit on the GPU when the engine first runs. `cuda`: Torch-TensorRT, which builds on the GPU that is present, for it.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from faceage.engines import eager, ort
from faceage.engines.aotinductor import gpu
from faceage.engines.base import Axis, Backend, Engine, Precision, Program, Runtime, Spec
from faceage.errors import EngineError
from faceage.extras import missing

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

RTX_CAPABILITIES = {(7, 5): "sm_75", (8, 6): "sm_86", (8, 9): "sm_89", (12, 0): "sm_120"}
"""Compute capability of a GPU -> the target of its own engines."""
PORTABLE_CAPABILITIES = ((8, 0), *RTX_CAPABILITIES)
"""GPUs that TensorRT for RTX's documentation names."""

TORCH_SUFFIX, RTX_SUFFIX = ".pt2", ".engine"
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that fp16 engines compute in half precision. Losses, norms and sums would overflow or vanish in it."""

MAX_SIZE = 2048
"""Largest size of an axis in a profile: TensorRT's tensors have less than 2^31 elements, at all sizes at once."""


class TensorRT(Backend):
    """TensorRT for RTX and Torch-TensorRT, on NVIDIA GPUs."""

    name = "tensorrt"
    kinds = ("cuda",)

    def suffix(self, program: Program, target: str) -> str:
        """Return the end of its files' names."""
        return TORCH_SUFFIX if target == "cuda" else RTX_SUFFIX

    def missing(self, target: str) -> str | None:
        """Return what is not installed for a target, and the command that installs it, or None."""
        if target == "cuda":
            return missing("torch", f"backend {self.name} for target cuda") or _missing_torch_tensorrt()
        return missing("tensorrt", f"backend {self.name} for target {target}")

    def best_precision(self, device: str) -> Precision:
        """Return fp16."""
        return "fp16"

    def versions(self, spec: Spec) -> dict[str, str]:
        """Return the builder's version, and the GPU if the file is for that one alone."""
        if spec.target == "cuda":
            return {"torch-tensorrt": _torch_tensorrt_version(), "torch": version("torch"), "machine": gpu()}
        return {"tensorrt-rtx": version("tensorrt-rtx")}

    def check(self, spec: Spec) -> None:
        """Raise EngineError if it builds nothing for `spec`."""
        if spec.target == "cpu":
            raise EngineError(f"backend {self.name} builds for NVIDIA GPUs, not for cpu; use --backend onnxruntime")
        if spec == Spec("sm_75", "fp32"):
            raise EngineError("TensorRT for RTX has no fp32 matrix products for sm_75; use --precision fp16")
        if spec.target == "cuda":
            eager.kind_of("cuda")

    def build(self, program: Program, spec: Spec, path: Path) -> None:
        """Write the program's engine to `path`."""
        if spec.target == "cuda":
            _build_on_gpu(program, spec, path)
        else:
            _build_rtx(program, spec, path)

    def emulate(self, program: Program, spec: Spec) -> Engine:
        """Return the graph that TensorRT for RTX builds from, run by ONNX Runtime cast by cast."""
        return ort.open_graph(program, _graph(program, spec).SerializeToString(), optimize=False)

    def targets(self, device: str) -> list[str]:
        """Return the targets whose engines run on a GPU: made for it, then portable, then Torch-TensorRT's."""
        self.check_device(device)
        eager.kind_of(device)
        import torch

        capability = torch.cuda.get_device_capability(device)
        found = []
        if self.missing("portable") is None:
            found += [RTX_CAPABILITIES[capability]] if capability in RTX_CAPABILITIES else []
            found += ["portable"] if capability >= (8, 0) else []
        if self.missing("cuda") is None:
            found.append("cuda")
        if not found:
            raise EngineError(f"{self.missing('portable')}, or for this GPU alone: pip install torch-tensorrt")
        return found

    def unfit(self, device: str) -> str | None:
        """Return why it is not for a GPU: it is not installed, or not documented to run on one of its kind."""
        import torch

        if self.missing("cuda") is None:
            return None
        if reason := self.missing("portable"):
            return reason
        if torch.cuda.get_device_capability(device) in PORTABLE_CAPABILITIES:
            return None
        return f"backend {self.name} needs torch-tensorrt on {gpu(device)}: TensorRT for RTX is not for it"

    def load(self, program: Program, path: Path | None, runtime: Runtime) -> eager.TorchEngine:
        """Open the engine at `path` on a GPU; see `Backend.load`."""
        assert path is not None
        target = eager.prepare(runtime)
        if path.suffix == TORCH_SUFFIX:
            torch_tensorrt = importlib.import_module("torch_tensorrt")
            run = torch_tensorrt.load(str(path)).module()
        else:
            run = _RtxEngine(program, path, target)
        return eager.TorchEngine(program, run, target, self.name)


def _missing_torch_tensorrt() -> str | None:
    if find_spec("torch_tensorrt") is not None:
        return None
    return (
        "backend tensorrt needs torch_tensorrt for target cuda, which is not installed; run: pip install torch-tensorrt"
    )


def _torch_tensorrt_version() -> str:
    """Return the version of the distribution that is installed: `torch-tensorrt-rtx` has the same module."""
    for name in ("torch-tensorrt", "torch-tensorrt-rtx"):
        with suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return "unknown"


def _build_on_gpu(program: Program, spec: Spec, path: Path) -> None:
    """Build by Torch-TensorRT; the graph lies on the GPU, its casts say which products are in half precision."""
    from faceage.engines.export import export_for

    torch_tensorrt = importlib.import_module("torch_tensorrt")
    inputs = [
        torch_tensorrt.Input(min_shape=low, opt_shape=typical, max_shape=high, name=spec.name)
        for spec, (low, typical, high) in zip(program.inputs, _profile(program), strict=True)
    ]
    module = torch_tensorrt.dynamo.compile(
        export_for(program, spec),
        arg_inputs=inputs,
        require_full_compilation=True,  # what is left to torch would be slow, and nobody would see it
        min_block_size=1,
        disable_tf32=True,
        immutable_weights=True,
    )
    torch_tensorrt.save(module, str(path), output_format="exported_program", arg_inputs=inputs, retrace=False)


def _profile(program: Program) -> list[list[tuple[int, ...]]]:
    """Return the smallest, typical and largest shape of each input."""
    return [[tuple(min(n, MAX_SIZE) for n in spec.sizes(which)) for which in ("min", "typical", "max")]
            for spec in program.inputs]  # fmt: skip


@cache
def _rtx() -> tuple[Any, Any]:
    """Return the module and its logger: a process has one, and TensorRT warns of a second."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            logger.debug("TensorRT: %s", message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last_error = message

    return trt, Log()


def _graph(program: Program, spec: Spec) -> onnx.ModelProto:
    """Return the graph that an engine is built from: for fp16 with casts around its convolutions and products."""
    import onnx

    model = onnx.load(program.graph, load_external_data=False)
    if spec.precision != "fp16":
        return model
    nodes = []
    for number, node in enumerate(model.graph.node):
        if node.op_type not in PRODUCTS:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name:
                node.input[place] = f"{name}_half{number}_{place}"
                nodes.append(onnx.helper.make_node("Cast", [name], [node.input[place]], to=onnx.TensorProto.FLOAT16))
        (output,) = node.output
        node.output[0] = f"{output}_half"
        nodes += [node, onnx.helper.make_node("Cast", [node.output[0]], [output], to=onnx.TensorProto.FLOAT)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # they say float32 of what is half now
    return model


def _build_rtx(program: Program, spec: Spec, path: Path) -> None:
    """Build by TensorRT for RTX; needs no GPU."""
    trt, log = _rtx()
    builder = trt.Builder(log)
    # Types are those of the graph, whose casts say which products are in half precision.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(_graph(program, spec).SerializeToString(), str(program.graph)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"{program.name}: TensorRT for RTX cannot read the graph ({reasons}); report this")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is to mean fp32
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # CUDA graphs need it
    profile = builder.create_optimization_profile()
    for tensor, shapes in zip(program.inputs, _profile(program), strict=True):
        if any(isinstance(axis, Axis) for axis in tensor.shape):
            profile.set_shape(ort.INPUT_PREFIX + tensor.name, *shapes)
    config.add_optimization_profile(profile)
    if spec.target != "portable":
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, spec.target.replace("_", "").upper())
        config.set_compute_capability(capability, 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{program.name}: TensorRT for RTX cannot build it for {spec.target}: {log.last_error}")
    path.write_bytes(engine)


class _RtxEngine:
    """An engine of TensorRT for RTX as a function of CUDA tensors.

    Inputs are copied on the GPU into buffers that stay where they are, so that CUDA graphs can be replayed; TensorRT
    captures one for each set of shapes. What it compiles on the GPU is kept beside the engine, in a `.cache` file.
    """

    def __init__(self, program: Program, path: Path, device: torch.device) -> None:
        import torch

        trt, log = _rtx()
        self._program = program
        self._device = device
        self._lock = Lock()  # an execution context is for one call at a time
        self._buffers: dict[str, Tensor] = {}
        self._cache_file = path.with_suffix(".cache")
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(log)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise EngineError(
                    f"TensorRT for RTX cannot run {path.name} on {gpu(str(device))} ({log.last_error}); "
                    "use --backend aotinductor"
                )
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            self._cache = config.create_runtime_cache()
            if self._cache_file.exists():
                self._cache.deserialize(self._cache_file.read_bytes())  # it refuses that of another GPU or driver
            config.set_runtime_cache(self._cache)
            self._context = self._engine.create_execution_context(config)
            self._stream = torch.cuda.Stream(device)
        atexit.register(self._keep_cache)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        import torch

        caller = torch.cuda.current_stream(self._device)
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            for spec, value in zip(self._program.inputs, inputs, strict=True):
                name = ort.INPUT_PREFIX + spec.name
                if not self._context.set_input_shape(name, tuple(value.shape)):
                    raise EngineError(
                        f"{self._program.name}: {spec.name} of {tuple(value.shape)} is outside the engine's range "
                        f"(axes up to {MAX_SIZE}); use --device cpu for such pictures"
                    )
                self._bind(name, tuple(value.shape)).copy_(value)
            outputs = []
            for spec in self._program.outputs:
                name = ort.OUTPUT_PREFIX + spec.name
                outputs.append(self._bind(name, tuple(self._context.get_tensor_shape(name))))
            size = self._context.update_device_memory_size_for_shapes()
            self._context.set_device_memory(self._room("", size // 4 + 1).data_ptr(), size)
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise EngineError(f"{self._program.name}: TensorRT failed ({_rtx()[1].last_error}); use --device cpu")
            results = tuple(output.clone() for output in outputs)
        caller.wait_stream(self._stream)
        for result in results:
            result.record_stream(caller)
        return results

    def _bind(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the buffer of an input or output, whose address the context knows."""
        count = 1
        for n in shape:
            count *= n
        buffer = self._room(name, count)
        self._context.set_tensor_address(name, buffer.data_ptr())
        return buffer[:count].view(shape)

    def _room(self, name: str, count: int) -> Tensor:
        """Return at least `count` float32 on the GPU, the same as before if they are enough."""
        import torch

        if name not in self._buffers or self._buffers[name].numel() < count:
            self._buffers[name] = torch.empty(count, device=self._device)
        return self._buffers[name]

    def _keep_cache(self) -> None:
        """Write what was compiled on the GPU, for the next process."""
        if not self._cache_file.parent.is_dir():
            return  # a draft's, whose folder goes when it has been compared with torch
        part = self._cache_file.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(self._cache.serialize())
        os.replace(part, self._cache_file)
