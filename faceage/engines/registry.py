"""The backends that there are, and which of them is best on a device. A new one is a class, and one line here."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from faceage.engines.aotinductor import AOTInductor
from faceage.engines.base import Backend, Precision, Runtime
from faceage.engines.eager import Torch, has_gpu, kind_of
from faceage.engines.openvino import OpenVINO
from faceage.engines.ort import OnnxRuntime
from faceage.engines.tensorrt import TensorRT
from faceage.errors import EngineError

logger = logging.getLogger(__name__)

BackendName = Literal["openvino", "onnxruntime", "tensorrt", "aotinductor", "torch"]
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (OpenVINO(), OnnxRuntime(), TensorRT(), AOTInductor(), Torch())
}
"""By name. On each kind of device, the earlier is the faster."""
DEFAULT_RUNTIME = Runtime(backend=BACKENDS["openvino"])
"""What is fastest on a CPU, in fp32."""


def backend_named(name: str) -> Backend:
    """Return a backend.

    Raises:
        EngineError: if there is none such.
    """
    if name not in BACKENDS:
        raise EngineError(f'unknown backend "{name}"; use one of: {", ".join(BACKENDS)}')
    return BACKENDS[name]


def choose_runtime(
    *,
    backend: BackendName | Literal["auto"] = "auto",
    device: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    threads: int = 1,
) -> Runtime:
    """Return what is given, and of what is "auto" the fastest on this machine.

    A backend that would be faster but cannot be used is logged, with what mends that. On a GPU the slower ones are
    fallbacks, unless a backend is named: that one is installed does not say that it works with the driver.

    Args:
        backend: the name of one.
        device: "cpu", "cuda" or "cuda:N".
        precision: see `base.Precision`.
        threads: of one call on the CPU.

    Raises:
        EngineError: if there is no such backend, or the device is not there.
    """
    chosen = None if backend == "auto" else backend_named(backend)
    if device == "auto":
        kinds = ("cpu", "cuda") if chosen is None else chosen.kinds
        device = kinds[0] if len(kinds) == 1 else "cuda" if has_gpu() else "cpu"
    fallbacks: list[Backend] = []
    if chosen is None:
        chosen = best_backend(device)
        if device != "cpu":
            _, *fallbacks = backends_for(device)
    return Runtime(
        backend=chosen,
        fallbacks=tuple(fallbacks),
        device=device,
        threads=threads,
        precision=chosen.best_precision(device) if precision == "auto" else precision,
    )


def best_backend(device: str) -> Backend:
    """Return the fastest backend that runs on a device here.

    Raises:
        EngineError: if the device is not there.
    """
    kind = kind_of(device)
    for backend in BACKENDS.values():
        if kind not in backend.kinds:
            continue
        reason = backend.unfit(device)
        if reason is None:
            return backend
        logger.warning("%s", reason)
    raise EngineError(f"no backend runs on {device}; run: faceage doctor")


def backends_for(device: str) -> list[Backend]:
    """Return the backends that are installed and run on a device."""
    kind = kind_of(device)
    return [b for b in BACKENDS.values() if kind in b.kinds and b.unfit(device) is None]


assert tuple(BACKENDS) == get_args(BackendName)
