"""A face's coordinates from its landmarks and its shapes: the linear part of the coordinate network, in closed form.

    coordinates(x) - identity(x) = B_0(x) + sum_k w_k B_k(x)

with w the landmarks' offsets from the template and the face's shapes: the principal components of what the landmarks
do not say of its mesh (`Shapes`). Each pixel of the map has a ridge regression of its own over the faces that cover
it; pixels that few faces cover get one in which B is linear in x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import LinearNDInterpolator

from train.space.canonical import CANONICAL_PX, ENLARGE, FACE_CENTRE, OVAL, Canonical

RING = 1.25
"""The outline enlarged: coordinates are known a little beyond the face."""
RIDGE, FEWEST = 3.0, 150
"""Ridge in faces, for weights of deviation 1, and the fewest faces for a pixel's own regression."""


@dataclass(frozen=True)
class Shapes:
    """Meshes as a linear model: mesh = mean + offsets @ linear + shapes @ directions."""

    mean: np.ndarray
    """[936], pixels of the crop."""
    linear: np.ndarray
    """[10, 936]."""
    directions: np.ndarray
    """[K, 936], orthogonal; each is a standard deviation long."""

    @classmethod
    def of(cls, meshes: np.ndarray, offsets: np.ndarray, count: int) -> Shapes:
        """Return the model of meshes [N, 468, 2] in pixels of their crops, landmarks less the template [N, 10]."""
        X, Y = np.column_stack([np.ones(len(offsets)), offsets]), meshes.reshape(len(meshes), -1)
        linear = np.linalg.solve(X.T @ X + np.diag([0.0] + [1e-3] * offsets.shape[1]), X.T @ Y)
        rest = Y - X @ linear
        squares, vectors = np.linalg.eigh(rest.T @ rest / len(rest))
        directions = vectors.T[::-1][:count] * np.sqrt(squares[::-1][:count])[:, None]
        return cls(linear[0].astype(np.float32), linear[1:].astype(np.float32), directions.astype(np.float32))

    def __call__(self, meshes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Return the shapes [N, K] of meshes [N, 468, 2]."""
        rest = meshes.reshape(len(meshes), -1) - self.mean - offsets @ self.linear
        return (rest @ self.directions.T / np.square(self.directions).sum(1)).astype(np.float32)


def identity_map(map_px: int) -> np.ndarray:
    """Return the map of a face that is the canonical one: [2, map_px, map_px], fractions of its side."""
    axis = (np.arange(map_px) + 0.5) / map_px
    y, x = np.meshgrid((axis - FACE_CENTRE) * ENLARGE + 0.5, (axis - 0.5) * ENLARGE + 0.5, indexing="ij")
    return np.stack([x, y]).astype(np.float32)


def true_map(mesh: np.ndarray, canonical: Canonical, size_px: int, map_px: int) -> np.ndarray:
    """Return a face's coordinates [2, map_px, map_px], fractions of the canonical picture, NaN where they are unknown.

    Args:
        mesh: [468, 2], pixels of the crop.
        canonical: the canonical face.
        size_px: side of the crop.
        map_px: side of the map.
    """

    def ringed(points: np.ndarray) -> np.ndarray:
        outline = points[list(OVAL)]
        middle = outline.mean(0)
        return np.concatenate([points, middle + RING * (outline - middle)])

    where = LinearNDInterpolator(ringed(mesh), ringed(canonical.points))
    axis = (np.arange(map_px) + 0.5) * (size_px / map_px) - 0.5
    x, y = np.meshgrid(axis, axis)
    return ((where(x, y) + 0.5) / CANONICAL_PX).transpose(2, 0, 1)


def fit(maps: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return B_0 plus the identity [2, H, H], and B_k [K, 2, H, H].

    Args:
        maps: [N, 2, H, H] from `true_map`.
        weights: [N, K], the landmarks' offsets and the shapes.
    """
    side, count = maps.shape[-1], weights.shape[1] + 1
    identity, deviations = identity_map(side), weights.std(0) + 1e-12
    X = np.column_stack([np.ones(len(weights)), weights / deviations])
    penalty = np.diag([1e-6] + [RIDGE] * (count - 1))
    axis = np.linspace(-1, 1, side)
    x, y = np.meshgrid(axis, axis)
    known = ~np.isnan(maps[:, 0])  # [N, H, H]
    residual = np.where(known[:, None], maps - identity, 0)

    # One regression for the whole map, linear in x and y: X (x) (1, x, y)
    shape = np.stack([np.ones_like(x), x, y])  # [3, H, H]
    gram = np.einsum("nij,aij,bij->nab", known, shape, shape)
    whole = np.einsum("ni,nj,nab->iajb", X, X, gram, optimize=True).reshape(3 * count, 3 * count)
    whole += np.kron(penalty, np.eye(3)) * side
    right = np.einsum("nk,aij,ncij->kac", X, shape, residual, optimize=True).reshape(3 * count, 2)
    smooth = np.einsum("kac,aij->kcij", np.linalg.solve(whole, right).reshape(count, 3, 2), shape)

    fitted = smooth.copy()
    for i, j in zip(*np.nonzero(known.sum(0) >= FEWEST), strict=True):
        rows = known[:, i, j]
        A = X[rows]
        rest = residual[rows, :, i, j] - A @ smooth[:, :, i, j]
        fitted[:, :, i, j] += np.linalg.solve(A.T @ A + penalty, A.T @ rest)
    fitted[1:] /= deviations[:, None, None, None]
    return (identity + fitted[0]).astype(np.float32), fitted[1:].astype(np.float32)
