"""The only two ways of values between the host and the device on which a frame's planes lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from faceage.types import FloatArray, Plane, Samples

if TYPE_CHECKING:
    import torch


def to_host(samples: Samples) -> FloatArray:
    """Return values as an array. A tensor's device is waited for: few and small ones only."""
    return samples if isinstance(samples, np.ndarray) else samples.cpu().numpy()


def to_device(array: npt.NDArray, device: torch.device | str) -> torch.Tensor:
    """Return an array as a tensor on a device, without waiting for it."""
    import torch

    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def as_tensor(plane: Plane) -> torch.Tensor:
    """Return a plane as a tensor over the same memory."""
    import torch

    return torch.from_numpy(plane) if isinstance(plane, np.ndarray) else plane
