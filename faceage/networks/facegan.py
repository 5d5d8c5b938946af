"""FaceGAN: a U-Net that predicts what age changes in a face, and the patch discriminator that it was trained against.

Legend: N faces, S side in pixels, C channels, K age classes.

Reference: Zoss et al.: Production-Ready Face Re-Aging for Visual Effects, SIGGRAPH Asia 2022 (a U-Net that predicts an
RGB delta); Zhang: Making Convolutional Networks Shift-Invariant Again, ICML 2019 (anti-aliased sampling).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceage.geometry import face_mask

MULTIPLE_PX = 32
"""The side of a crop is a multiple of this: the stem halves it, and four levels below halve it again."""
_LIGHT_CELLS = 8
"""Cells along a side of the crop, in which light from a side is looked for: the finer ones hold folds."""
_USUAL, _BEYOND = 0.2, 0.15
"""Change of luma up to which it stays as it was drawn, and by how much more it can get at most; the range is 2."""


@dataclass(frozen=True, kw_only=True)
class FaceGANDims:
    """Dimensions of the U-Net and its discriminator."""

    sizes_px: tuple[int, ...] = (128, 192)
    """Sides of the crops that it is trained at, ascending, and the product uses: on crops a third larger it was seen to
    change next to nothing. UTKFace's pictures, of 200 pixels, do not show what is finer."""
    widths: tuple[int, ...] = (24, 40, 96, 160, 192)
    """Channels at S/2, S/4, S/8, S/16 and S/32."""
    head: int = 8
    """Channels at S, before the luma."""
    ages: int = 32
    """Width of the embedding of the two ages."""
    discriminator_widths: tuple[int, ...] = (48, 96, 160, 192)
    classes: int = 6
    template: str = "face"
    """Name of the alignment template of its crops, a key of `geometry.TEMPLATES`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes_px", tuple(self.sizes_px))  # JSON gives lists
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "discriminator_widths", tuple(self.discriminator_widths))
        if not self.sizes_px or any(size % MULTIPLE_PX for size in self.sizes_px):
            raise ValueError(f"sides must be multiples of {MULTIPLE_PX}, got {self.sizes_px}")
        if len(self.widths) != 5:
            raise ValueError(f"five widths are needed, S/2 to S/32, got {self.widths}")


class _Conv(nn.Sequential):
    """A 3x3 convolution and its norm, which engines fold into it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


class _Residual(nn.Module):
    """Two 3x3 convolutions; the ages enter between them, as a bias.

    A constant plane through a convolution is a bias: so the age planes of a U-Net cost nothing, at every level.
    """

    def __init__(self, channels: int, ages: int) -> None:
        super().__init__()
        self.first = _Conv(channels, channels)
        self.ages = nn.Linear(ages, channels)
        self.second = _Conv(channels, channels)

    def forward(self, x: Tensor, ages: Tensor) -> Tensor:
        inner = F.leaky_relu(self.first(x) + self.ages(ages)[:, :, None, None], 0.2)
        return F.leaky_relu(x + self.second(inner), 0.2)


