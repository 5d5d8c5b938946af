"""The TensorRT backend, for NVIDIA GPUs, in two flavours that the target decides.

`portable` and `sm_*`: TensorRT for RTX. It builds in seconds on any machine, with a GPU or without, and compiles the
last bit on the GPU when the engine first runs. `cuda`: Torch-TensorRT, which builds on the GPU that is present, for it.
"""

from __future__ import annotations

import importlib
import logging
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from faceage.engines import eager, ort
from faceage.engines.aotinductor import gpu
from faceage.engines.base import Axis, Backend, Engine, Precision, Program, Runtime, Spec
from faceage.engines.rtx import MAX_SIZE, RtxEngine, rtx
from faceage.errors import EngineError
from faceage.extras import missing

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

RTX_CAPABILITIES = {(7, 5): "sm_75", (8, 6): "sm_86", (8, 9): "sm_89", (12, 0): "sm_120"}
"""Compute capability of a GPU -> the target of its own engines."""
PORTABLE_CAPABILITIES = ((8, 6), (8, 9), (12, 0), (12, 1))
"""GPUs that run portable engines. Others, A100 and H100 among them, are not in its support matrix."""

TORCH_SUFFIX, RTX_SUFFIX = ".pt2", ".engine"
PRODUCTS = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
"""Operators that fp16 engines compute in half precision. Losses, norms and sums would overflow or vanish in it."""


class TensorRT(Backend):
    """TensorRT for RTX and Torch-TensorRT, on NVIDIA GPUs."""

    name = "tensorrt"
    kinds = ("cuda",)

    def suffix(self, program: Program, target: str) -> str:
        """Return the end of its files' names."""
        return TORCH_SUFFIX if target.startswith("cuda") else RTX_SUFFIX

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
        from importlib.metadata import version

        if spec.kind == "cuda":
            return {"torch-tensorrt": _torch_tensorrt_version(), "torch": version("torch"), "machine": gpu(spec.target)}
        return {"tensorrt-rtx": version("tensorrt-rtx")}

    def check(self, spec: Spec) -> None:
        """Raise EngineError if it builds nothing for `spec`."""
        if spec.target == "cpu":
            raise EngineError(f"backend {self.name} builds for NVIDIA GPUs, not for cpu; use --backend onnxruntime")
        if spec == Spec("sm_75", "fp32"):
            raise EngineError("TensorRT for RTX has no fp32 matrix products for sm_75; use --precision fp16")
        if spec.kind == "cuda":
            eager.kind_of(spec.target)

    def build(self, program: Program, spec: Spec, path: Path) -> None:
        """Write the program's engine to `path`."""
        if spec.kind == "cuda":
            _build_on_gpu(program, spec, path)
        else:
            _build_rtx(program, spec, path)

    def emulate(self, program: Program, spec: Spec) -> Engine:
        """Return the graph that TensorRT for RTX builds from, run by ONNX Runtime with the same rounding."""
        return ort.open_graph(program, _graph(program, spec, emulated=True).SerializeToString(), optimize=False)

    def targets(self, device: str) -> list[str]:
        """Return the targets whose engines run on a GPU: made for it, then portable, then Torch-TensorRT's."""
        self.check_device(device)
        if reason := self.unfit(device):
            raise EngineError(reason)
        found = []
        if self.missing("portable") is None:
            capability = _capability(device)
            found += [RTX_CAPABILITIES[capability]] if capability in RTX_CAPABILITIES else []
            found += ["portable"] if capability in PORTABLE_CAPABILITIES else []
        return found + ([device] if self.missing("cuda") is None else [])

    def unfit(self, device: str) -> str | None:
        """Return why it is not for a GPU: it is not installed, or not documented to run on one of its kind."""
        known = _capability(device) in {*RTX_CAPABILITIES, *PORTABLE_CAPABILITIES}
        if self.missing("cuda") is None or (known and self.missing("portable") is None):
            return None
        if known:
            return self.missing("portable")
        return f"backend {self.name}: TensorRT for RTX is not for {gpu(device)}, and {self.missing('cuda')}"

    def load(self, program: Program, path: Path | None, runtime: Runtime) -> eager.TorchEngine:
        """Open the engine at `path` on a GPU; see `Backend.load`."""
        assert path is not None
        target = eager.prepare(runtime)
        if path.suffix != TORCH_SUFFIX:
            return eager.TorchEngine(program, RtxEngine(program, path, target), target, self.name)
        try:
            run = importlib.import_module("torch_tensorrt").load(str(path)).module()
        except Exception as error:  # its errors and those of the libraries below it share no base
            raise EngineError(f"Torch-TensorRT cannot open {path} ({type(error).__name__}: {error})") from error
        return eager.TorchEngine(program, run, target, self.name)


