"""Streams of a GPU: decoding, computing and encoding do not wait in one queue, nor does the host wait for any of them.

Decoding has the default stream, for it is FFmpeg's: NVDEC writes its surfaces in it, and there they are copied. Each
thread that computes has a stream of its own (`computing`). An encoder reads outside of streams: the thread that feeds
it waits until a frame is ready, and nobody else does.

With each frame goes an event (`Frame.ready`), recorded after its samples were written and again after each change.
Whatever reads or changes samples begins with `await_samples`; so a thread that never called `computing` is right too,
only slower. What all threads read (constants, weights) is on the device before it is handed out: see `settle`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from faceage.types import Frame, Plane

if TYPE_CHECKING:
    import torch

_own = threading.local()


@contextmanager
def computing(device: str | None) -> Iterator[None]:
    """Let the calling thread compute in its own stream of a device; on a CPU, or where it is None, do nothing."""
    if device is None or not device.startswith("cuda"):
        yield
        return
    import torch

    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(streams[device]):
        yield


@contextmanager
def decoding(device: str) -> Iterator[None]:
    """Let the calling thread ask for what follows in the stream in which frames are decoded."""
    if not device.startswith("cuda"):
        yield
        return
    import torch

    with torch.cuda.stream(torch.cuda.default_stream(device)):
        yield


def ready_event(planes: Sequence[Plane], *, is_decoded: bool = False) -> torch.cuda.Event | None:
    """Return the `Frame.ready` of planes that a stream has written: None but on a GPU.

    Args:
        planes: of one frame.
        is_decoded: they were written in the stream of decoded frames, not in the calling thread's.
    """
    device = str(planes[0].device)
    if not device.startswith("cuda"):
        return None
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.default_stream(device) if is_decoded else torch.cuda.current_stream(device))
    return event


def await_samples(frames: Sequence[Frame]) -> None:
    """Let the calling thread's stream wait until the samples of frames are there. The host goes on."""
    for frame in frames:
        if frame.ready is not None:
            import torch

            stream = torch.cuda.current_stream(frame.device)
            stream.wait_event(cast("torch.cuda.Event", frame.ready))
            for plane in frame.planes:
                cast("torch.Tensor", plane).record_stream(stream)  # or their memory could be used again meanwhile


def samples_changed(frame: Frame) -> None:
    """Let those who await the samples of a frame from now on wait for what the calling thread's stream made of them."""
    if frame.ready is not None:
        import torch

        cast("torch.cuda.Event", frame.ready).record(torch.cuda.current_stream(frame.device))


def settle(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor when it is there, so that streams of other threads may read it. The host waits."""
    if tensor.device.type == "cuda":
        import torch

        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor
