"""What five landmarks say of a face's coordinates: the linear part of the coordinate network, fitted in closed form.

    coordinates(x) - identity(x) = B_0(x) + sum_k l_k B_k(x)

with l the landmarks' offsets from the template. Each pixel of the map has a ridge regression of its own over the faces
that cover it; pixels that few faces cover get one in which B is linear in x.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import LinearNDInterpolator

from train.space.canonical import CANONICAL_PX, OVAL, Canonical

RING = 1.25
"""The outline enlarged: coordinates are known a little beyond the face."""
RIDGE, FEWEST = 0.02, 150
"""Ridge in squared fractions of the crop, and the fewest faces for a pixel's own regression."""


def true_map(mesh: np.ndarray, canonical: Canonical, size_px: int) -> np.ndarray:
    """Return the coordinates of a face [2, S/2, S/2], fractions of the canonical picture, NaN where they are unknown.

    Args:
        mesh: [468, 2], pixels of the crop.
        canonical: the canonical face.
        size_px: S, the side of the crop.
    """

    def ringed(points: np.ndarray) -> np.ndarray:
        outline = points[list(OVAL)]
        middle = outline.mean(0)
        return np.concatenate([points, middle + RING * (outline - middle)])

    where = LinearNDInterpolator(ringed(mesh), ringed(canonical.points))
    axis = 2 * np.arange(size_px // 2) + 0.5
    x, y = np.meshgrid(axis, axis)
    return ((where(x, y) + 0.5) / CANONICAL_PX).transpose(2, 0, 1)


def fit(maps: np.ndarray, offsets: np.ndarray, identity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return B_0 plus the identity [2, H, H], and B_k [10, 2, H, H].

    Args:
        maps: [N, 2, H, H] from `true_map`.
        offsets: [N, 10], landmarks less the template, fractions of the crop's side.
        identity: [2, H, H], the map of a face that is the canonical one.
    """
    side = identity.shape[-1]
    X = np.column_stack([np.ones(len(offsets)), offsets])
    penalty = np.diag([1e-6] + [RIDGE] * 10)
    axis = np.linspace(-1, 1, side)
    x, y = np.meshgrid(axis, axis)
    known = ~np.isnan(maps[:, 0])  # [N, H, H]
    residual = np.where(known[:, None], maps - identity, 0)

    # One regression for the whole map, linear in x and y: X (x) (1, x, y)
    shape = np.stack([np.ones_like(x), x, y])  # [3, H, H]
    gram = np.einsum("nij,aij,bij->nab", known, shape, shape)
    whole = np.einsum("ni,nj,nab->iajb", X, X, gram).reshape(33, 33) + np.kron(penalty, np.eye(3)) * side
    right = np.einsum("nk,aij,ncij->kac", X, shape, residual, optimize=True).reshape(33, 2)
    smooth = np.einsum("kac,aij->kcij", np.linalg.solve(whole, right).reshape(11, 3, 2), shape)

    fitted = smooth.copy()
    for i, j in zip(*np.nonzero(known.sum(0) >= FEWEST), strict=True):
        rows = known[:, i, j]
        A = X[rows]
        rest = residual[rows, :, i, j] - A @ smooth[:, :, i, j]
        fitted[:, :, i, j] += np.linalg.solve(A.T @ A + penalty, A.T @ rest)
    return (identity + fitted[0]).astype(np.float32), fitted[1:].astype(np.float32)
