"""A StyleGAN2 conditioned on age: one z is one person, at any age. It is not shipped: it teaches FaceGAN by pairs.

Legend: N faces, S side in pixels, Z latent width, K age classes, W style width.

Reference: Karras et al.: Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FIRST_SIDE_PX = 4
_GAIN = math.sqrt(2)
"""What a leaky ReLU takes off the variance."""


@dataclass(frozen=True, kw_only=True)
class StyleGANDims:
    """Dimensions of the generator and its discriminator."""

    size_px: int = 128
    latent: int = 256
    style: int = 256
    classes: int = 6
    mapping_layers: int = 4
    widths: tuple[int, ...] = (384, 384, 256, 192, 96, 48)
    """Channels of the generator at 4, 8, 16, ... pixels; of the discriminator in the other direction."""
    identity_px: int = 8
    """Up to this side the styles know z alone: pose, shape and light of the head stay as they are at every age."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists
        if _FIRST_SIDE_PX << (len(self.widths) - 1) != self.size_px:
            raise ValueError(f"{self.size_px} px needs {int(math.log2(self.size_px)) - 1} widths, got {self.widths}")


class StyleGenerator(nn.Module):
    """(z, y) -> face, through two styles: who z is, and how old y makes them look.

    The layers up to `identity_px` are given the first, the finer ones the second. There is no noise input: every pixel
    follows from z and y, so that two ages of one z differ by age alone.
    """

    def __init__(self, dims: StyleGANDims) -> None:
        super().__init__()
        self.dims = dims
        W = dims.widths
        self.identity = _Mapping(dims.latent, dims.style, dims.mapping_layers)
        self.aging = _Mapping(dims.style + dims.classes, dims.style, 2)
        self.constant = nn.Parameter(torch.randn(1, W[0], _FIRST_SIDE_PX, _FIRST_SIDE_PX))
        self.first = _StyledConv(W[0], W[0], dims.style)
        self.convs = nn.ModuleList(
            nn.ModuleList([_StyledConv(a, b, dims.style), _StyledConv(b, b, dims.style)]) for a, b in pairwise(W)
        )
        self.to_rgb = nn.ModuleList(_StyledConv(width, 3, dims.style, kernel=1, demodulate=False) for width in W)

    def forward(self, z_NZ: Tensor, y_NK: Tensor) -> Tensor:
        """Return faces [N, 3, S, S], about in [-1, 1]."""
        who = self.identity(z_NZ)
        aged = self.aging(torch.cat([who, y_NK], 1))
        x = self.constant.expand(len(z_NZ), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        x = self.first(x, who)
        rgb, side = self.to_rgb[0](x, who), _FIRST_SIDE_PX
        for convs, to_rgb in zip(self.convs, list(self.to_rgb)[1:], strict=True):
            side *= 2
            style = who if side <= self.dims.identity_px else aged
            x = _double(x)
            for conv in convs:
                x = conv(x, style)
            rgb = _double(rgb) + to_rgb(x, style)
        return rgb


class StyleDiscriminator(nn.Module):
    """(face, y) -> realness, by residual blocks; y by projection (Miyato and Koyama, ICLR 2018)."""

    def __init__(self, dims: StyleGANDims) -> None:
        super().__init__()
        W = dims.widths[::-1]
        self.from_rgb = _Conv(3, W[0], 1)
        self.blocks = nn.ModuleList(
            nn.ModuleList([_Conv(a, a, 3), _Conv(a, b, 3), _Conv(a, b, 1, bias=False)]) for a, b in pairwise(W)
        )
        self.last = _Conv(W[-1] + 1, W[-1], 3)
        self.dense = _Dense(W[-1] * _FIRST_SIDE_PX**2, W[-1])
        self.realness = _Dense(W[-1], 1)
        self.ages = _Dense(dims.classes, W[-1])

    def forward(self, x_N3SS: Tensor, y_NK: Tensor) -> Tensor:
        """Return logits [N], high for a real face of age y."""
        x = F.leaky_relu(self.from_rgb(x_N3SS), 0.2) * _GAIN
        for first, second, skip in self.blocks:
            half = F.avg_pool2d(x, 2)
            inner = F.avg_pool2d(F.leaky_relu(first(x), 0.2) * _GAIN, 2)
            x = (F.leaky_relu(second(inner), 0.2) * _GAIN + skip(half)) / _GAIN
        # One more channel, the batch's standard deviation: a collapsed batch shows (Karras et al. 2018).
        deviation = x.float().var(0, unbiased=False).add(1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        x = F.leaky_relu(self.last(torch.cat([x, deviation.to(x.dtype)], 1)), 0.2) * _GAIN
        x = F.leaky_relu(self.dense(x.flatten(1)), 0.2) * _GAIN
        ages = self.ages(y_NK)
        return self.realness(x)[:, 0] + (x * ages).sum(1) / math.sqrt(x.shape[1])


class _Dense(nn.Module):
    """A dense layer whose weights are of unit variance and are scaled as they are used (Karras et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class _Conv(nn.Module):
    """A convolution of the same kind."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.padding = 1 / math.sqrt(inputs * kernel**2), kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class _StyledConv(nn.Module):
    """A convolution whose input channels are scaled by a style, and its outputs back to unit variance.

    Scaling the features instead of the weights is the same sum, and one dense convolution for the whole batch.
    """

    def __init__(self, inputs: int, outputs: int, style: int, kernel: int = 3, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style = _Dense(style, inputs, bias=1.0)
        self.scale, self.padding, self.demodulate = 1 / math.sqrt(inputs * kernel**2), kernel // 2, demodulate

    def forward(self, x: Tensor, w_NW: Tensor) -> Tensor:
        style = self.style(w_NW)
        weight = self.weight * self.scale
        x = F.conv2d(x * style[:, :, None, None].to(x.dtype), weight, padding=self.padding)
        if self.demodulate:
            power = style.float().square() @ weight.square().sum((2, 3)).T
            x = x * torch.rsqrt(power + 1e-8)[:, :, None, None].to(x.dtype)
        x = x + self.bias[:, None, None].to(x.dtype)
        return F.leaky_relu(x, 0.2) * _GAIN if self.demodulate else x


class _Mapping(nn.Module):
    def __init__(self, inputs: int, style: int, layers: int) -> None:
        super().__init__()
        widths = [inputs, *[style] * layers]
        # A hundredth of the others' learning rate, as in the paper: styles must not run away from what uses them.
        self.layers = nn.ModuleList(_Dense(a, b, rate=0.01) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2) * _GAIN
        return x


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
