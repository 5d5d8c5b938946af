"""Colour of hair and brows against real faces of the age.

On a head that is aligned by its five landmarks, the hair is sampled in a fixed strip above the forehead and the brows
above the eyes. Luma is the median of the strip (the darkest third of the brows' boxes), chroma the mean distance of R,
G and B from luma; both of samples in [0, 1]. A set's mean is given in standard deviations of real people of the age: 0
is right, doing nothing to the young is far off. Medians do not count a few bright strands, and a strip that is bleached
to skin colour or white is as far off on the other side.
"""

from __future__ import annotations

import numpy as np

from faceage.geometry import TEMPLATE_5
from faceage.types import FloatArray
from train.data import warp_faces
from train.evaluate.bands import LUMA

HEAD_PX = 256
_FACE_SIDE, _FACE_TOP = 0.5, 0.42
"""Side of the aligned face crop in the head crop, and where it begins, in sides of the head crop."""
HAIR = (0.30, -0.36, 0.70, -0.20)
BROWS = ((0.17, 0.13, 0.42, 0.24), (0.58, 0.13, 0.83, 0.24))
"""Left, top, right, bottom, in sides of the aligned face crop."""
DARKEST = 1 / 3


def head_crops(pictures: list[np.ndarray], landmarks: FloatArray) -> np.ndarray:
    """Return heads with their hair, aligned by the landmarks [N, 5, 2]: uint8 [N, 256, 256, 3]."""
    template = (TEMPLATE_5 * _FACE_SIDE + ((1 - _FACE_SIDE) / 2, _FACE_TOP)) * HEAD_PX - 0.5
    return warp_faces(pictures, landmarks, template, HEAD_PX, HEAD_PX)


def colours(heads: np.ndarray) -> dict[str, FloatArray]:
    """Return luma and chroma [N] of the hair and the brows of head crops, in [0, 1]."""
    hair = _box(heads, HAIR)
    brows = np.concatenate([_box(heads, box) for box in BROWS], 1)
    dark = np.argsort(brows @ LUMA, axis=1)[:, : int(brows.shape[1] * DARKEST)]
    brows = np.take_along_axis(brows, dark[..., None], 1)
    return {
        "hair_luma": np.median(hair @ LUMA, 1),
        "hair_chroma": np.median(_chroma(hair), 1),
        "brow_luma": (brows @ LUMA).mean(1),
        "brow_chroma": _chroma(brows).mean(1),
    }


def _box(heads: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Return the pixels of a box in [0, 1]: float32 [N, P, 3]."""
    corner = np.array([(1 - _FACE_SIDE) / 2, _FACE_TOP] * 2)
    left, top, right, bottom = np.rint((np.array(box) * _FACE_SIDE + corner) * HEAD_PX).astype(int)
    return heads[:, top:bottom, left:right].reshape(len(heads), -1, 3).astype(np.float32) / 255


def _chroma(pixels: FloatArray) -> FloatArray:
    return np.abs(pixels - (pixels @ LUMA)[..., None]).mean(-1)


def deviations(made: dict[str, FloatArray], real: dict[str, FloatArray]) -> dict[str, float]:
    """Return each figure's mean less that of real people of the age, in standard deviations of the real."""
    return {name: float((made[name].mean() - values.mean()) / (values.std() + 1e-6)) for name, values in real.items()}
