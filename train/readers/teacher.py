"""The face-recognition teacher, MobileFaceNet, read from a torch checkpoint. It trains and judges; it is not shipped.

Reference: Chen, Liu, Gao, Han: MobileFaceNets, 2018, arXiv:1804.07573, table 1.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceage.errors import CheckpointError

TEMPLATE_96X112 = np.array(
    [[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366], [33.5493, 92.3655], [62.7299, 92.2041]], np.float32
)
"""The five landmarks in the teacher's 96x112 crop (Liu et al., SphereFace, 2017)."""
_BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
"""Table 1: expansion, output channels, repeats, stride of the first."""


class _ConvBlock(nn.Module):
    def __init__(self, inp: int, out: int, kernel: int | tuple, stride: int, pad: int, groups: int, act: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, kernel, stride, pad, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.prelu = nn.PReLU(out) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class _Bottleneck(nn.Module):
    def __init__(self, inp: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = inp * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inp, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.PReLU(mid),
            nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False), nn.BatchNorm2d(mid), nn.PReLU(mid),
            nn.Conv2d(mid, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.is_residual = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileFaceNet(nn.Module):
    """RGB faces [N, 3, 112, 96], (value - 127.5) / 128, to unit embeddings [N, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _ConvBlock(3, 64, 3, 2, 1, 1, True)
        self.dw_conv1 = _ConvBlock(64, 64, 3, 1, 1, 64, True)
        blocks, width = [], 64
        for expansion, out, repeats, stride in _BOTTLENECKS:
            for i in range(repeats):
                blocks.append(_Bottleneck(width, out, stride if i == 0 else 1, expansion))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = _ConvBlock(128, 512, 1, 1, 0, 1, True)
        self.linear7 = _ConvBlock(512, 512, (7, 6), 1, 0, 512, False)
        self.linear1 = _ConvBlock(512, 128, 1, 1, 0, 1, False)

    def forward(self, x: Tensor) -> Tensor:
        """Return unit embeddings."""
        x = self.blocks(self.dw_conv1(self.conv1(x)))
        return F.normalize(self.linear1(self.linear7(self.conv2(x))).flatten(1), dim=1)


def load_teacher(path: Path) -> MobileFaceNet:
    """Load the teacher, frozen, in evaluation mode."""
    net = MobileFaceNet()
    try:
        net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["net_state_dict"])
    except (pickle.UnpicklingError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no MobileFaceNet checkpoint; name the teacher's file") from error
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def embed(teacher: MobileFaceNet, pixels: np.ndarray, batch: int = 64) -> Tensor:
    """Embed uint8 faces [N, 112, 96, 3] that are aligned to `TEMPLATE_96X112`; returns float32 [N, 128]."""
    parts = []
    for start in range(0, len(pixels), batch):
        x = torch.from_numpy(np.ascontiguousarray(pixels[start : start + batch])).permute(0, 3, 1, 2)
        x = x.float().sub(127.5).div(128).contiguous(memory_format=torch.channels_last)
        parts.append(teacher(x))
    return torch.cat(parts)
