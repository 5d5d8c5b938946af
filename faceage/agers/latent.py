"""Batched latent optimization: many faces at once, each with its own step length and its own convergence test.

Reference: L-BFGS: Nocedal and Wright, Numerical Optimization, 2nd edition, algorithms 7.4 and 3.1. Age-cGAN uses it too
(Antipov et al. 2017), one face at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from faceage.types import FloatArray, IntArray

Objective = Callable[[FloatArray, IntArray], tuple[FloatArray, FloatArray]]
"""(z [A, Z], rows [A]) -> (loss [A], gradient [A, Z]): the objective of the faces `rows` of the batch."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """How latents are optimized."""

    identity_weight: float = 1.0
    """Weight of the squared distance of embeddings: the paper's identity-preserving term."""
    pixel_weight: float = 4.0
    """Weight of the mean squared error inside the mask: the paper's pixel-wise term."""
    prior_weight: float = 0.02
    """Weight of the mean square of z, which is 1 where the generator was trained."""
    max_evaluations: int = 8
    """Evaluations of loss and gradient a face at most."""
    max_evaluations_known: int = 3
    """The same for a face whose latent is known from an earlier frame and has only to follow."""
    memory: float = 0.5
    """Share of a known latent that is kept when a face is fitted again: what the fit makes of noise averages out."""
    tolerance: float = 0.005
    """A face has converged when an accepted step lowers its loss by less than this share of it."""
    history: int = 8
    """Steps that the curvature is estimated from."""

    def __post_init__(self) -> None:
        if min(self.max_evaluations, self.max_evaluations_known) < 1 or self.history < 1 or not 0 <= self.tolerance < 1:
            raise ValueError(f"max_evaluations and history must be positive, tolerance in [0, 1): {self}")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The outcome of an optimization."""

    latents: FloatArray
    """float32 [F, Z]."""
    first_losses: FloatArray
    """float32 [F], at the starting point."""
    losses: FloatArray
    """float32 [F], at `latents`: never above `first_losses`."""
    evaluations: IntArray
    """int64 [F], how many each face took."""


_ARMIJO = 1e-4
"""Share of the linear decrease that a step must bring (Nocedal and Wright, section 3.1)."""
_FIRST_STEP = 0.5
"""Length of the first step, in units of z or u: short enough for a latent that is nearly right."""
_MAX_HALVINGS = 6
"""A face whose step fails this often in a row has converged as far as float32 goes."""


def optimize_latents(
    objective: Objective,
    start: FloatArray,
    config: LatentConfig,
    *,
    budget: IntArray | None = None,
    root: FloatArray | None = None,
) -> Fit:
    """Minimise the objective of each face from `start` by L-BFGS with backtracking.

    One evaluation serves all faces that have not converged; a face that has converged costs nothing more.

    Args:
        objective: see `Objective`.
        start: float32 [F, Z]. F may be 0.
        config: weights are the objective's affair, the rest is used here.
        budget: int64 [F], evaluations of each face at most; None: `config.max_evaluations` for all.
        root: float32 [Z, Z], C with C C^T about the inverse of the objective's curvature (`train.curvature`). L-BFGS
            then works on u with z = start + C u, where all directions are about equally curved, and needs fewer
            evaluations; None: the identity.
    """
    if root is not None:
        # einsum, not a matrix product: BLAS threads wait for busy cores longer than this takes.
        def moved(u: FloatArray, rows: IntArray) -> tuple[FloatArray, FloatArray]:
            loss, gradient = objective(start[rows] + np.einsum("au,zu->az", u, root), rows)
            return loss, np.einsum("az,zu->au", gradient, root)

        fit = optimize_latents(moved, np.zeros_like(start), config, budget=budget)
        return replace(fit, latents=start + np.einsum("au,zu->az", fit.latents, root))
    count, width = start.shape
    budget = np.full(count, config.max_evaluations) if budget is None else budget
    z = start.astype(np.float32, copy=True)
    rows = np.arange(count)
    loss, gradient = objective(z, rows)
    first = loss.copy()
    evaluations = np.ones(count, np.int64)
    steps = np.zeros((config.history, count, width), np.float32)  # newest last; rows of zeros are unused
    changes = np.zeros_like(steps)
    direction = _direction(gradient, steps, changes)
    length = np.ones(count, np.float32)
    halvings = np.zeros(count, np.int64)
    active = evaluations < budget
    while active.any():
        rows = np.flatnonzero(active)
        trial = z[rows] + length[rows, None] * direction[rows]
        new_loss, new_gradient = objective(trial, rows)
        evaluations[rows] += 1
        slope = (gradient[rows] * direction[rows]).sum(1)
        good = new_loss <= loss[rows] + _ARMIJO * length[rows] * slope
        # Refused steps are halved; accepted ones become history and give the next direction.
        refused, accepted = rows[~good], rows[good]
        length[refused] *= 0.5
        halvings[refused] += 1
        steps[:-1, accepted] = steps[1:, accepted]
        changes[:-1, accepted] = changes[1:, accepted]
        steps[-1, accepted] = trial[good] - z[accepted]
        changes[-1, accepted] = new_gradient[good] - gradient[accepted]
        decrease = loss[accepted] - new_loss[good]
        z[accepted], loss[accepted], gradient[accepted] = trial[good], new_loss[good], new_gradient[good]
        direction[accepted] = _direction(gradient[accepted], steps[:, accepted], changes[:, accepted])
        length[accepted], halvings[accepted] = 1.0, 0
        active[accepted[decrease <= config.tolerance * np.abs(loss[accepted])]] = False
        active[halvings >= _MAX_HALVINGS] = False
        active[evaluations >= budget] = False
    return Fit(latents=z, first_losses=first, losses=loss, evaluations=evaluations)


def _direction(gradient: FloatArray, steps: FloatArray, changes: FloatArray) -> FloatArray:
    """Return -H g of each face by the two-loop recursion; a face without usable history goes down its gradient.

    Args:
        gradient: float32 [A, Z].
        steps: float32 [M, A, Z], changes of z, newest last, zero where there is none.
        changes: float32 [M, A, Z], changes of the gradient.
    """
    curvature = (steps * changes).sum(2)  # [M, A]
    usable = curvature > 1e-10
    inverse = np.where(usable, 1 / np.where(usable, curvature, 1), 0)
    q = gradient.astype(np.float32, copy=True)
    alphas = []
    for s, y, rho in zip(steps[::-1], changes[::-1], inverse[::-1], strict=True):
        alpha = rho * (s * q).sum(1)
        q -= alpha[:, None] * y
        alphas.append(alpha)
    norm = np.linalg.norm(gradient, axis=1)
    scale = _FIRST_STEP / np.maximum(norm, 1e-12)
    has_history = usable[-1]
    newest = (changes[-1] ** 2).sum(1)
    scale[has_history] = curvature[-1][has_history] / np.maximum(newest[has_history], 1e-20)
    q *= scale[:, None]
    for s, y, rho, alpha in zip(steps, changes, inverse, alphas[::-1], strict=True):
        beta = rho * (y * q).sum(1)
        q += (alpha - beta)[:, None] * s
    return -q
