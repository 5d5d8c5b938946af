"""Means of a frame's samples over the bins of rectangles, as small RGB pictures: what the face detector sees.

A rectangle [x0, x1) of the shown picture is cut into n bins along x, and likewise along y. Of a plane that has one
sample for s luma samples, bin i holds the samples from a to before b, and with c[.] the codes of all components there:

    a = floor((x0 + floor(i (x1 - x0) / n)) / s),     b = ceil((x0 + ceil((i + 1) (x1 - x0) / n)) / s)
    rgb = scale clamp(matrix @ mean(c[a:b]) + offset, -1, 1)

A sample that lies in two bins counts in both: adaptive average pooling, as in torch.

Convention: rectangles are in luma pixels of the picture as it is shown. Bytes moved: each sample once a call, if bins
do not overlap. The CPU sums a frame once and reads four sums a bin.
Tolerance: implementations differ by less than 1e-5. Of large frames that are arrays, a reduced picture is read instead,
halved until a bin has about one pixel: nearly the same means, for a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
import numpy.typing as npt

from faceage.kernels.color import color_of, yuv_to_rgb
from faceage.kernels.gather import warp_samples
from faceage.kernels.implementation import Implementation, choose_implementation
from faceage.kernels.placement import upright
from faceage.kernels.streams import await_samples
from faceage.kernels.transfer import to_device
from faceage.types import FloatArray, Frame, HostPlane, IntArray, Plane, Samples

if TYPE_CHECKING:
    import torch

    from faceage.kernels.area_means_triton import BinSums


STRIP_CELLS = 16384
"""Means computed at a time: what they are computed from stays in the cache."""


class AreaMeans:
    """Frames of one size, prepared for means over many rectangles.

    Args:
        frames: of one size, all arrays or all on one device; one at least.
        scale: what RGB in [-1, 1] is multiplied by.
        shrink: above 1, arrays are reduced by this integer first and read as a reduced picture.
        impl: "cpu" is NumPy and OpenCV, for arrays; "ref" the PyTorch reference; "triton" a kernel, for tensors on a
            GPU; "auto" what fits the frames.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        *,
        scale: float = 1.0,
        shrink: int = 1,
        impl: Literal["auto"] | Implementation = "auto",
    ) -> None:
        self.width, self.height = frames[0].width, frames[0].height
        await_samples(frames)
        chosen = choose_implementation(frames[0], impl)
        self.is_reduced = chosen not in ("triton", "ref") and shrink > 1
        """Whether reduced pictures are read: what is made of them is nearly what the frames show."""
        self._frames: Sequence[_TensorSums | _ArraySums | _ReducedFrame | BinSums]
        if chosen == "triton":
            from faceage.kernels.area_means_triton import BinSums

            self._frames = [BinSums(frame, scale) for frame in frames]
        elif chosen == "ref":
            self._frames = [_TensorSums(frame, scale) for frame in frames]
        elif self.is_reduced:
            self._frames = [_ReducedFrame(frame, scale, shrink) for frame in frames]
        else:
            self._frames = [_ArraySums(frame, scale) for frame in frames]

    def pictures(self, width: int, height: int) -> Samples:
        """Return the whole frames at this size: float32 [N, 3, H, W], odd sides one pixel longer."""
        return _stack([frame.picture(width, height) for frame in self._frames])

    def rectangles(self, frame_index: IntArray, low: IntArray, high: IntArray, size_px: int) -> Samples:
        """Return rectangles in squares.

        Args:
            frame_index: int64 [K], the position of each rectangle's frame. K may be 0.
            low: int64 [K, 2], the first pixel of each.
            high: int64 [K, 2], the pixel after its last.
            size_px: S.

        Returns:
            float32 [K, 3, S, S].
        """
        order = np.argsort(frame_index, kind="stable")
        parts = [
            self._frames[index].rectangles(low[rows], high[rows], size_px)
            for index in sorted(set(frame_index.tolist()))
            for rows in [np.flatnonzero(frame_index == index)]
        ]
        if not parts:
            return self._frames[0].rectangles(low, high, size_px)
        return _concatenate(parts, np.argsort(order, kind="stable"))


