"""FaceGAN: one pass of a U-Net draws the change, at the resolution that the face has in the picture.

Reference: Zoss et al.: Production-Ready Face Re-Aging for Visual Effects, SIGGRAPH Asia 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock

import numpy as np

from faceage.agers.base import AgedFaces
from faceage.engines.base import Engine
from faceage.geometry import skin_masks
from faceage.types import FloatArray

BATCH_PIXELS = 4 * 512**2
"""Pixels of one call of the U-Net at most: 64 faces of 128. It bounds the memory; a CPU gains nothing from more."""


class FaceGAN:
    """The FaceGAN ager (`base.Ager`) over its engines. It has no latents: every call stands for itself."""

    def __init__(
        self, *, unet: Callable[[int], Engine], sizes_px: Sequence[int], identity: Engine, identity_px: int
    ) -> None:
        """Use engines of `agers.programs`.

        Args:
            unet: returns the engine for one of the sizes, (faces, ages now, wanted ages) -> change. It is called once
                a size, when the first face of that size comes: building one takes seconds.
            sizes_px: sides of the crops, ascending: a small face does not pay for a large one's resolution.
            identity: faces -> embeddings.
            identity_px: side of the faces that `identity` takes; it divides all the sizes.
        """
        self._unet = cache(unet)
        self._sizes_px = tuple(sizes_px)
        self._loading = Lock()  # several threads may be the first to need a size
        self._identity, self._identity_px = identity, identity_px

    @property
    def sizes_px(self) -> tuple[int, ...]:
        """Sides of the aligned crops it takes, ascending."""
        return self._sizes_px

    def age(
        self,
        pixels: FloatArray,
        landmarks: FloatArray,
        source_age: FloatArray,
        target_age: FloatArray,
        latents: FloatArray | None = None,
    ) -> AgedFaces:
        """Age a batch of faces; see `base.Ager.age`."""
        size = pixels.shape[-1]
        with self._loading:
            unet = self._unet(size)
        deltas = np.empty_like(pixels)
        step = BATCH_PIXELS // size**2
        for start in range(0, len(pixels), step):
            part = slice(start, start + step)
            (deltas[part],) = unet(pixels[part], source_age[part], target_age[part])
        deltas *= skin_masks(landmarks, size)[:, None]  # eyeballs and teeth do not get older
        identity = np.full(len(pixels), np.nan, np.float32)
        if latents is None:
            before, after = (self._embed(faces) for faces in (pixels, np.clip(pixels + deltas, -1, 1)))
            identity = (before * after).sum(1)
        return AgedFaces(deltas=deltas, latents=np.empty((len(pixels), 0), np.float32), identity=identity)

    def _embed(self, pixels: FloatArray) -> FloatArray:
        """Return the embeddings of faces, shrunk by area to what the identity network takes."""
        side = self._identity_px
        times = pixels.shape[-1] // side
        (embeddings,) = self._identity(pixels.reshape(-1, 3, side, times, side, times).mean((3, 5)))
        return embeddings
