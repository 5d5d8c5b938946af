"""Networks of the space model: where each pixel of a crop lies on the canonical face, and where hair is.

Legend: N faces, S side in pixels, C channels.

Reference: Ronneberger et al.: U-Net, MICCAI 2015; Güler et al.: DenseReg, CVPR 2017 (dense coordinates by regression);
Liu et al.: An intriguing failing of convolutional neural networks and the CoordConv solution, NeurIPS 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceage.geometry import TEMPLATES
from faceage.networks.facegan import _Conv, _double, _halve


@dataclass(frozen=True, kw_only=True)
class MapDims:
    """Dimensions of a small U-Net that draws a map of half the crop's side."""

    size_px: int
    """Side of the crops; a multiple of 32."""
    outputs: int
    """Channels of the map."""
    scale: float = 1.0
    """What the map is multiplied by: outputs of about 1 are learned best."""
    template: str = "whole face"
    """Name of the crops' template, in `geometry.TEMPLATES`."""
    widths: tuple[int, ...] = (24, 32, 64, 96, 128)
    """Channels at S/2, S/4, S/8, S/16 and S/32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists
        if self.size_px % 32 or len(self.widths) != 5:
            raise ValueError(f"the side must be a multiple of 32 and have five widths: {self}")


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _Conv(channels, channels), _Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)


class MapNet(nn.Module):
    """Crop [N, 3, S, S] -> map [N, C, S/2, S/2].

    The crop is aligned, so where a pixel lies says most of what it is: two planes with its position come with the
    colours. The map starts as `bias_map`, a parameter, and the network draws what differs from it.
    """

    def __init__(self, dims: MapDims) -> None:
        super().__init__()
        W, half = dims.widths, dims.size_px // 2
        self.scale = dims.scale
        self.bias_map = nn.Parameter(torch.zeros(dims.outputs, half, half))
        axis = torch.linspace(-1, 1, half)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("position", torch.stack([x, y])[None], persistent=False)
        self.stem = _Conv(14, W[0])
        self.down = nn.ModuleList(_Conv(a, b) for a, b in pairwise(W))
        self.encoder = nn.ModuleList(_Block(width) for width in W[1:])
        self.up = nn.ModuleList(_Conv(b, a) for a, b in reversed(list(pairwise(W))))
        self.decoder = nn.ModuleList(_Conv(width, width) for width in reversed(W[:-1]))
        self.head = nn.Conv2d(W[0], dims.outputs, 3, padding=1)

    def forward(self, x_N3SS: Tensor) -> Tensor:
        """Return the map of aligned crops, RGB in [-1, 1]."""
        colours = F.pixel_unshuffle(x_N3SS, 2)
        x = torch.cat([colours, self.position.expand(colours.shape[0], -1, -1, -1)], 1)
        x = F.leaky_relu(self.stem(x), 0.2)
        skips = []
        for down, block in zip(self.down, self.encoder, strict=True):
            skips.append(x)
            x = block(F.leaky_relu(down(_halve(x)), 0.2))
        for up, conv in zip(self.up, self.decoder, strict=True):
            x = F.leaky_relu(_double(up(x)) + skips.pop(), 0.2)
            x = F.leaky_relu(conv(x), 0.2)
        return self.scale * (self.head(x) + self.bias_map)


class CoordinateNet(nn.Module):
    """(crop, landmarks) -> where each pixel of the crop lies on the canonical face.

    A face's five landmarks say most of it already, linearly; the network draws what they do not: the outline, the
    expression, the perspective.
    """

    def __init__(self, dims: MapDims) -> None:
        super().__init__()
        self.net = MapNet(dims)
        half = dims.size_px // 2
        self.landmark_maps = nn.Parameter(torch.zeros(10, dims.outputs, half, half))
        template = torch.from_numpy(TEMPLATES[dims.template].reshape(-1).copy())
        self.register_buffer("template", template, persistent=False)

    def forward(self, x_N3SS: Tensor, landmarks_NK: Tensor) -> Tensor:
        """Return coordinates [N, 2, S/2, S/2], fractions of the canonical picture.

        Args:
            x_N3SS: aligned faces, RGB in [-1, 1].
            landmarks_NK: their five landmarks as fractions of the crop's side, x and y in turns: K is 10.
        """
        offsets = landmarks_NK - self.template
        return self.net(x_N3SS) + torch.einsum("nk,kchw->nchw", offsets, self.landmark_maps)
