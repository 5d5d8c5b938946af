"""Age-cGAN: encoder, generator and discriminator of a GAN conditioned on age.

Legend: N faces, Z latent width, K age classes, S side in pixels. Images are RGB in [-1, 1].

Reference: Antipov, Baccouche, Dugelay: Face Aging with Conditional Generative Adversarial Networks, ICIP 2017,
arXiv:1702.01983.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_FIRST_SIDE_PX = 4


@dataclass(frozen=True, kw_only=True)
class AgeCGANDims:
    """The dimensions of the three networks; a 128-px variant only has longer tuples."""

    size_px: int = 64
    latent: int = 100
    classes: int = 6
    template: str = "face"
    """Name of the alignment template of its crops, a key of `geometry.TEMPLATES`."""
    generator_channels: tuple[int, ...] = (320, 160, 96, 48, 24)
    """From 4x4 on, doubling the side each time: the last entry is at `size_px`."""
    discriminator_channels: tuple[int, ...] = (48, 96, 192, 384)
    """Each entry halves the side: the last must be at 4x4."""
    encoder_channels: tuple[int, ...] = (48, 96, 192, 384)
    encoder_hidden: int = 1024

    def __post_init__(self) -> None:
        for name in ("generator_channels", "discriminator_channels", "encoder_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        steps = int(np.log2(self.size_px // _FIRST_SIDE_PX))
        if self.size_px != _FIRST_SIDE_PX << steps:
            raise ValueError(f"size_px must be 4 times a power of two, got {self.size_px}")
        lengths = len(self.generator_channels) - 1, len(self.discriminator_channels), len(self.encoder_channels)
        if lengths != (steps, steps, steps):
            raise ValueError(f"{self.size_px} px needs {steps} up- and downsampling blocks, got {lengths}")


class Generator(nn.Module):
    """(z, y) -> face. Nearest upsampling and 3x3 convolutions: no checkerboard, and cheap to differentiate."""

    def __init__(self, dims: AgeCGANDims) -> None:
        super().__init__()
        C = dims.generator_channels
        self.dense = nn.Linear(dims.latent + dims.classes, C[0] * _FIRST_SIDE_PX**2, bias=False)
        self.norm = nn.BatchNorm2d(C[0])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)) for a, b in pairwise(C)
        )
        self.upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.to_rgb = nn.Conv2d(C[-1], 3, 3, padding=1)

    def forward(self, z_NZ: Tensor, y_NK: Tensor) -> Tensor:
        """Return faces [N, 3, S, S] in [-1, 1]."""
        x = self.dense(torch.cat([z_NZ, y_NK], 1)).unflatten(1, (-1, _FIRST_SIDE_PX, _FIRST_SIDE_PX))
        x = F.leaky_relu(self.norm(x), 0.2)
        for block in self.blocks:
            x = F.leaky_relu(block(self.upsample(x)), 0.2)
        return torch.tanh(self.to_rgb(x))


class FoldedGenerator(nn.Module):
    """A trained generator with less to compute, equal but for rounding; it is what runs.

    Its batch norms are folded into the weights, and a nearest upsampling with the 3x3 convolution after it is one
    transposed 4x4 convolution of stride 2: a pixel that meets three others of its copies meets them in one product, so
    4 of 9 are left. The last convolution is written as a transposed one too, which is faster where few channels come
    out.
    """

    def __init__(self, generator: Generator, *, keep: bool = True) -> None:
        """Fold a generator's weights.

        Args:
            generator: in eval mode.
            keep: fold them here, once; False: in every call, so that an exported graph has the generator's own weights.
        """
        super().__init__()
        if keep:
            with torch.no_grad():
                for name, value in fold_generator(generator).items():
                    self.register_buffer(name, value)
        else:
            self.generator = generator

    def forward(self, z_NZ: Tensor, y_NK: Tensor) -> Tensor:
        """Return faces [N, 3, S, S] in [-1, 1]."""
        kept = hasattr(self, "dense")
        folded = dict(self.named_buffers(recurse=False)) if kept else fold_generator(self.generator)
        x = F.linear(torch.cat([z_NZ, y_NK], 1), folded["dense"], folded["dense_bias"])
        x = F.leaky_relu(x.unflatten(1, (-1, _FIRST_SIDE_PX, _FIRST_SIDE_PX)), 0.2)
        for i in range(len(folded) // 2 - 2):
            x = F.conv_transpose2d(x, folded[f"block{i}"], folded[f"block{i}_bias"], stride=2, padding=1)
            x = F.leaky_relu(x, 0.2)
        return torch.tanh(F.conv_transpose2d(x, folded["to_rgb"], folded["to_rgb_bias"], padding=1))


def fold_generator(generator: Generator) -> dict[str, Tensor]:
    """Return the weights of a `FoldedGenerator` by name."""
    norm = generator.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()

    def repeated(x: Tensor) -> Tensor:  # `repeat_interleave` would export a table of indices
        return x[:, None].expand(-1, _FIRST_SIDE_PX**2).flatten()

    folded = {
        "dense": generator.dense.weight * repeated(scale)[:, None],
        "dense_bias": repeated(norm.bias - norm.running_mean * scale),
    }
    for i, block in enumerate(generator.blocks):
        kernel, bias = fold_norm(block[0], block[1])
        kernel = _doubled(_doubled(kernel).transpose(2, 3)).transpose(2, 3)
        folded[f"block{i}"], folded[f"block{i}_bias"] = kernel.transpose(0, 1), bias
    last = generator.to_rgb
    assert last.bias is not None
    folded["to_rgb"], folded["to_rgb_bias"] = last.weight.transpose(0, 1).flip(2, 3), last.bias
    return folded


def fold_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the weights and the bias of a convolution that does what this one and the norm after it do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = norm.bias - norm.running_mean * scale
    if convolution.bias is not None:
        bias = bias + convolution.bias * scale
    return convolution.weight * scale[:, None, None, None], bias


def _doubled(kernel: Tensor) -> Tensor:
    """Return the rows [..., 4, 3] of the transposed kernel for the rows [..., 3, 3] of one that follows a doubling."""
    a, b, c = kernel.unbind(2)
    return torch.stack([c, b + c, a + b, a], 2)


class Discriminator(nn.Module):
    """(face, y) -> realness. y enters after the first block, as a constant map a class (Perarnau et al. 2016)."""

    def __init__(self, dims: AgeCGANDims) -> None:
        super().__init__()
        C = dims.discriminator_channels
        self.first = spectral_norm(nn.Conv2d(3, C[0], 4, stride=2, padding=1))
        widths = (C[0] + dims.classes, *C[1:])
        self.blocks = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in zip(widths, C[1:], strict=False)
        )
        # One more input channel: the batch's standard deviation, so that a collapsed batch shows (Karras et al. 2018).
        self.dense = spectral_norm(nn.Linear((C[-1] + 1) * _FIRST_SIDE_PX**2, 1))

    def forward(self, x_N3SS: Tensor, y_NK: Tensor) -> Tensor:
        """Return logits [N], high for a real face of age y."""
        x = F.leaky_relu(self.first(x_N3SS), 0.2)
        y = y_NK[:, :, None, None].expand(-1, -1, *x.shape[2:])
        x = torch.cat([x, y.to(x.dtype)], 1)
        for block in self.blocks:
            x = F.leaky_relu(block(x), 0.2)
        deviation = x.float().std(0).mean().expand(len(x), 1, *x.shape[2:]).to(x.dtype)
        return self.dense(torch.cat([x, deviation], 1).flatten(1))[:, 0]


class Encoder(nn.Module):
    """face -> z. Four 5x5 convolution blocks (batch norm in all but the first) and two dense layers."""

    def __init__(self, dims: AgeCGANDims) -> None:
        super().__init__()
        C = (3, *dims.encoder_channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 5, stride=2, padding=2, bias=i == 0),
                nn.BatchNorm2d(b) if i else nn.Identity(),
            )
            for i, (a, b) in enumerate(pairwise(C))
        )
        self.hidden = nn.Linear(C[-1] * _FIRST_SIDE_PX**2, dims.encoder_hidden, bias=False)
        self.norm = nn.BatchNorm1d(dims.encoder_hidden)
        self.out = nn.Linear(dims.encoder_hidden, dims.latent)
        # Not the encoder's own, but wherever its z is optimized this is needed with it: see `train.age_cgan.curvature`.
        self.register_buffer("latent_root", torch.eye(dims.latent))

    def forward(self, x_N3SS: Tensor) -> Tensor:
        """Return z [N, Z]."""
        x = x_N3SS
        for block in self.blocks:
            x = F.leaky_relu(block(x), 0.2)
        return self.out(F.leaky_relu(self.norm(self.hidden(x.flatten(1))), 0.2))
