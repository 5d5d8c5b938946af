"""Components of planes as the Triton kernels see them: an address and strides, whatever the pixel format.

    sample (row, column) of a component lies at    address + itemsize (row row_stride + column column_stride)

So one kernel serves planar, semi-planar and packed formats, any pitch, and a turned picture too: its strides are
negative. Addresses and numbers of all faces go to the device as one table, in one copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from faceage.kernels.transfer import as_tensor, to_device
from faceage.types import Frame, PlaneLayout

if TYPE_CHECKING:
    import torch

MAX_COMPONENTS = 3
"""Alpha, a fourth one, plays no part anywhere."""


class Component(NamedTuple):
    """One component of a frame: all Y samples, all V samples, ..."""

    address: int
    """Of sample (0, 0), in bytes."""
    row_stride: int
    column_stride: int
    """In samples."""
    height: int
    width: int
    itemsize: int
    spec: PlaneLayout
    """Of its plane."""

    def turned(self) -> Component:
        """Return the component as it is seen after a quarter turn counter-clockwise."""
        return self._replace(
            address=self.address + (self.width - 1) * self.column_stride * self.itemsize,
            row_stride=-self.column_stride,
            column_stride=self.row_stride,
            height=self.width,
            width=self.height,
            spec=PlaneLayout(self.spec.components, self.spec.sub_y, self.spec.sub_x),
        )


def components(frame: Frame) -> list[Component]:
    """Return the components of a frame as they are stored, without alpha: one or three."""
    found = []
    for plane, spec in zip(frame.planes, frame.layout.planes, strict=True):
        tensor = as_tensor(plane)
        row_stride, column_stride, *_ = tensor.stride()
        size = tensor.element_size()
        height, width = tensor.shape[:2]
        for offset in range(len(spec.components)):
            address = tensor.data_ptr() + offset * size
            found.append(Component(address, row_stride, column_stride, height, width, size, spec))
    return found[:MAX_COMPONENTS]


def components_as_shown(frame: Frame) -> list[Component]:
    """Return the components of a frame as a player shows them."""
    found = components(frame)
    for _ in range(frame.rotation // 90 % 4):
        found = [component.turned() for component in found]
    return found


def upload_table(
    integers: npt.ArrayLike, reals: npt.ArrayLike, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows [integers | reals] on a device, in one copy, once as int64 and once as float64.

    Args:
        integers: [..., A].
        reals: [..., B].
        device: where the kernel runs.
    """
    import torch

    parts = np.asarray(integers, np.int64), np.asarray(reals, np.float64).view(np.int64)
    table = to_device(np.concatenate(parts, -1), device)
    return table, table.view(torch.float64)


def code_type(frame: Frame) -> object:
    """Return the Triton type of a frame's samples."""
    import triton.language as tl

    return cast(object, tl.uint8 if frame.layout.bit_depth <= 8 else tl.uint16)
