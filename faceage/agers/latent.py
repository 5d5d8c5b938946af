"""Batched latent optimization: a compiled step (`networks.latent.LatentStep`), called until every face has stopped.

Reference: Antipov et al. 2017, arXiv:1702.01983, section 2.3, which optimizes one face at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from faceage.kernels import to_device, to_host
from faceage.types import FloatArray, IntArray

Step = Callable[..., tuple[FloatArray, ...]]
"""Arrays in, arrays out, or tensors in, tensors out, as `networks.latent.LatentStep.forward`: the engine of
`agers.age_cgan.latent_program`."""


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

    def __post_init__(self) -> None:
        if min(self.max_evaluations, self.max_evaluations_known) < 1 or not 0 <= self.tolerance < 1:
            raise ValueError(f"max_evaluations must be positive, tolerance in [0, 1): {self}")


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


def first_state(count: int, width: int, budget: IntArray) -> tuple[FloatArray, ...]:
    """Return the state that `networks.latent.LatentStep` begins with.

    Its first trial is the start itself: any loss is lower than none.

    Args:
        count: of faces, F.
        width: of a latent, Z.
        budget: int64 [F], evaluations of each face at most.
    """
    nothing = np.zeros((count, width), np.float32)
    loss, length = np.full(count, np.inf, np.float32), np.ones(count, np.float32)
    return nothing, loss, nothing.copy(), nothing.copy(), length, budget.astype(np.float32)


def optimize_latents(
    step: Step,
    start: FloatArray,
    problem: tuple[FloatArray, ...],
    config: LatentConfig,
    *,
    root: FloatArray,
    budget: IntArray | None = None,
    device: str | None = None,
) -> Fit:
    """Minimise the objective of each face from `start`.

    One call evaluates all faces that have not stopped; a face that has stopped costs nothing more. On a GPU all faces
    take part in every call, as nobody asks which of them have stopped: all calls are enqueued, and the host waits once.

    Args:
        step: see `Step`.
        start: float32 [F, Z]. F may be 0.
        problem: what else the step takes a face: classes [F, K], faces [F, 3, S, S], embeddings [F, D].
        config: see there.
        root: float32 [Z, Z], C with C C^T about the inverse of the objective's curvature (`train.age_cgan.curvature`),
            or the identity.
        budget: int64 [F], evaluations of each face at most; None: `config.max_evaluations` for all.
        device: the GPU that the step runs on; it is given tensors there.
    """
    count, width = start.shape
    budget = np.full(count, config.max_evaluations) if budget is None else budget
    weights = config.identity_weight, config.pixel_weight, config.prior_weight
    settings = np.array([*weights, config.tolerance], np.float32)
    state = first_state(count, width, budget)
    if device is not None and count:
        return _optimize_on_device(step, state, (start, *problem, settings, root), budget, device)
    first = np.zeros(count, np.float32)
    evaluations = np.zeros(count, np.int64)
    rows = np.arange(count)
    while len(rows):
        mine = [part[rows] for part in (*state, start, *problem)]
        for part, new in zip(state, step(*mine, settings, root), strict=True):
            part[rows] = new
        u, loss, *_, left = state
        if not evaluations.any():
            first = loss.copy()
        evaluations[rows] += 1
        rows = np.flatnonzero(left > 0)
    u, loss = state[:2]
    return Fit(latents=_latents(start, u, root), first_losses=first, losses=loss, evaluations=evaluations)


def _latents(start: FloatArray, u: FloatArray, root: FloatArray) -> FloatArray:
    # einsum, not a matrix product: BLAS threads wait for busy cores longer than this takes.
    return start + np.einsum("fu,zu->fz", u, root)


def _optimize_on_device(
    step: Step, first_state: tuple[FloatArray, ...], fixed: tuple[FloatArray, ...], budget: IntArray, device: str
) -> Fit:
    """Do the same with tensors; a face that has stopped stays as it is (see `LatentStep`)."""
    import torch

    state, given = ([to_device(array, device) for array in arrays] for arrays in (first_state, fixed))
    losses, going = [], [state[-1] > 0]
    for _ in range(int(budget.max())):
        state = list(step(*state, *given))
        losses.append(state[1])
        going.append(state[-1] > 0)
    evaluations = torch.stack(going[:-1]).sum(0)
    columns = torch.stack([losses[0], losses[-1], evaluations.float()], 1)
    found = to_host(torch.cat([state[0], columns], 1))  # one way to the host for all
    u, (first, loss, counts) = found[:, :-3], found[:, -3:].T
    latents = _latents(fixed[0], u, fixed[-1])
    return Fit(latents=latents, first_losses=first, losses=loss, evaluations=counts.astype(np.int64))