def _stack(parts: list[Samples]) -> Samples:
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts) if len(parts) > 1 else parts[0][None]  # which is no copy
    import torch

    return torch.stack(parts)


def _concatenate(parts: list[Samples], order: IntArray) -> Samples:
    """Return the rows of all parts in another order."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)[order]
    import torch

    return torch.cat(parts)[to_device(order, parts[0].device)]


def _bins(low: IntArray, high: IntArray, axis: int, count: int, sub: int) -> tuple[IntArray, IntArray]:
    """Return the first sample of each bin and the one after its last, a and b of the formula: int64 [K, count]."""
    start = low[:, axis, None]
    steps = np.arange(count + 1) * (high[:, axis, None] - start)
    return (start + steps[:, :-1] // count) // sub, -((-start + -steps[:, 1:] // count) // sub)


def _picture_bins(width: int, height: int, size: IntArray, sub: tuple[int, int]) -> tuple[IntArray, ...]:
    """Return the bins of a whole frame, x0, x1, y0, y1: int64 [W] and [H], the last one twice if the side is odd."""
    whole = np.zeros((1, 2), np.int64), size[None]
    ends = (*_bins(*whole, 0, width, sub[0]), *_bins(*whole, 1, height, sub[1]))
    return tuple(np.pad(end[0], (0, len(end[0]) % 2), "edge") for end in ends)


def _planes_as_shown(frame: Frame) -> list[tuple[list[Plane], int, int]]:
    """Return the planes as they are shown, those of one resolution together, with luma samples per sample."""
    specs = zip(frame.planes, frame.layout.planes, strict=True)
    turned = frame.rotation % 180
    return [
        ([upright(plane, frame.rotation) for plane, _ in same], *(sub[::-1] if turned else sub))
        for sub, same in groupby(specs, lambda item: (item[1].sub_x, item[1].sub_y))
    ]


class _TensorSums:
    """The PyTorch reference: sums from the frame's top left corner, in float64."""

    def __init__(self, frame: Frame, scale: float) -> None:
        import torch

        self._frame, self._scale = frame, scale
        self._tables = []
        for planes, sub_x, sub_y in _planes_as_shown(frame):
            tensors = [torch.from_numpy(p.copy()) if isinstance(p, np.ndarray) else p for p in planes]
            samples = torch.cat([t.double().reshape(*t.shape[:2], -1) for t in tensors], -1)[..., :3]
            sums = torch.nn.functional.pad(samples.cumsum(0).cumsum(1), (0, 0, 1, 0, 1, 0))
            self._tables.append((sums, sub_x, sub_y))

    def picture(self, width: int, height: int) -> torch.Tensor:
        """Return the frame at this size: float32 [3, H, W]."""
        size = np.array([self._frame.width, self._frame.height])
        ends = [_picture_bins(width, height, size, (sub_x, sub_y)) for _, sub_x, sub_y in self._tables]
        return self._means([tuple(end[None] for end in plane) for plane in ends])[0]

    def rectangles(self, low: IntArray, high: IntArray, size_px: int) -> torch.Tensor:
        """Return rectangles: float32 [K, 3, S, S]."""
        return self._means(
            [
                (*_bins(low, high, 0, size_px, sub_x), *_bins(low, high, 1, size_px, sub_y))
                for _, sub_x, sub_y in self._tables
            ]
        )

    def _means(self, ends: list[tuple[IntArray, ...]]) -> torch.Tensor:
        """Return the means over bins x0, x1 [K, W] and y0, y1 [K, H] of each plane's samples: float32 [K, 3, H, W]."""
        import torch

        codes = []
        for (table, _, _), plane_ends in zip(self._tables, ends, strict=True):
            x0, x1, y0, y1 = (to_device(end, table.device) for end in plane_ends)
            left, right, top, bottom = x0[:, None, :], x1[:, None, :], y0[:, :, None], y1[:, :, None]
            sums = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
            codes.append(sums / ((bottom - top) * (right - left))[..., None])
        layout = self._frame.layout
        if codes[0].shape[-1] == len(codes) == 1:  # gray has no chroma
            codes.append(torch.full_like(codes[0], 2 ** (layout.bit_depth - 1 + layout.shift)).expand(-1, -1, -1, 2))
        matrix, offset = (to_device(a, codes[0].device) for a in yuv_to_rgb(color_of(self._frame), layout.bit_depth))
        rgb = torch.cat(codes, -1) @ (matrix.T / 2**layout.shift) + offset
        return (self._scale * rgb.clamp(-1, 1)).float().permute(0, 3, 1, 2).contiguous()


