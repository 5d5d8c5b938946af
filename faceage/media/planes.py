"""Between the frames of PyAV and our own: planes read-only or writable, without a copy where there can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from faceage.kernels import await_samples, clone_planes, download_planes, ready_event, upload_planes
from faceage.types import PIXEL_LAYOUTS, Frame, HostPlane, Plane

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from torch import Tensor


def read_only_planes(native: VideoFrame, pixel_format: str) -> tuple[HostPlane, ...]:
    """Return views of a decoded frame that hold their own reference on its buffers.

    DLPack gives such views; `make_writable` may then replace the frame's buffers while they are read.
    """
    count = len(PIXEL_LAYOUTS[pixel_format].planes)
    # DLPack export rounds the chroma of odd-sized NV12 and P010 down, and knows no upside-down pictures.
    odd = pixel_format in ("nv12", "p010le") and (native.width % 2 or native.height % 2)
    if odd or native.planes[0].line_size < 0:
        native.make_writable()
        return tuple(_read_only(plane) for plane in _plane_views(native, pixel_format))
    return tuple(_read_only(cast(HostPlane, np.from_dlpack(plane))) for plane in native.planes[:count])


def _read_only(plane: HostPlane) -> HostPlane:
    plane.flags.writeable = False
    return plane


def _plane_views(native: VideoFrame, pixel_format: str) -> tuple[HostPlane, ...]:
    """Return arrays over the frame's buffers, valid while those are the frame's."""
    layout = PIXEL_LAYOUTS[pixel_format]
    views = []
    for plane, spec in zip(native.planes, layout.planes, strict=False):  # alpha may follow
        shape: tuple[int, ...] = (-(-native.height // spec.sub_y), -(-native.width // spec.sub_x))
        strides: tuple[int, ...] = (plane.line_size, layout.dtype.itemsize)
        if (channels := len(spec.components)) > 1:
            shape += (channels,)
            strides = (plane.line_size, channels * layout.dtype.itemsize, layout.dtype.itemsize)
        buffer = cast(memoryview, plane)  # a Cython class with the buffer protocol, of which the stubs say nothing
        views.append(np.ndarray(shape, layout.dtype, buffer, strides=strides))
    return tuple(views)


def writable(frame: Frame) -> Frame:
    """Return the frame with planes that may be changed. Call it before any sample is.

    Decoded frames are the pictures that the decoder predicts the next ones from. The samples are copied unless nothing
    but the given frame refers to them; the given frame's own planes stay as they were.
    """
    native = cast("VideoFrame | None", frame.native)
    if native is not None and _are_of(frame.planes, native, frame.pixel_format):
        native.make_writable()
        return replace(frame, planes=_plane_views(native, frame.pixel_format))
    if frame.is_array:
        return replace(frame, planes=tuple(cast(HostPlane, plane).copy() for plane in frame.planes))
    await_samples([frame])
    planes = clone_planes(cast("tuple[Tensor, ...]", frame.planes))
    return replace(frame, planes=planes, ready=ready_event(planes))


def to_device(frame: Frame, device: str | None) -> Frame:
    """Return a frame whose planes may be changed: tensors on a device, or, if that is None, as `writable` gives it."""
    if device is None:
        return writable(frame)
    planes = upload_planes(cast(tuple[HostPlane, ...], frame.planes), device)
    return replace(frame, planes=planes, ready=ready_event(planes, is_decoded=True))


def to_host(frame: Frame) -> Frame:
    """Return a frame with its planes as arrays. If they are on a GPU, the calling thread waits for them."""
    return frame if frame.is_array else replace(frame, planes=host_planes(frame), ready=None)


def host_planes(frame: Frame) -> tuple[HostPlane, ...]:
    """Return a frame's planes as arrays. If they are on a GPU, the calling thread waits for them."""
    if frame.is_array:
        return cast(tuple[HostPlane, ...], frame.planes)
    return tuple(cast(HostPlane, np.from_dlpack(plane)) for plane in download_planes(frame))


def to_native(frame: Frame) -> VideoFrame:
    """Return a PyAV frame of a frame's planes, with the metadata that came with them from the decoder.

    It is the decoder's own where the planes are still its buffers; else the samples are copied into it, from a GPU too.
    """
    native = cast("VideoFrame | None", frame.native)
    if native is None:
        from av.video.frame import VideoFrame

        names = {"gray16": "gray16le", "rgb48": "rgb48le", "rgba64": "rgba64le"}
        height, width = frame.planes[0].shape[:2]
        native = VideoFrame(width, height, names.get(frame.pixel_format, frame.pixel_format))
    elif _are_of(frame.planes, native, frame.pixel_format):
        return native
    native.make_writable()
    for target, plane in zip(_plane_views(native, frame.pixel_format), host_planes(frame), strict=True):
        target[...] = plane
    native.pts, native.time_base = frame.pts, frame.time_base
    return native


def _are_of(planes: Sequence[Plane], native: VideoFrame, pixel_format: str) -> bool:
    """Return whether planes are views of a PyAV frame's buffers as they are now."""
    return all(
        isinstance(plane, np.ndarray)
        and plane.__array_interface__["data"][0] == view.__array_interface__["data"][0]
        and plane.strides == view.strides
        for plane, view in zip(planes, _plane_views(native, pixel_format), strict=True)
    )
