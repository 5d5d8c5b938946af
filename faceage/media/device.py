"""Frames on a GPU: decoded there where it can, brought there where it cannot, and taken from there by an encoder.

NVDEC and NVENC know 4:2:0 as NV12 and P010, so all 4:2:0 frames on a GPU are of these formats, whoever decoded them.
Whatever is missing (a driver, NVDEC's library, NVENC on an H100) alone goes over the host, which is said once a file.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import av
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.video.frame import CudaContext, VideoFrame
from av.video.stream import VideoStream

from faceage.kernels import clone_planes, decoding, upload_planes
from faceage.media.planes import read_only_planes
from faceage.media.probe import VideoInfo, frame_format
from faceage.types import Frame

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_ON_DEVICE = {
    **dict.fromkeys(("yuv420p", "yuvj420p", "nv12"), "nv12"),
    **dict.fromkeys(("yuv420p10le", "p010le"), "p010le"),
}
"""Decoded formats that a GPU has under another name."""


def is_gpu(device: str | None) -> bool:
    """Return whether a device, as `VideoReader` is given one, is a GPU."""
    return device is not None and device.startswith("cuda")


def device_format(info: VideoInfo) -> str | None:
    """Return the format that NVDEC and NVENC have for a video, or None if they have none."""
    if info.width % 2 or info.height % 2:
        return None
    return _ON_DEVICE.get(info.pixel_format)


@contextmanager
def hardware(device: str) -> Iterator[HWAccel]:
    """Give PyAV's setting that leaves frames on a GPU; whatever is opened with it has to be opened inside the block.

    FFmpeg is to use torch's context of the GPU. It takes the primary context only if that has its own flags, which it
    has not once torch is at work; so it takes the one that is current in the thread, which is torch's inside the block.

    Args:
        device: "cuda" or "cuda:N".
    """
    options: dict[str, object] = {}
    with ExitStack() as stack:
        if find_spec("torch") is not None:
            import torch

            if torch.cuda.is_available():
                stack.enter_context(torch.cuda.device(device))
                torch.zeros(1, device=device)  # a thread has no context before its first call
                options = {"primary_ctx": "0", "current_ctx": "1"}
        number = device.partition(":")[2] or "0"
        yield HWAccel("cuda", device=number, allow_software_fallback=True, options=options, is_hw_owned=True)


def open_decoder(container: InputContainer, info: VideoInfo, device: str) -> InputContainer:
    """Return the container opened again, with its video decoded on a GPU; or itself, saying once why not."""
    reason = None
    if device_format(info) is None:
        reason = f"a GPU decodes 4:2:0 with even sides, not {info.pixel_format} {info.width}x{info.height}"
    elif info.field_order > 1:
        reason = "it is interlaced, and which frames are, only the CPU's decoder says"
    elif info.closed_captions:
        reason = "its closed captions come with frames of the CPU's decoder only"
    else:
        reason = _decoder_missing(info, device)
    if reason is None:
        again = _open_on_gpu(info, device)
        again.flags = container.flags
        container.close()
        return again
    _say_decoded_on_host(info.path, device, reason)
    return container


def _open_on_gpu(info: VideoInfo, device: str) -> InputContainer:
    with hardware(device) as accelerator:
        return av.open(str(info.path.absolute()), metadata_errors="replace", hwaccel=accelerator)


def _decoder_missing(info: VideoInfo, device: str) -> str | None:
    """Return why a GPU does not decode a video, or None if it does: one frame is decoded."""
    try:
        with _open_on_gpu(info, device) as container:
            stream = cast(VideoStream, container.streams[info.stream_index])
            if not stream.codec_context.is_hwaccel:
                return f"FFmpeg has no decoder of {info.codec} for a GPU"
            first = next(container.decode(stream), None)
    except (av.FFmpegError, RuntimeError) as error:
        return f"FFmpeg cannot use the GPU: {error}; see `faceage doctor`"
    if first is not None and is_on_device(first):
        return None
    return "NVDEC refused it: libnvcuvid.so.1 is missing, or this GPU does not decode such video"


@lru_cache(maxsize=1024)
def _say_decoded_on_host(path: Path, device: str, reason: str) -> None:
    """Log once a file why its frames are decoded on the CPU."""
    log.info("%s: decoded on the CPU and copied to %s: %s", path, device, reason)


def is_on_device(native: VideoFrame) -> bool:
    """Return whether a decoded frame lies on a GPU."""
    return native.format.name == "cuda"


def software_format(native: VideoFrame) -> str:
    """Return the format of a decoded frame's samples, wherever they lie."""
    if is_on_device(native):
        assert native.sw_format is not None  # every hardware frame has one
        return native.sw_format.name
    return native.format.name


def planes_on_device(native: VideoFrame) -> tuple[Tensor, ...]:
    """Return a copy of the planes that the decoder left on the GPU: its own surfaces are few, and are used again.

    It is copied in the stream of decoded frames: there the decoder wrote it, and writes it again after the copy.
    """
    from torch.utils.dlpack import from_dlpack

    # torch.from_dlpack(plane) would pass the stream, which PyAV refuses.
    surface = [from_dlpack(plane.__dlpack__()) for plane in native.planes]
    with decoding(str(surface[0].device)):
        return clone_planes(surface)


def planes_to_device(native: VideoFrame, device: str) -> tuple[tuple[Tensor, ...], str, VideoFrame]:
    """Bring a frame that the CPU decoded to a device; return its planes there, their format, and the host's frame."""
    name = _ON_DEVICE.get(native.format.name) if not (native.width % 2 or native.height % 2) else None
    if name is not None and name != native.format.name:
        native = native.reformat(format=name)  # U and V interleaved: no sample is changed
    name = name or cast(str, frame_format(native.format.name))
    return upload_planes(read_only_planes(native, name), device), name, native


def device_frame(frame: Frame) -> VideoFrame:
    """Return a PyAV frame of a frame's tensors, for an encoder on their device. No sample is copied."""
    import torch

    planes = cast("tuple[Tensor, ...]", frame.planes)
    if frame.ready is not None:
        cast("torch.cuda.Event", frame.ready).synchronize()  # NVENC reads outside of torch's streams
    context = _cuda_context(planes[0].device.index) if is_gpu(frame.device) else None
    with torch.cuda.device_of(planes[0]):
        return VideoFrame.from_dlpack(planes, format=frame.pixel_format, cuda_context=context)


@lru_cache(maxsize=16)
def _cuda_context(index: int) -> CudaContext:
    """Return FFmpeg's side of torch's context of a GPU, see `hardware`: one, as it keeps the pools of frames."""
    return CudaContext(device_id=index, primary_ctx=False, current_ctx=True)


@lru_cache(maxsize=64)
def encoder_missing(name: str, pixel_format: str, device: str) -> str | None:
    """Return why an encoder of NVENC does not work on a GPU, or None if it does: a small one is opened."""
    try:
        with hardware(device) as accelerator, av.open(io.BytesIO(), "w", format="matroska") as output:
            stream = output.add_stream(name, rate=25, hwaccel=accelerator)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = 256, 256, pixel_format
            stream.codec_context.open()
    except (av.FFmpegError, ValueError, NotImplementedError) as error:
        return f"{error}"
    return None
