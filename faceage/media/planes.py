"""The planes of a decoded frame as numpy arrays, read-only or writable, without a copy."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
from av.video.frame import VideoFrame

from faceage.types import PIXEL_LAYOUTS, Frame, Plane


def read_only_planes(native: VideoFrame, pixel_format: str) -> tuple[Plane, ...]:
    """Return views of a decoded frame that hold their own reference on its buffers.

    DLPack gives such views; `make_writable` may then replace the frame's buffers while they are read.
    """
    count = len(PIXEL_LAYOUTS[pixel_format].planes)
    # DLPack export rounds the chroma of odd-sized NV12 and P010 down, and knows no upside-down pictures.
    odd = pixel_format in ("nv12", "p010le") and (native.width % 2 or native.height % 2)
    if odd or native.planes[0].line_size < 0:
        native.make_writable()
        return tuple(_read_only(plane) for plane in _plane_views(native, pixel_format))
    return tuple(_read_only(cast(Plane, np.from_dlpack(plane))) for plane in native.planes[:count])


def _read_only(plane: Plane) -> Plane:
    plane.flags.writeable = False
    return plane


def _plane_views(native: VideoFrame, pixel_format: str) -> tuple[Plane, ...]:
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

    Decoded frames are the pictures that the decoder predicts the next ones from. The samples are copied if
    the decoder or an array still refers to them. The given frame's own planes stay as they were, but only
    the returned frame is to be written: both share `native`.
    """
    native = native_of(frame)
    native.make_writable()
    return replace(frame, planes=_plane_views(native, frame.pixel_format), native=native)


def native_of(frame: Frame) -> VideoFrame:
    """Return the PyAV frame under a frame; one is made for a frame that was built from arrays."""
    if isinstance(frame.native, VideoFrame):
        return frame.native
    names = {"gray16": "gray16le", "rgb48": "rgb48le", "rgba64": "rgba64le"}
    native = VideoFrame(frame.width, frame.height, names.get(frame.pixel_format, frame.pixel_format))
    for target, plane in zip(_plane_views(native, frame.pixel_format), frame.planes, strict=True):
        target[...] = plane
    native.pts, native.time_base = frame.pts, frame.time_base
    return native
