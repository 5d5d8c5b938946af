"""The torch backend: the network itself, uncompiled. The reference that the others are checked against."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from faceage.engines.base import Program
from faceage.errors import EngineError
from faceage.types import FloatArray

if TYPE_CHECKING:
    import torch

NAME = "torch"
SUFFIX = None
"""Nothing is stored."""


class EagerEngine:
    """A torch module behind the engine protocol."""

    backend = NAME

    def __init__(self, program: Program, module: torch.nn.Module, device: torch.device) -> None:
        self.name = program.name
        self._program = program
        self._module = module.to(device)
        self._device = device

    def __call__(self, *arrays: FloatArray) -> tuple[FloatArray, ...]:
        """Run the network; see `base.Engine`."""
        import torch

        sizes = self._program.check(arrays)
        if 0 in sizes.values():
            return self._program.empty_outputs(sizes)
        with torch.inference_mode():
            outputs = self._module(*(torch.tensor(array, device=self._device) for array in arrays))
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return tuple(output.float().cpu().numpy() for output in outputs)


def versions() -> dict[str, str]:
    """Return the versions that the result depends on."""
    return {"torch": version("torch")}


def check_device(device: str) -> None:
    """Raise EngineError if `device` is not "cpu", "cuda" or "cuda:N", or is not in this machine."""
    import torch

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise EngineError(f'unknown device "{device}"; use cpu, cuda or cuda:N') from error
    if target.type not in ("cpu", "cuda"):
        raise EngineError(f'unknown device "{device}"; use cpu, cuda or cuda:N')
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise EngineError(
            f"device {device} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu, or check the driver with: faceage doctor"
        )


def load(program: Program, path: Path | None, device: str, threads: int) -> EagerEngine:
    """Build the network on `device`; `path` plays no part, and `threads` is set for torch as a whole."""
    import torch

    target = torch.device(device)
    if target.type == "cpu":
        torch.set_num_threads(threads)
    module, _ = program.build()
    return EagerEngine(program, module, target)
