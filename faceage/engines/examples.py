"""Real faces on which engines are compared with torch. Nothing is downloaded for it: one portrait is bundled.

`portrait.png` is the face of Eileen Collins from NASA's official portrait (public domain; scikit-image's
`data.astronaut`), aligned by this package to 128 pixels.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from faceage.types import FloatArray

_PORTRAIT = Path(__file__).parent / "portrait.png"
_LIGHTS = ((1.0, 0.0), (0.6, -0.1), (1.1, 0.1), (0.8, 0.0), (0.4, 0.2))
"""Contrast and brightness of one face after the other."""


def example_faces(count: int, height_px: int, width_px: int | None = None) -> FloatArray:
    """Return pictures of a real face in different light, every second one mirrored.

    Args:
        count: how many.
        height_px: their height.
        width_px: their width; None: the height.

    Returns:
        float32 [count, 3, H, W], RGB in [-1, 1].
    """
    portrait = cv2.cvtColor(cv2.imread(str(_PORTRAIT)), cv2.COLOR_BGR2RGB)
    small = cv2.resize(portrait, (width_px or height_px, height_px), interpolation=cv2.INTER_AREA)
    face = (small.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)
    pictures = np.empty((count, *face.shape), np.float32)
    for i in range(count):
        contrast, brightness = _LIGHTS[i % len(_LIGHTS)]
        pictures[i] = (face[..., ::-1] if i % 2 else face) * contrast + brightness
    return np.clip(pictures, -1, 1)
