"""The torch backend: the network itself, uncompiled. The reference that the others are checked against."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from faceage.engines.base import Backend, Precision, Program, Runtime, Spec
from faceage.errors import EngineError
from faceage.extras import missing
from faceage.kernels import all_to_host, to_device
from faceage.types import FloatArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor


logger = logging.getLogger(__name__)


class TorchEngine:
    """A function of torch tensors behind the engine protocol: this backend's, and every one that runs on a GPU."""

    def __init__(
        self,
        program: Program,
        run: Callable[..., Tensor | tuple[Tensor, ...]],
        device: torch.device,
        backend: str = "torch",
    ) -> None:
        """Wrap `run`, whose inputs and outputs lie on `device`."""
        self.name = program.name
        self.backend = backend
        self.device: str | None = None if device.type == "cpu" else str(device)
        self._program = program
        self._run = run
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)  # the weights are there, for the streams of all threads

    def __call__(self, *arrays: FloatArray) -> tuple[FloatArray, ...]:
        """Run the network; see `base.Engine`."""
        import torch

        sizes = self._program.check(arrays)
        are_tensors = not isinstance(arrays[0], np.ndarray)
        if 0 in sizes.values():
            empty = self._program.empty_outputs(sizes)
            return tuple(torch.tensor(array, device=self._device) for array in empty) if are_tensors else empty
        with torch.inference_mode():
            # Contiguous: compiled code takes the strides of its inputs for granted.
            tensors = [
                to_device(array, self._device) if isinstance(array, np.ndarray) else array.contiguous()
                for array in arrays
            ]
            outputs = self._run(*tensors)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return tuple(outputs) if are_tensors else tuple(all_to_host(outputs))


def has_gpu() -> bool:
    """Return whether torch can use a GPU. The driver is asked first: importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return False
    if reason := missing("torch", "a GPU is there; using it"):
        logger.warning("%s", reason)
        return False
    import torch

    return torch.cuda.is_available()


class Torch(Backend):
    """torch itself, on CPUs and GPUs."""

    name = "torch"
    kinds = ("cpu", "cuda")

    def missing(self, target: str) -> str | None:
        """Return how to install torch, or None."""
        return missing("torch", f"backend {self.name}")

    def best_precision(self, device: str) -> Precision:
        """Return fp32: it is the reference."""
        return "fp32"

    def versions(self, spec: Spec) -> dict[str, str]:
        """Return nothing: it builds nothing."""
        return {}

    def check(self, spec: Spec) -> None:
        """Raise EngineError: it builds nothing in half precision."""
        if spec.precision != "fp32":
            raise EngineError(
                f"backend {self.name} is the reference, in fp32 only; found {spec.precision}: use another backend"
            )

    def targets(self, device: str) -> list[str]:
        """Return the device, as a target; see `Backend.targets`."""
        kind_of(device)
        return [device]

    def load(self, program: Program, path: Path | None, runtime: Runtime) -> TorchEngine:
        """Make the network on the device; `path` plays no part."""
        target = prepare(runtime)
        return TorchEngine(program, program.network(True).to(target), target)


def kind_of(device: str) -> str:
    """Return the kind of a device: "cpu" or "cuda".

    Raises:
        EngineError: if `device` is not "cpu", "cuda" or "cuda:N", or is not in this machine.
    """
    if device == "cpu":
        return device
    if reason := missing("torch", f"device {device}"):
        raise EngineError(reason)
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
    return target.type


def prepare(runtime: Runtime) -> torch.device:
    """Set up torch for engines, and return their device; the threads are set for torch as a whole."""
    import torch

    target = torch.device(runtime.device)
    if target.type == "cpu":
        torch.set_num_threads(runtime.threads)
    else:
        # Convolutions in TF32, torch's own default, differ by 1e-3: fp32 is to mean fp32.
        torch.backends.cudnn.allow_tf32 = False
    return target
