"""The canonical face: a frontal mean mesh in a square picture, to which every face is unwrapped.

Reference: Kemelmacher-Shlizerman, Suwajanakorn, Seitz: Illumination-Aware Age Progression, CVPR 2014 (align densely,
then compare pixel by pixel).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import Delaunay

from faceage.geometry import WHOLE_FACE_TEMPLATE_5, apply_affine, similarity_to_template, template_5
from train.space.faces import Heads

CANONICAL_PX = 256
"""Side of the canonical picture."""
ENLARGE, FACE_CENTRE = 1.2, 0.521
"""The canonical face is the crop's, enlarged by this about its middle (at this fraction of the crop's height)."""
OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150,
    136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
"""The mesh points of the face's outline, in order around it."""
EYES = ((33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246),
        (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466))  # fmt: skip
"""The rims of the eyes."""
LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
"""The outer rim of the lips."""
MOUTH = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191)
"""The inner rim of the lips."""
BROWS = ((46, 53, 52, 65, 55, 107, 66, 105, 63, 70), (276, 283, 282, 295, 285, 336, 296, 334, 293, 300))
"""The rims of the brows."""
MAX_TURN = 0.33
"""Faces turned more than this (see `turns`) are not used for the canonical face."""


def turns(mesh: np.ndarray) -> np.ndarray:
    """Return how far faces [N, 468, 3] are turned to a side: -1 to 1, 0 for frontal ones.

    The difference of the nose's distances to both ends of the face, over their sum.
    """
    nose, left, right = mesh[:, 4, :2], mesh[:, 234, :2], mesh[:, 454, :2]
    a, b = np.linalg.norm(nose - left, axis=-1), np.linalg.norm(right - nose, axis=-1)
    return (a - b) / (a + b)


def in_crop(mesh: np.ndarray, landmarks: np.ndarray, size_px: int) -> np.ndarray:
    """Return meshes [N, 468, 2] in pixels of the face's aligned crop."""
    matrices = similarity_to_template(landmarks, template_5(size_px, WHOLE_FACE_TEMPLATE_5))
    return apply_affine(matrices, mesh[..., :2])


@dataclass(frozen=True)
class Canonical:
    """The canonical mesh and what follows from it."""

    points: np.ndarray
    """float32 [468, 2], pixels of the canonical picture."""
    triangles: np.ndarray
    """int64 [T, 3], indices of points."""
    mirror: np.ndarray
    """int64 [468], each point's counterpart on the other side."""

    @classmethod
    def of(cls, heads: Heads) -> Canonical:
        """Return the mean mesh of frontal faces, made symmetric."""
        heads = heads.rows(np.abs(turns(heads.mesh)) < MAX_TURN / 3)
        crop = in_crop(heads.mesh, heads.landmarks, CANONICAL_PX)
        span = np.linalg.norm(heads.mesh[:, 454, :2] - heads.mesh[:, 234, :2], axis=-1)
        in_crop_span = np.linalg.norm(crop[:, 454] - crop[:, 234], axis=-1)
        depth = heads.mesh[..., 2] * (in_crop_span / span)[:, None]
        points = np.concatenate([crop, depth[..., None]], -1).mean(0)  # depth tells the lids' edges apart
        axis = points[list(OVAL)].mean(0)[0]
        flipped = points * (-1, 1, 1) + (2 * axis, 0, 0)
        mirror = np.linalg.norm(flipped[:, None] - points[None], axis=-1).argmin(1)
        assert (mirror[mirror] == np.arange(len(points))).all(), "the mean mesh is not symmetric enough"
        points = ((points + flipped[mirror]) / 2)[:, :2]
        points = (points - (axis, CANONICAL_PX * FACE_CENTRE)) * ENLARGE + (CANONICAL_PX - 1) / 2
        return cls(points.astype(np.float32), Delaunay(points).simplices.astype(np.int64), mirror)

    def weights(self, size_px: int = CANONICAL_PX) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (pixel indices [P], point indices [P, 3], weights [P, 3]) of the pixels inside the mesh."""
        scale = size_px / CANONICAL_PX
        mesh = Delaunay((self.points + 0.5) * scale - 0.5)
        y, x = np.mgrid[:size_px, :size_px]
        at = np.stack([x.ravel(), y.ravel()], -1).astype(np.float64)
        found = mesh.find_simplex(at)
        inside = np.flatnonzero(found >= 0)
        transform = mesh.transform[found[inside]]
        two = np.einsum("pij,pj->pi", transform[:, :2], at[inside] - transform[:, 2])
        weights = np.column_stack([two, 1 - two.sum(1)])
        return inside, mesh.simplices[found[inside]], weights.astype(np.float32)

    def area(self, rim: tuple[int, ...], size_px: int = CANONICAL_PX) -> np.ndarray:
        """Return 1 inside a closed rim of mesh points, float32 [size_px, size_px]."""
        mask = np.zeros((size_px, size_px), np.float32)
        points = (self.points[list(rim)] + 0.5) * (size_px / CANONICAL_PX) - 0.5
        cv2.fillPoly(mask, [np.rint(points * 16).astype(np.int32)], 1.0, lineType=cv2.LINE_AA, shift=4)
        return mask


class Unwrap:
    """Draws pictures of faces on the canonical face."""

    def __init__(self, canonical: Canonical, size_px: int = CANONICAL_PX) -> None:
        self.size_px = size_px
        self.inside, self._corners, self._weights = canonical.weights(size_px)

    def map(self, mesh: np.ndarray) -> np.ndarray:
        """Return where each canonical pixel lies in a picture: float32 [S, S, 2]; -1e4 outside the mesh."""
        where = np.full((self.size_px * self.size_px, 2), -1e4, np.float32)
        where[self.inside] = np.einsum("pk,pkc->pc", self._weights, mesh[self._corners, :2])
        return where.reshape(self.size_px, self.size_px, 2)

    def __call__(self, picture: np.ndarray, mesh: np.ndarray) -> np.ndarray:
        """Return the canonical picture [S, S, C] of a picture [H, W, C]; 0 outside the mesh."""
        where = self.map(mesh)
        # How many picture pixels a canonical one covers: reduce first where it is more than 1.5.
        side = np.abs(np.diff(where[self.size_px // 2, self.size_px // 4 : 3 * self.size_px // 4, 0])).mean()
        if side > 1.5:
            picture = cv2.resize(picture, None, fx=1 / side, fy=1 / side, interpolation=cv2.INTER_AREA)
            where = (where + 0.5) / side - 0.5
        return cv2.remap(picture, where, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
