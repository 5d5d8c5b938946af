"""FaceNet behind the interface of the compact identity network.

Reference: Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, arXiv:1503.03832; the network is facenet-pytorch's
InceptionResnetV1, trained on VGGFace2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FaceNet(nn.Module):
    """face -> unit embedding [N, 512]. Takes aligned crops of any side and enlarges them to its own 160 pixels."""

    def __init__(self, size_px: int = 160) -> None:
        super().__init__()
        from facenet_pytorch import InceptionResnetV1

        self.size_px = size_px
        self.net = InceptionResnetV1(classify=False)

    def forward(self, x_N3SS: Tensor) -> Tensor:
        """Return embeddings [N, 512] of length 1."""
        x = F.interpolate(x_N3SS, size=(self.size_px, self.size_px), mode="bilinear", align_corners=False)
        return self.net(x)
