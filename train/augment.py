"""Augmentation: random changes of training faces that must not change what is learned of them."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_jitter(x: Tensor, shift_px: int = 4, colour: float = 0.2) -> Tensor:
    """Move, brighten and rescale the contrast of each picture differently; differentiable.

    The same kind of change is made to real and generated pictures, so the discriminator cannot learn the training
    set by heart, nor a reader the exact position of a pixel (Zhao et al., Differentiable Augmentation, NeurIPS 2020).
    """
    count, _, side, _ = x.shape
    padded = F.pad(x, [shift_px] * 4, mode="replicate")
    # One shift for each of eight groups: slices have a cheap gradient, a gather by index does not.
    shifts = torch.randint(0, 2 * shift_px + 1, (8, 2)).tolist()
    groups = zip(padded.tensor_split(8), shifts, strict=True)
    x = torch.cat([part[:, :, top : top + side, left : left + side] for part, (top, left) in groups])
    x = x.contiguous(memory_format=torch.channels_last)
    gain = 1 + colour * (torch.rand(count, 1, 1, 1, device=x.device) * 2 - 1)
    offset = torch.rand(count, 3, 1, 1, device=x.device) + torch.rand(count, 1, 1, 1, device=x.device) * 2 - 1.5
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * gain + mean + colour * offset


def zoom(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Turn (up to 10 degrees) and scale (up to 10 %) each face [N, S, S, 3] by an amount of its own."""
    centre = (pixels.shape[1] - 1) / 2
    made = []
    for face in pixels:
        angle, scale = random.uniform(-10, 10), random.uniform(0.9, 1.1)
        matrix = cv2.getRotationMatrix2D((centre, centre), angle, scale)
        made.append(cv2.warpAffine(face, matrix, face.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101))
    return np.stack(made)


def degrade(x: Tensor) -> Tensor:
    """Blur a quarter of the batch by halving it and back: generated faces are softer than photographs."""
    part = len(x) // 4
    soft = F.interpolate(F.avg_pool2d(x[:part], 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    return torch.cat([soft, x[part:]])


def soften(x: Tensor) -> Tensor:
    """Blur half of the batch, a quarter more: photographs come in every sharpness, which must not say an age."""
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bicubic", align_corners=False)
    part = len(x) // 4
    more = F.interpolate(F.avg_pool2d(x[:part], 3, 3), x.shape[2:], mode="bicubic", align_corners=False)
    return torch.cat([more, blurred[part : 2 * part], x[2 * part :]])