class AgeUNet(nn.Module):
    """(face, its age, the wanted age) -> features of each pixel, from which a change of it is drawn.

    Fully convolutional: one set of weights serves crops of any side that is a multiple of `MULTIPLE_PX`. The stem takes
    blocks of 2x2 pixels as channels, so that a crop of 256 pixels costs what one of 128 would; the last step has whole
    resolution, and sees the crop's own pixels again: wrinkles can be taken away only where they are.
    """

    def __init__(self, widths: Sequence[int], head: int, ages: int) -> None:
        super().__init__()
        W = widths
        self.embed = nn.Sequential(nn.Linear(4, ages), nn.LeakyReLU(0.2), nn.Linear(ages, ages))
        self.stem = _Conv(12, W[0])
        self.down = nn.ModuleList(_Conv(a, b) for a, b in pairwise(W))
        self.encoder = nn.ModuleList(_Residual(width, ages) for width in W[1:])
        self.up = nn.ModuleList(_Conv(b, a) for a, b in reversed(list(pairwise(W))))
        # The lowest level of the decoder has two convolutions after its sum, the others one: most of the cost is there.
        self.low = _Residual(W[3], ages)
        self.decoder = nn.ModuleList(_Conv(width, width) for width in reversed(W[:3]))
        self.decoder_ages = nn.ModuleList(nn.Linear(ages, width) for width in reversed(W[:3]))
        self.head = _Conv(W[0] + 3, head)

    def features(self, x_N3SS: Tensor, source_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [N, head, S, S], and a gate [N, 1, 1, 1] that is 0 where no years are asked for."""
        gate = torch.tanh((target_N - source_N) / 20)
        ages = torch.stack([source_N / 50 - 1, target_N / 50 - 1, gate, gate.abs()], 1)
        ages = F.leaky_relu(self.embed(ages), 0.2)
        x = F.leaky_relu(self.stem(F.pixel_unshuffle(x_N3SS, 2)), 0.2)
        skips = []
        for down, block in zip(self.down, self.encoder, strict=True):
            skips.append(x)
            x = block(F.leaky_relu(down(_halve(x)), 0.2), ages)
        x = self.low(_double(self.up[0](x)) + skips.pop(), ages)
        for up, conv, bias in zip(list(self.up)[1:], self.decoder, self.decoder_ages, strict=True):
            x = _double(up(x)) + skips.pop()
            x = F.leaky_relu(conv(x) + bias(ages)[:, :, None, None], 0.2)
        return F.leaky_relu(self.head(torch.cat([_double(x), x_N3SS], 1)), 0.2), gate[:, None, None, None]


class UNet(AgeUNet):
    """(face, its age, the wanted age) -> the change of its pixels.

    The change

    - has one value a pixel, its luma: whatever the U-Net was let do to colours pleased estimators that were in its loss
      (grey beards on everybody, red cheeks), and left the one that was not unmoved;
    - has no mean inside the blend mask (young and old faces were not photographed in the same light; age lightens no
      skin), and nothing soft that differs between left and right, for age does not move the lamp either;
    - is in proportion to tanh((target - source) / 20): where nothing is asked for, nothing is changed;
    - is limited, softly, after all this: one pixel in a hundred would be changed by more, and be seen as a glint on a
      cheek, or a rim along a jaw.
    """

    def __init__(self, dims: FaceGANDims) -> None:
        super().__init__(dims.widths, dims.head, dims.ages)
        self.to_luma = nn.Conv2d(dims.head, 1, 3, padding=1)
        for size in dims.sizes_px:
            # The template fits every face alike, so the mask of a size is a constant.
            self.register_buffer(f"mask{size}", torch.from_numpy(face_mask(size).copy()), persistent=False)
        nn.init.zeros_(self.to_luma.weight)
        nn.init.zeros_(self.to_luma.bias)

    def forward(self, x_N3SS: Tensor, source_N: Tensor, target_N: Tensor) -> Tensor:
        """Return what to add to the faces: RGB [N, 3, S, S] in units of their [-1, 1] range, not masked.

        Args:
            x_N3SS: aligned faces, RGB in [-1, 1]; S is a multiple of `MULTIPLE_PX`, and one of `sizes_px` in a graph.
            source_N: how old they are, in years.
            target_N: how old they are to be.
        """
        features, gate = self.features(x_N3SS, source_N, target_N)
        luma = self.to_luma(features)
        mask = self._mask(x_N3SS)
        luma = luma - (luma * mask).sum((2, 3), keepdim=True) / mask.sum()
        soft = F.avg_pool2d(luma, luma.shape[-1] // _LIGHT_CELLS)
        side_light = (soft - soft.flip(3)) / 2
        luma = luma - F.interpolate(side_light, luma.shape[-2:], mode="bilinear", align_corners=False)
        luma = luma * gate
        usual = luma.clamp(-_USUAL, _USUAL)
        luma = usual + _BEYOND * torch.tanh((luma - usual) / _BEYOND)
        return luma.expand(-1, 3, -1, -1)

    def _mask(self, x_N3SS: Tensor) -> Tensor:
        """Return the blend mask [S, S] of the faces' size; for one that is not of `sizes_px` it is made here."""
        size = x_N3SS.shape[-1]
        kept = getattr(self, f"mask{size}", None)
        return torch.from_numpy(face_mask(size).copy()).to(x_N3SS.device) if kept is None else kept


class PatchDiscriminator(nn.Module):
    """(face, age class) -> realness of each patch; ages by projection (Miyato and Koyama, ICLR 2018)."""

    def __init__(self, dims: FaceGANDims) -> None:
        super().__init__()
        W = (3, *dims.discriminator_widths)
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(W))
        self.last = nn.Conv2d(W[-1], W[-1], 3, padding=1)
        self.realness = nn.Conv2d(W[-1], 1, 1)
        self.ages = nn.Linear(dims.classes, W[-1], bias=False)
        for conv in (*self.blocks, self.last):
            nn.init.kaiming_normal_(conv.weight, 0.2)

    def forward(self, x_N3SS: Tensor, y_NK: Tensor) -> Tensor:
        """Return logits [N, S/16, S/16], high for the patches of a real face of age y."""
        x = x_N3SS
        for block in self.blocks:
            x = F.leaky_relu(block(x), 0.2)
        x = F.leaky_relu(self.last(x), 0.2)
        ages = self.ages(y_NK)[:, :, None, None] / math.sqrt(x.shape[1])
        return (self.realness(x) + (x * ages).sum(1, keepdim=True))[:, 0]


def _halve(x: Tensor) -> Tensor:
    """Halve the side behind a low-pass filter (1, 2, 2, 1) / 6: a plain stride would make the change flicker."""
    return F.avg_pool2d(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), 2)


def _double(x: Tensor) -> Tensor:
    """Double the side by bilinear interpolation: a pixel shuffle would draw dots."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
