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
from faceage.networks.facegan import AgeUNet, _Conv, _double, _halve


@dataclass(frozen=True, kw_only=True)
class MapDims:
    """Dimensions of a small U-Net that draws a map of half the crop's side."""

    size_px: int
    """Side of the crops; a multiple of 32."""
    outputs: int
    """Channels of the map."""
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

    The crop is aligned, so where a pixel lies says much of what it is: two planes with its position come with the
    colours. The map starts as `bias_map`, a parameter, and the network draws what differs from it.
    """

    def __init__(self, dims: MapDims) -> None:
        super().__init__()
        W, half = dims.widths, dims.size_px // 2
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
        return self.head(x) + self.bias_map


@dataclass(frozen=True, kw_only=True)
class CoordinateDims:
    """Dimensions of the coordinate network."""

    size_px: int
    """Side of the crops; a multiple of 32."""
    shapes: int = 20
    """Principal components of a face's shape that the network reads."""
    map_px: int = 32
    """Side of the map of coordinates, which is smooth."""
    template: str = "whole face"
    """Name of the crops' template, in `geometry.TEMPLATES`."""
    widths: tuple[int, ...] = (16, 32, 64, 96, 96)
    """Channels at S/2, S/4, S/8, S/16 and S/32."""
    hidden: int = 160
    """Width of the layer between the picture and its shape."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists
        if self.size_px % 32 or len(self.widths) != 5:
            raise ValueError(f"the side must be a multiple of 32 and have five widths: {self}")


class _Level(nn.Sequential):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(_Conv(inputs, outputs), nn.ReLU(), _Conv(outputs, outputs), nn.ReLU())
        for conv in (self[0][0], self[2][0]):
            nn.init.kaiming_normal_(conv.weight)


def _surroundings(x: Tensor) -> Tensor:
    """Return the mean around each pixel of [N, 1, S, S], over about S/6."""
    means = F.avg_pool2d(F.avg_pool2d(x, 8), 3, stride=1, padding=1, count_include_pad=False)
    return F.interpolate(means, scale_factor=8.0, mode="bilinear", align_corners=False)


def _even_contrast(x: Tensor) -> Tensor:
    """Return luma [N, 1, S, S] less its local mean, over its local deviation: the same in any light.

    Small networks learned faster from it than from colours.
    """
    luma = x.mean(1, keepdim=True)
    rest = luma - _surroundings(luma)
    return rest / (_surroundings(rest.square()) + 0.002).sqrt()


class CoordinateNet(nn.Module):
    """(crop, landmarks) -> where each pixel of the crop lies on the canonical face.

    The meshes of faces have few degrees of freedom. Five landmarks say most of them, linearly; the network reads the
    others, as principal components ("shapes"), from the picture. The map is linear in both:

        coordinates(x) = bias_map(x) + sum_k (landmark offsets, shapes)_k maps_k(x)

    Only the shapes are trained by gradients (`train.space.coordinates`); the maps are fitted in closed form.
    """

    def __init__(self, dims: CoordinateDims) -> None:
        super().__init__()
        W, side = dims.widths, dims.map_px
        self.levels = nn.ModuleList(_Level(a, b) for a, b in pairwise((4, *W)))
        self.hidden = nn.Linear(W[-1] * (dims.size_px // 32) ** 2, dims.hidden)
        self.to_shapes = nn.Linear(dims.hidden + 10, dims.shapes)
        self.bias_map = nn.Parameter(torch.zeros(2, side, side))
        self.maps = nn.Parameter(torch.zeros(10 + dims.shapes, 2, side, side))
        template = torch.from_numpy(TEMPLATES[dims.template].reshape(-1).copy())
        self.register_buffer("template", template, persistent=False)

    def shapes(self, x_N3SS: Tensor, landmarks_NK: Tensor) -> Tensor:
        """Return the shapes [N, dims.shapes] of faces, in standard deviations; the arguments are `forward`'s."""
        x = F.pixel_unshuffle(_even_contrast(x_N3SS), 2)
        for i, level in enumerate(self.levels):
            x = level(F.max_pool2d(x, 2) if i else x)
        hidden = F.relu(self.hidden(x.flatten(1)))
        # Offsets of landmarks are some hundredths of the crop's side.
        return self.to_shapes(torch.cat([hidden, 30 * (landmarks_NK - self.template)], 1))

    def forward(self, x_N3SS: Tensor, landmarks_NK: Tensor) -> Tensor:
        """Return coordinates [N, 2, M, M], fractions of the canonical picture.

        Args:
            x_N3SS: aligned faces, RGB in [-1, 1].
            landmarks_NK: their five landmarks as fractions of the crop's side, x and y in turns: K is 10.
        """
        weights = torch.cat([landmarks_NK - self.template, self.shapes(x_N3SS, landmarks_NK)], 1)
        return self.bias_map + torch.einsum("nk,kchw->nchw", weights, self.maps)


@dataclass(frozen=True, kw_only=True)
class OlderDims:
    """Dimensions of the network that draws what age adds to a face."""

    size_px: int
    """Side of the crops; a multiple of 32."""
    widths: tuple[int, ...] = (16, 32, 64, 96, 112)
    """Channels at S/2, S/4, S/8, S/16 and S/32."""
    head: int = 8
    """Channels at S."""
    ages: int = 32
    """Width of the embedding of the two ages."""
    template: str = "whole face"
    """Name of the crops' template, in `geometry.TEMPLATES`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists
        if self.size_px % 32 or len(self.widths) != 5:
            raise ValueError(f"the side must be a multiple of 32 and have five widths: {self}")


class OlderNet(AgeUNet):
    """(face, its age, the wanted age) -> what age adds to this very face.

    The change is of log luma, of log R/G and of log B/G, is in proportion to tanh((target - source) / 20), and is
    limited softly.
    """

    LIMIT = 0.6

    def __init__(self, dims: OlderDims) -> None:
        super().__init__(dims.widths, dims.head, dims.ages)
        self.to_change = nn.Conv2d(dims.head, 3, 3, padding=1)
        nn.init.normal_(self.to_change.weight, 0, 0.01)
        nn.init.zeros_(self.to_change.bias)

    def forward(self, x_N3SS: Tensor, source_N: Tensor, target_N: Tensor) -> Tensor:
        """Return log ratios [N, 3, S, S], not masked.

        Args:
            x_N3SS: aligned faces, RGB in [-1, 1].
            source_N: how old they are, in years.
            target_N: how old they are to be.
        """
        features, gate = self.features(x_N3SS, source_N, target_N)
        return self.LIMIT * torch.tanh(self.to_change(features).float() / self.LIMIT) * gate
