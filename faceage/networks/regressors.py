"""Two compact networks that read a face: its age, and who it is.

Legend: N faces, S side in pixels. Images are RGB in [-1, 1], aligned by `geometry.TEMPLATE_5`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TrunkDims:
    """A residual trunk: a stride-2 stem, then a stage of blocks for each width, the side halving between stages."""

    size_px: int = 64
    widths: tuple[int, ...] = (32, 64, 128, 192)
    blocks: tuple[int, ...] = (1, 2, 2, 1)
    outputs: int = 1
    dropout: float = 0.0
    """Share of the features that training drops before the dense layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if len(self.widths) != len(self.blocks):
            raise ValueError(f"one number of blocks a width is needed, got {self.blocks} for {self.widths}")


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.body(x), 0.1)


class Trunk(nn.Module):
    """face -> features, flattened through a dense layer so that position on the face still counts."""

    def __init__(self, dims: TrunkDims) -> None:
        super().__init__()
        self.dims = dims
        layers: list[nn.Module] = []
        previous = 3
        for width, blocks in zip(dims.widths, dims.blocks, strict=True):
            layers += [nn.Conv2d(previous, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.LeakyReLU(0.1), *(_Residual(width) for _ in range(blocks))]
            previous = width
        side = dims.size_px >> len(dims.widths)
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dims.dropout)
        self.dense = nn.Linear(previous * side * side, dims.outputs)

    def forward(self, x_N3SS: Tensor) -> Tensor:
        """Return [N, outputs]."""
        return self.dense(self.dropout(self.body(x_N3SS).flatten(1)))


class AgeEstimator(nn.Module):
    """face -> apparent age in years, the mean of a distribution over `outputs` bins of 0 to 100 years.

    Reference: Rothe, Timofte, Van Gool: DEX: Deep EXpectation of apparent age, ICCV workshops 2015.
    """

    bins_years: Tensor

    def __init__(self, dims: TrunkDims) -> None:
        super().__init__()
        self.trunk = Trunk(dims)
        self.register_buffer("bins_years", torch.linspace(0, 100, dims.outputs), persistent=False)

    def log_probabilities(self, x_N3SS: Tensor) -> Tensor:
        """Return log p over the age bins, [N, outputs]."""
        return F.log_softmax(self.trunk(x_N3SS).float(), 1)

    def forward(self, x_N3SS: Tensor) -> Tensor:
        """Return ages [N], years."""
        return self.log_probabilities(x_N3SS).exp() @ self.bins_years


class IdentityNet(nn.Module):
    """face -> unit embedding; the cosine of two embeddings says how alike the two people are."""

    def __init__(self, dims: TrunkDims) -> None:
        super().__init__()
        self.trunk = Trunk(dims)

    def forward(self, x_N3SS: Tensor) -> Tensor:
        """Return embeddings [N, outputs] of length 1."""
        return F.normalize(self.trunk(x_N3SS).float(), dim=1)