def _capability(device: str) -> tuple[int, int]:
    """Return the compute capability of a GPU.

    Raises:
        EngineError: if it is not there.
    """
    eager.kind_of(device)
    import torch

    return torch.cuda.get_device_capability(device)


@cache
def _missing_torch_tensorrt() -> str | None:
    """Return why Torch-TensorRT cannot be used, or None: it is imported, for its libraries may be missing."""
    if find_spec("torch_tensorrt") is None:
        return "backend tensorrt for target cuda needs torch_tensorrt; run: pip install torch-tensorrt"
    try:
        importlib.import_module("torch_tensorrt")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # its own libraries are missing
        return (
            f"backend tensorrt cannot import torch_tensorrt ({type(error).__name__}: {error}); "
            "run: pip install --force-reinstall torch-tensorrt"
        )
    return None


def _torch_tensorrt_version() -> str:
    """Return the version of the distribution that is installed: `torch-tensorrt-rtx` has the same module."""
    from importlib.metadata import PackageNotFoundError, version

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
    exported = export_for(program, spec)
    try:
        module = torch_tensorrt.dynamo.compile(
            exported,
            arg_inputs=inputs,
            require_full_compilation=True,  # what is left to torch would be slow, and nobody would see it
            min_block_size=1,
            disable_tf32=True,
            immutable_weights=True,
        )
        torch_tensorrt.save(module, str(path), output_format="exported_program", arg_inputs=inputs, retrace=False)
    except Exception as error:  # its errors and those of the libraries below it share no base
        raise EngineError(
            f"{program.name}: Torch-TensorRT cannot build it ({type(error).__name__}: {error}); "
            "use --backend aotinductor"
        ) from error


def _profile(program: Program) -> list[list[tuple[int, ...]]]:
    """Return the smallest, typical and largest shape of each input."""
    return [[tuple(min(n, MAX_SIZE) for n in spec.sizes(which)) for which in ("min", "typical", "max")]
            for spec in program.inputs]  # fmt: skip


def _graph(program: Program, spec: Spec, *, emulated: bool = False) -> onnx.ModelProto:
    """Return the graph that an engine is built from: for fp16 with casts around its convolutions and products.

    Emulated, these compute in float32 between values that are rounded to half: ONNX Runtime has no half precision on a
    CPU, and leaves out the casts around what it computes in another.
    """
    import onnx

    model = onnx.load(program.graph, load_external_data=False)
    if spec.precision != "fp16":
        return model
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    nodes = []

    def cast(source: str, target: str, kinds: tuple[int, ...]) -> None:
        """Append casts of `source` to each of `kinds` in turn; the last one gives `target`."""
        names = [source, *(f"{target}_{i}" for i in range(len(kinds) - 1)), target]
        for before, after, kind in zip(names, names[1:], kinds, strict=False):
            nodes.append(onnx.helper.make_node("Cast", [before], [after], to=kind))

    for number, node in enumerate(model.graph.node):
        if node.op_type not in PRODUCTS:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name:
                node.input[place] = f"{name}_half{number}_{place}"
                cast(name, node.input[place], (half, single) if emulated else (half,))
        (output,) = node.output
        node.output[0] = f"{output}_half"
        nodes.append(node)
        cast(node.output[0], output, (half, single) if emulated else (single,))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # they say float32 of what is half now
    return model


def _build_rtx(program: Program, spec: Spec, path: Path) -> None:
    """Build by TensorRT for RTX; needs no GPU."""
    trt, log = rtx()
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
