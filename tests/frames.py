"""Frames of noise in any pixel format, as arrays or as tensors."""

from dataclasses import replace

import numpy as np
import torch

from faceage.types import PIXEL_LAYOUTS, RGB, ColorSpec, Frame


def noise_frame(pixel_format, width=97, height=83, *, color=None, seed=0, rotation=0, padding=0, span=(0.2, 0.8)):
    """Noise in every plane, luma within `span` and chroma near neutral: few RGB values are out of gamut.

    Rows and columns may be padded: the planes are then views whose rows are further apart.
    """
    rng = np.random.default_rng(seed)
    layout = PIXEL_LAYOUTS[pixel_format]
    planes = []
    for spec in layout.planes:
        shape = (-(-height // spec.sub_y), -(-width // spec.sub_x))
        shape += (len(spec.components),) if len(spec.components) > 1 else ()
        low, high = span if spec.components[0] in "YR" else (0.42, 0.58)
        codes = rng.integers(int(low * 2**layout.bit_depth), int(high * 2**layout.bit_depth), shape)
        buffer = np.zeros((shape[0] + padding, shape[1] + padding, *shape[2:]), layout.dtype)
        buffer[: shape[0], : shape[1]] = codes << layout.shift
        planes.append(buffer[: shape[0], : shape[1]])
    default = RGB if layout.planes[0].components.startswith("RGB") else ColorSpec()
    return Frame(planes=tuple(planes), pixel_format=pixel_format, color=color or default, rotation=rotation)


def as_tensors(frame):
    """The same frame with tensors that share no memory with it, in rows as far apart as its own."""
    planes = []
    for plane in frame.planes:
        pitch = plane.strides[0] // plane.itemsize
        flat = torch.zeros(plane.shape[0] * pitch, dtype=getattr(torch, plane.dtype.name))
        strides = (pitch, *(stride // plane.itemsize for stride in plane.strides[1:]))
        tensor = flat.as_strided(plane.shape, strides)
        tensor.copy_(torch.from_numpy(plane.copy()))  # torch warns of arrays that are read-only, as decoded ones are
        planes.append(tensor)
    return replace(frame, planes=tuple(planes))


def copy_of(frame):
    return replace(frame, planes=tuple(plane.copy() for plane in frame.planes))
