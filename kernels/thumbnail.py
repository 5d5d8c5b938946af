"""What a frame looks like from afar: a thumbnail of its luma, and the luma's histogram.

With Y the codes of every n-th luma sample each way, cut to 8 bits, and W x H the thumbnail:

    thumbnail = round(A Y B^T),     A[i, y] = the part of sample y in row i of H, B likewise; rows sum to 1
    histogram[k] = share of the samples with k <= Y / 8 < k + 1, k = 0 .. 31

Of packed RGB the green samples are read: they are nearest to luma. Bytes moved: every n-th sample of every n-th row.
Tolerance: the thumbnail may differ by 1 code, where it is rounded. Pictures of less than 384 x 216 are enlarged, and by
OpenCV in another way; thumbnails are only compared with those of the same video.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt

from faceage.kernels.implementation import Implementation, choose_implementation
from faceage.kernels.placement import upright
from faceage.kernels.streams import await_samples
from faceage.kernels.transfer import as_tensor, begin_to_host, to_device
from faceage.types import FloatArray, Frame, HostPlane, Plane

if TYPE_CHECKING:
    import torch

SUBSAMPLE = 8
"""n: 0.1 ms a 1080p frame."""
THUMBNAIL_PX = (48, 27)
"""W and H: small motions stay within one pixel."""
HISTOGRAM_BINS = 32


class Thumbnail(NamedTuple):
    """What a frame looks like from afar."""

    luma: FloatArray
    """float32 [27, 48], codes of 8 bits."""
    histogram: FloatArray
    """float32 [32], shares of the samples."""


def luma_plane(frame: Frame) -> Plane:
    """Return the luma samples [H, W] as the picture is shown; of packed RGB, the green ones."""
    plane = frame.planes[0]
    return upright(plane if plane.ndim == 2 else plane[..., 1], frame.rotation)


def _area_matrix(count: int, samples: int) -> npt.NDArray[np.float32]:
    """Return A of the formula: float32 [count, samples]."""
    edges = np.arange(count + 1)[:, None] * samples / count
    covered = np.clip(edges - np.arange(samples), 0, 1)  # of each sample, what lies before each edge
    return (np.diff(covered, axis=0) * count / samples).astype(np.float32)


def begin_thumbnail(frame: Frame, *, impl: Literal["auto"] | Implementation = "auto") -> Callable[[], Thumbnail]:
    """Find out what a frame looks like from afar; return what gives that, and waits only if it is not there yet.

    Args:
        frame: arrays or tensors.
        impl: "cpu" is OpenCV, for arrays; "ref" the PyTorch reference; "triton" a kernel, for tensors on a GPU; "auto"
            what fits the frame.
    """
    await_samples([frame])
    chosen = choose_implementation(frame, impl)
    if chosen == "cpu":
        seen = _thumbnail_cpu(frame)
        return lambda: seen
    luma = as_tensor(frame.planes[0])[::SUBSAMPLE, ::SUBSAMPLE]
    luma = luma[..., 1] if luma.ndim == 3 else luma
    shift = frame.layout.shift + frame.layout.bit_depth - 8
    if chosen == "triton":
        from faceage.kernels.thumbnail_triton import thumbnail_triton

        values = thumbnail_triton(luma, shift, THUMBNAIL_PX, HISTOGRAM_BINS)
    else:
        values = _thumbnail_ref(luma, shift)
    arrived = begin_to_host(values)  # one way to the host for both

    def finish() -> Thumbnail:
        found = arrived()
        pixels, counts = found[:-HISTOGRAM_BINS], found[-HISTOGRAM_BINS:]
        return Thumbnail(pixels.reshape(THUMBNAIL_PX[::-1]), counts / np.float32(luma.shape[0] * luma.shape[1]))

    return finish


def _thumbnail_ref(luma: torch.Tensor, shift: int) -> torch.Tensor:
    """Return the thumbnail's pixels and the counts of the bins in one piece, from samples [H, W]."""
    import torch

    codes = (luma.int() >> shift).float()
    sides = zip(THUMBNAIL_PX[::-1], codes.shape, strict=True)
    rows, columns = (to_device(_area_matrix(*side), luma.device) for side in sides)
    small = (rows @ codes @ columns.T).round()
    return torch.cat([small.flatten(), torch.histc(codes, HISTOGRAM_BINS, 0, 256)])


def _thumbnail_cpu(frame: Frame) -> Thumbnail:
    luma = frame.planes[0][::SUBSAMPLE, ::SUBSAMPLE]
    luma = cast(HostPlane, np.ascontiguousarray(luma[..., 1] if luma.ndim == 3 else luma))
    if frame.layout.bit_depth > 8:
        luma = (luma >> (frame.layout.shift + frame.layout.bit_depth - 8)).astype(np.uint8)
    histogram = cv2.calcHist([luma], [0], None, [HISTOGRAM_BINS], [0, 256]).ravel()
    small = cv2.resize(luma, THUMBNAIL_PX, interpolation=cv2.INTER_AREA)
    return Thumbnail(small.astype(np.float32), histogram / luma.size)
