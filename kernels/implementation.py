"""Which implementation of an operation runs: chosen by where the frame lives, unless one is named."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

from faceage.types import Frame

log = logging.getLogger(__name__)

Implementation = Literal["cpu", "ref", "triton"]
"""NumPy and OpenCV, for arrays; PyTorch, for anything; a Triton kernel, for tensors on a GPU."""


def choose_implementation(frame: Frame, impl: Literal["auto"] | Implementation) -> Implementation:
    """Return what runs for frames like this one: "auto" is the fastest that there is.

    The environment variable FACEAGE_KERNELS=ref makes PyTorch the choice for tensors, to compare the kernels with it.
    """
    if impl != "auto":
        return impl
    if frame.is_array:
        return "cpu"
    if os.environ.get("FACEAGE_KERNELS") == "ref":
        return "ref"
    return "triton" if frame.device.startswith("cuda") and has_triton() else "ref"


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether Triton is installed; the first call says what its absence means."""
    if find_spec("triton") is not None:
        return True
    log.info("Triton is not installed, so frames on the GPU are read and changed by PyTorch; pip install triton")
    return False
