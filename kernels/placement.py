"""Where the samples of a frame's planes lie in the picture that a player shows.

Convention: pixel centres at integers, x right, y down. A chroma sample x lies at luma s x + o with o = 0 where it is
co-sited and (s - 1) / 2 where it is centred. Matrices are float64 [2, 3].
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from faceage.types import ChromaSiting, FloatArray, Frame, Plane, PlaneLayout

if TYPE_CHECKING:
    from torch import Tensor

Matrix23 = npt.NDArray[np.float64]


def compose_affine(after: Matrix23, before: Matrix23) -> Matrix23:
    """Return the map that applies `before`, then `after`."""
    composed = after[:, :2] @ before
    composed[:, 2] += after[:, 2]
    return composed


def invert_affine(matrix: Matrix23) -> Matrix23:
    """Return the map backwards; `matrix` must be invertible."""
    return cv2.invertAffineTransform(matrix)  # of so few numbers ten times faster than NumPy's inverse


def luma_to_plane(layout: PlaneLayout, siting: ChromaSiting) -> Matrix23:
    """Return the map from luma samples to samples of a plane."""
    offset_x = 0.0 if siting in ("left", "topleft") else (layout.sub_x - 1) / 2
    offset_y = 0.0 if siting == "topleft" else (layout.sub_y - 1) / 2
    sx, sy = 1 / layout.sub_x, 1 / layout.sub_y
    return np.array([[sx, 0, -offset_x * sx], [0, sy, -offset_y * sy]])


def shown_to_stored(frame: Frame) -> Matrix23:
    """Return the map from pixels of the picture as it is shown to luma samples as they are stored."""
    height, width = frame.planes[0].shape[:2]
    return _shown_to_stored(width, height, frame.rotation)


def _shown_to_stored(width: int, height: int, rotation: int) -> Matrix23:
    """Do so for a frame of the given size, as it is stored."""
    right, bottom = width - 1.0, height - 1.0
    return np.array(
        {
            0: [[1.0, 0, 0], [0, 1, 0]],
            90: [[0.0, -1, right], [1, 0, 0]],
            180: [[-1.0, 0, right], [0, -1, bottom]],
            270: [[0.0, 1, 0], [-1, 0, bottom]],
        }[rotation % 360]
    )


def shown_to_plane(frame: Frame, layout: PlaneLayout) -> Matrix23:
    """Return the map from pixels of the picture as it is shown to samples of a plane; do not change it."""
    height, width = frame.planes[0].shape[:2]
    return _shown_to_plane(width, height, frame.rotation, layout, frame.color.chroma_siting)


@lru_cache(maxsize=64)
def _shown_to_plane(width: int, height: int, rotation: int, layout: PlaneLayout, siting: ChromaSiting) -> Matrix23:
    return compose_affine(luma_to_plane(layout, siting), _shown_to_stored(width, height, rotation))


def crop_to_plane(frame: Frame, layout: PlaneLayout, frame_to_crop: FloatArray) -> Matrix23:
    """Return the map from pixels of a crop to samples of a plane.

    Args:
        frame: its rotation and its chroma siting play a part.
        layout: of one of its planes.
        frame_to_crop: float32 [2, 3], pixels of the frame as it is shown to pixels of the crop.
    """
    return compose_affine(shown_to_plane(frame, layout), invert_affine(frame_to_crop.astype(np.float64)))


def upright(plane: Plane, rotation: int) -> Plane:
    """Return a plane as it is shown: of an array a view, of a tensor a copy if it is turned."""
    turns = rotation // 90 % 4
    if not turns:
        return plane
    if isinstance(plane, np.ndarray):
        return np.rot90(plane, turns)
    return _turned(plane, turns)


def _turned(plane: Tensor, turns: int) -> Tensor:
    import torch

    return torch.rot90(plane, turns, (0, 1))


def cut_out(frame: Frame, low: FloatArray, high: FloatArray) -> tuple[Frame | None, FloatArray]:
    """Return the part of a frame between two corners, as views of its planes, and where it begins.

    Args:
        frame: where the part is taken from.
        low: float32 [2], the pixel at the part's top left, as shown; it may begin earlier, at a whole chroma sample.
        high: float32 [2], the pixel after its bottom right.

    Returns:
        The part, or None if it lies outside; and its top left pixel in the frame, float32 [2].
    """
    size = np.array([frame.width, frame.height])
    first, last = np.maximum(low.astype(int), 0), np.minimum(high.astype(int), size) - 1
    if (first > last).any():
        return None, first.astype(np.float32)
    to_stored = shown_to_stored(frame)
    corners = np.sort((np.array([first, last]) @ to_stored[:, :2].T + to_stored[:, 2]).astype(int), 0)
    (x0, y0), (x1, y1) = corners[0], corners[1] + 1
    x0 -= x0 % max(spec.sub_x for spec in frame.layout.planes)
    y0 -= y0 % max(spec.sub_y for spec in frame.layout.planes)
    planes = tuple(
        plane[y0 // spec.sub_y : -(-y1 // spec.sub_y), x0 // spec.sub_x : -(-x1 // spec.sub_x)]
        for plane, spec in zip(frame.planes, frame.layout.planes, strict=True)
    )
    ends = np.array([[x0, y0], [x1 - 1, y1 - 1]]) - to_stored[:, 2]
    corner = (ends @ to_stored[:, :2]).min(0)  # a quarter turn's inverse is its transpose
    return replace(frame, planes=planes, native=None), corner.astype(np.float32)
