"""The only ways of values between the host and the device on which a frame's planes lie.

Planes that travel between host and device do so through page-locked memory, and not in the streams that compute (see
`streams`), so that they are copied while kernels of other frames run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import numpy.typing as npt

from faceage.kernels.streams import await_samples, decoding
from faceage.types import FloatArray, Frame, HostPlane, Plane, Samples

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PITCH_BYTES = 256
"""Rows of planes begin at multiples of this: kernels read and encoders take whole lines of the memory."""


def to_host(samples: Samples) -> FloatArray:
    """Return values as an array. A tensor's device is waited for: few and small ones only."""
    return samples if isinstance(samples, np.ndarray) else samples.cpu().numpy()


def begin_to_host(samples: torch.Tensor) -> Callable[[], FloatArray]:
    """Begin to copy values to the host; return what gives them as an array, and waits only if they are not there yet.

    The copy is ordered after what was asked of the device so far, and other work goes on meanwhile.
    """
    import torch

    if samples.device.type != "cuda":
        return partial(to_host, samples)
    target = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
    target.copy_(samples, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(samples.device))

    def finish() -> FloatArray:
        arrived.synchronize()
        return target.numpy()

    return finish


def all_to_host(samples: Sequence[Samples]) -> list[FloatArray]:
    """Return several values as arrays; those of a device go in one piece, for which it is waited once."""
    return begin_all_to_host(samples)()


def begin_all_to_host(samples: Sequence[Samples]) -> Callable[[], list[FloatArray]]:
    """Begin to copy several values to the host in one piece; return as `begin_to_host`."""
    if isinstance(samples[0], np.ndarray):
        arrays = [to_host(each) for each in samples]
        return lambda: arrays
    import torch

    tensors = [as_tensor(each) for each in samples]
    shapes, ends = [tensor.shape for tensor in tensors], np.cumsum([tensor.numel() for tensor in tensors])
    arrived = begin_to_host(torch.cat([tensor.flatten() for tensor in tensors]))

    def finish() -> list[FloatArray]:
        return [part.reshape(shape) for part, shape in zip(np.split(arrived(), ends[:-1]), shapes, strict=True)]

    return finish


def to_device(array: npt.NDArray, device: torch.device | str) -> torch.Tensor:
    """Return an array as a tensor on a device, without waiting for it."""
    import torch

    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def beside(home: Frame | Samples, value: T) -> T:
    """Return a value with its arrays where a frame or other samples live: beside arrays, the value itself.

    Args:
        home: says where.
        value: an array, a dataclass with arrays in it, at any depth, or anything else, which stays as it is.
    """
    plane = home.planes[0] if isinstance(home, Frame) else home
    if isinstance(plane, np.ndarray):
        return value
    if isinstance(value, np.ndarray):
        return cast(T, to_device(value, plane.device))
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: beside(plane, getattr(value, part.name)) for part in fields(value) if part.init}
        return replace(value, **parts)
    return value


def as_tensor(plane: Plane | Samples) -> torch.Tensor:
    """Return a plane as a tensor over the same memory."""
    import torch

    return torch.from_numpy(plane) if isinstance(plane, np.ndarray) else plane


def new_planes(like: Sequence[Plane], device: torch.device | str, *, pinned: bool = False) -> tuple[torch.Tensor, ...]:
    """Return planes of the same shapes and type, of unknown content, in one piece of memory.

    All have one pitch, and each begins where the one before ends: NVENC wants UV to follow Y so.

    Args:
        like: of one frame.
        device: where they lie.
        pinned: in page-locked memory of the host.
    """
    import torch

    dtype = getattr(torch, str(like[0].dtype).removeprefix("torch."))
    widths = [int(np.prod(plane.shape[1:])) for plane in like]
    unit = PITCH_BYTES // dtype.itemsize
    pitch = -(-max(widths) // unit) * unit
    heights = [plane.shape[0] for plane in like]
    memory = torch.empty(sum(heights) * pitch, dtype=dtype, device=device, pin_memory=pinned)
    planes, begin = [], 0
    for plane, height in zip(like, heights, strict=True):
        strides = (pitch, plane.shape[2], 1) if plane.ndim == 3 else (pitch, 1)
        planes.append(memory.as_strided(tuple(plane.shape), strides, begin * pitch))
        begin += height
    return tuple(planes)


def clone_planes(planes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return a copy of planes on their device, in memory as of `new_planes`."""
    copies = new_planes(planes, planes[0].device)
    for copy, plane in zip(copies, planes, strict=True):
        copy.copy_(plane)
    return copies


def upload_planes(planes: Sequence[HostPlane], device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """Return planes of the host as tensors on a device, in memory as of `new_planes`, without waiting for it.

    They are copied in the stream of decoded frames.
    """
    import torch

    is_cuda = torch.device(device).type == "cuda"
    staged = new_planes(planes, "cpu", pinned=is_cuda)
    for target, plane in zip(staged, planes, strict=True):
        # Numpy: decoded planes are read-only, of which torch makes no tensors without a warning.
        np.copyto(np.from_dlpack(target), plane)
    if not is_cuda:
        return staged
    with decoding(str(device)):
        uploaded = new_planes(planes, device)
        for target, source in zip(uploaded, staged, strict=True):
            target.copy_(source, non_blocking=True)
    return uploaded


def download_planes(frame: Frame) -> tuple[torch.Tensor, ...]:
    """Return a frame's planes as tensors of the host, in memory as of `new_planes`. The calling thread waits for them.

    They are copied in a stream of their own.
    """
    import torch

    planes = [as_tensor(plane) for plane in frame.planes]
    device = planes[0].device
    is_cuda = device.type == "cuda"
    targets = new_planes(planes, "cpu", pinned=is_cuda)
    if not is_cuda:
        for target, plane in zip(targets, planes, strict=True):
            target.copy_(plane)
        return targets
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        await_samples([frame])
        for target, plane in zip(targets, planes, strict=True):
            target.copy_(plane, non_blocking=True)
    stream.synchronize()
    return targets