def _to_pixels(frame: Frame, scale: float) -> npt.NDArray[np.float64]:
    """Return the map from a frame's stored codes to scaled RGB: [3, 4], the offset last."""
    matrix, offset = yuv_to_rgb(color_of(frame), frame.layout.bit_depth)
    return scale * np.column_stack([matrix / 2**frame.layout.shift, offset])


class _ArraySums:
    """The CPU implementation: sums by OpenCV, which give the mean of any rectangle by four reads."""

    def __init__(self, frame: Frame, scale: float) -> None:
        self._size = np.array([frame.width, frame.height])
        self._layout, self._scale = frame.layout, scale
        self._to_pixels = _to_pixels(frame, scale)
        self._tables = []
        for planes, sub_x, sub_y in _planes_as_shown(frame):
            samples = np.dstack(planes)[..., :3]  # [H, W, C]
            # The sums of 8 bits may pass 2^31 and wrap round; the differences come out right all the same.
            depth = cv2.CV_32S if samples.dtype == np.uint8 else cv2.CV_64F
            self._tables.append((np.atleast_3d(cv2.integral(samples, sdepth=depth)), sub_x, sub_y))

    def picture(self, width: int, height: int) -> FloatArray:
        """Return the frame at this size: float32 [3, H, W]."""
        bins = [_picture_bins(width, height, self._size, (sub_x, sub_y)) for _, sub_x, sub_y in self._tables]
        pixels = np.empty((3, len(bins[0][2]), len(bins[0][0])), np.float32)
        rows = max(1, STRIP_CELLS // pixels.shape[2])
        for top in range(0, pixels.shape[1], rows):
            strip = slice(top, top + rows)
            sums = []
            for (table, _, _), (x0, x1, y0, y1) in zip(self._tables, bins, strict=True):
                columns = _taken(table, y1[strip], 0)
                columns -= _taken(table, y0[strip], 0)
                cells = _taken(columns, x1, 1)
                cells -= _taken(columns, x0, 1)
                sums.append((cells, (y1 - y0)[strip, None] * (x1 - x0)))
            self._to_rgb(sums, pixels[:, strip])
        return pixels

    def rectangles(self, low: IntArray, high: IntArray, size_px: int) -> FloatArray:
        """Return rectangles: float32 [K, 3, S, S]."""
        if not len(low):
            return np.zeros((0, 3, size_px, size_px), np.float32)
        pixels = np.empty((len(low), 3, size_px, size_px), np.float32)
        count = max(1, STRIP_CELLS // size_px**2)
        for first in range(0, len(low), count):
            some = slice(first, first + count)
            self._some_rectangles(low[some], high[some], pixels[some])
        return pixels

    def _some_rectangles(self, low: IntArray, high: IntArray, pixels: FloatArray) -> None:
        """Read rectangles into `pixels` [K, 3, S, S]."""
        size_px = pixels.shape[-1]
        sums = []
        for table, sub_x, sub_y in self._tables:
            x0, x1 = (x[:, None, :] for x in _bins(low, high, 0, size_px, sub_x))
            y0, y1 = (y[:, :, None] for y in _bins(low, high, 1, size_px, sub_y))
            flat, stride = table.reshape(-1, table.shape[2]), table.shape[1]
            cells = _taken(flat, y1 * stride + x1, 0)
            cells -= _taken(flat, y1 * stride + x0, 0)
            cells -= _taken(flat, y0 * stride + x1, 0)
            cells += _taken(flat, y0 * stride + x0, 0)
            sums.append((cells, (y1 - y0) * (x1 - x0)))
        self._to_rgb(sums, pixels.swapaxes(0, 1))

    def _to_rgb(self, sums: list[tuple[npt.NDArray, IntArray]], pixels: FloatArray) -> None:
        """Write sums [..., C] over areas [...] of all planes at the same places into `pixels` [3, ...], as RGB."""
        codes = []
        for cells, areas in sums:
            per_sample = 1 / areas.astype(np.float32)
            codes += [cells[..., component].astype(np.float32) * per_sample for component in range(cells.shape[-1])]
        for out, (*weights, offset) in zip(pixels, self._to_pixels, strict=True):
            # Of gray, the chroma is the code in the middle.
            missing = 2 ** (self._layout.bit_depth - 1 + self._layout.shift) * sum(weights[len(codes) :])
            mixed = codes[0] * np.float32(weights[0]) + np.float32(offset + missing)
            for code, weight in zip(codes[1:], weights[1:], strict=False):
                if weight:
                    mixed += code * np.float32(weight)
            np.clip(mixed, -self._scale, self._scale, out=out)


def _taken(values: npt.NDArray, places: IntArray, axis: int) -> npt.NDArray:
    """Return values at places that exist: NumPy needs a third of the time if it need not make sure of that."""
    return values.take(places, axis, mode="clip")


class _ReducedFrame:
    """The CPU implementation for large frames: a reduced picture in the frame's own codes, halved again and again."""

    def __init__(self, frame: Frame, scale: float, shrink: int) -> None:
        self._size, self._scale = np.array([frame.width, frame.height]), scale
        self._to_pixels = _to_pixels(frame, scale)
        size = (-(-frame.width // shrink), -(-frame.height // shrink))
        planes = [plane for same, _, _ in _planes_as_shown(frame) for plane in same]
        codes = cv2.merge([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
        if codes.ndim == 2:  # of gray, the chroma is the code in the middle
            middle = 2 ** (frame.layout.bit_depth - 1 + frame.layout.shift)
            codes = cv2.merge([codes, *[np.full_like(codes, middle)] * 2])
        self._halved = [codes[..., :3]]

    def _reduced(self, cell_px: float) -> HostPlane:
        """Return the picture [H', W', 3] in which a cell of this many pixels of the frame has one to two."""
        times = int(math.log2(max(cell_px * self._halved[0].shape[1] / self._size[0], 1)))
        while len(self._halved) <= times and min(self._halved[-1].shape[:2]) > 1:
            height, width = self._halved[-1].shape[:2]
            size = ((width + 1) // 2, (height + 1) // 2)
            self._halved.append(cv2.resize(self._halved[-1], size, interpolation=cv2.INTER_AREA))
        return self._halved[min(times, len(self._halved) - 1)]

    def picture(self, width: int, height: int) -> FloatArray:
        """Return the frame at this size: float32 [3, H, W]."""
        small = cv2.resize(self._reduced(self._size[0] / width), (width, height), interpolation=cv2.INTER_LINEAR)
        small = cv2.copyMakeBorder(small, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        return self._to_rgb(small[None])[0]

    def rectangles(self, low: IntArray, high: IntArray, size_px: int) -> FloatArray:
        """Return rectangles: float32 [K, 3, S, S]."""
        codes = np.empty((len(low), size_px, size_px, 3), self._halved[0].dtype)
        cells = (high - low) / size_px
        for out, start, cell in zip(codes, low, cells, strict=True):
            reduced = self._reduced(float(cell.min()))
            ratio = np.array(reduced.shape[1::-1]) / self._size
            scale, offset = cell * ratio, (start + cell / 2) * ratio - 0.5  # centres of pixels are at integers
            matrix = np.array([[scale[0], 0, offset[0]], [0, scale[1], offset[1]]])
            out[...] = warp_samples(reduced, matrix, (size_px, size_px), cv2.BORDER_REPLICATE)
        return self._to_rgb(codes)

    def _to_rgb(self, codes: HostPlane) -> FloatArray:
        """Return pictures of codes [K, H, W, 3] as RGB: float32 [K, 3, H, W]."""
        count, height, width, _ = codes.shape
        if not count:
            return np.zeros((0, 3, height, width), np.float32)
        pixels = cv2.transform(codes.reshape(count * height, width, 3).astype(np.float32), self._to_pixels)
        np.clip(pixels, -self._scale, self._scale, out=pixels)
        return np.ascontiguousarray(pixels.reshape(codes.shape).transpose(0, 3, 1, 2))
