"""What the losses of several training scripts have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from faceage.networks.regressors import AgeEstimator


def read_by_all(readers: list[AgeEstimator], x: Tensor) -> Tensor:
    """Return the ages [readers, N] that estimators of any input size read off faces."""
    return torch.stack([reader(F.interpolate(x, reader.trunk.dims.size_px, mode="area")) for reader in readers])


def r1_penalty(D: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared gradient of the logits with respect to real faces (Mescheder et al., ICML 2018)."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(x, y).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()
