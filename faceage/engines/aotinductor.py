"""The AOTInductor backend: torch's own ahead-of-time compiler, for any CUDA GPU and for CPUs.

An engine is a `.pt2` package of machine code, made for the machine that it was built on.
"""

from __future__ import annotations

import platform
import shutil
import warnings
from pathlib import Path

from faceage.engines import eager
from faceage.engines.base import Backend, Precision, Program, Runtime, Spec, fingerprint
from faceage.errors import EngineError
from faceage.extras import missing

SUFFIX = ".pt2"

_CONFIG = {"aot_inductor.use_runtime_constant_folding": True}
"""Weights are turned and cast once, when an engine is opened."""


class AOTInductor(Backend):
    """AOTInductor, on CPUs and GPUs."""

    name = "aotinductor"
    kinds = ("cpu", "cuda")

    def suffix(self, program: Program, target: str) -> str:
        """Return the end of its files' names."""
        return SUFFIX

    def missing(self, target: str) -> str | None:
        """Return why it cannot build here, or None: it writes C++."""
        if reason := missing("torch", f"backend {self.name}"):
            return reason
        if not (shutil.which("g++") or shutil.which("clang++")):
            return f"backend {self.name} needs a C++ compiler, found no g++; install one (Debian: apt install g++)"
        return None if target == "cpu" else self._missing_toolkit()

    def _missing_toolkit(self) -> str | None:
        """Return that there is no CUDA toolkit, whose headers the generated code includes, or None."""
        from torch.utils import cpp_extension

        if cpp_extension.CUDA_HOME is not None:
            return None
        return (
            f"backend {self.name} needs the CUDA toolkit, found neither nvcc nor CUDA_HOME; install one (Debian: "
            "apt install nvidia-cuda-toolkit) or set CUDA_HOME to it"
        )

    def best_precision(self, device: str) -> Precision:
        """Return fp16 on a GPU; on a CPU it is no faster than fp32."""
        return "fp32" if device == "cpu" else "fp16"

    def versions(self, spec: Spec) -> dict[str, str]:
        """Return the version of torch, and the processor that the code is for."""
        from importlib.metadata import version  # with what it imports it takes 12 ms, which no run on a CPU needs

        return {"torch": version("torch"), "machine": cpu() if spec.target == "cpu" else gpu(spec.target)}

    def check(self, spec: Spec) -> None:
        """Raise EngineError unless `spec` is what it builds: for the processor or the GPU of this machine."""
        if spec.kind not in ("cpu", "cuda"):
            raise EngineError(
                f"backend {self.name} builds for cpu or cuda, not for {spec.target}; use --backend tensorrt"
            )
        if spec.precision == "bf16":
            raise EngineError(
                f"backend {self.name} builds nothing in bf16; use --backend openvino, or --precision fp32"
            )
        if spec.kind == "cuda":
            eager.kind_of(spec.target)

    def build(self, program: Program, spec: Spec, path: Path) -> None:
        """Compile the network to a package at `path`."""
        import torch

        from faceage.engines.export import export_for

        exported = export_for(program, spec)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=_CONFIG)
            except Exception as error:  # compilers fail in many ways: torch's errors, the C++ compiler's, the system's
                raise EngineError(
                    f"{program.name}: AOTInductor cannot compile it for {spec.target} "
                    f"({type(error).__name__}: {error}); use --backend torch, or --device cpu"
                ) from error

    def targets(self, device: str) -> list[str]:
        """Return the device; see `Backend.targets`."""
        eager.kind_of(device)
        return [device]

    def load(self, program: Program, path: Path | None, runtime: Runtime) -> eager.TorchEngine:
        """Open the package at `path`; see `Backend.load`."""
        import torch

        target = eager.prepare(runtime)
        index = -1 if target.type == "cpu" else target.index or 0
        try:
            run = torch._inductor.aoti_load_package(str(path), device_index=index)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise EngineError(f"torch cannot open {path}: {error}") from error
        return eager.TorchEngine(program, run, target, self.name)


def gpu(device: str = "cuda") -> str:
    """Return the name and the compute capability of a GPU: engines for it run on no other kind.

    Raises:
        EngineError: if there is none.
    """
    import torch

    eager.kind_of(device)
    return f"{torch.cuda.get_device_name(device)} sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"


def cpu() -> str:
    """Return what a compiler makes code for: the processor's instruction sets, as a hash."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return fingerprint(next((line for line in lines if line.startswith("flags")), platform.processor()))[:16]
