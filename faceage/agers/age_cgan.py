"""Age-cGAN: encode, optimize the latent, generate at two ages, and take the difference.

Reference: Antipov, Baccouche, Dugelay: Face Aging with Conditional Generative Adversarial Networks, ICIP 2017,
arXiv:1702.01983.
"""

from __future__ import annotations

import numpy as np

from faceage.agers.base import AgedFaces, Composite
from faceage.agers.latent import Fit, LatentConfig, optimize_latents
from faceage.ages import age_to_classes
from faceage.engines.base import Engine
from faceage.types import FloatArray, IntArray


class AgeCGAN:
    """The Age-cGAN ager (`base.Ager`) over its four engines."""

    def __init__(
        self,
        *,
        encoder: Engine,
        generator: Engine,
        latent: Engine,
        identity: Engine,
        size_px: int = 64,
        config: LatentConfig | None = None,
        composite: Composite = "delta",
    ) -> None:
        """Use engines of `agers.programs`.

        Args:
            encoder: faces -> z.
            generator: (z, classes) -> faces.
            latent: (z, classes, faces, embeddings, weights) -> (loss, gradient).
            identity: faces -> embeddings.
            size_px: side of the faces.
            config: how latents are optimized.
            composite: "delta" adds the difference of two generated faces, so that reconstruction errors cancel;
                "replace" pastes the generated face, as the paper shows it.
        """
        self._encoder, self._generator, self._latent, self._identity = encoder, generator, latent, identity
        self._size_px = size_px
        self.config = config or LatentConfig()
        self._composite = composite

    @property
    def size_px(self) -> int:
        """Side of the aligned crops it takes."""
        return self._size_px

    def fit(self, pixels: FloatArray, source_age: FloatArray, latents: FloatArray | None = None) -> Fit:
        """Find the latents that reconstruct faces at their source age; arguments as `age`."""
        (encoded,) = self._encoder(pixels)
        (embeddings,) = self._identity(pixels)
        classes = age_to_classes(source_age)
        config = self.config
        weights = np.array([config.identity_weight, config.pixel_weight, config.prior_weight], np.float32)

        def objective(z: FloatArray, rows: IntArray) -> tuple[FloatArray, FloatArray]:
            loss, gradient = self._latent(z, classes[rows], pixels[rows], embeddings[rows], weights)
            return loss, gradient

        known = np.zeros(len(pixels), bool) if latents is None else ~np.any(np.isnan(latents), axis=1)
        start = encoded if latents is None else np.where(known[:, None], latents, encoded).astype(np.float32)
        budget = np.where(known, config.max_evaluations_known, config.max_evaluations)
        return optimize_latents(objective, start, config, budget)

    def age(
        self, pixels: FloatArray, source_age: FloatArray, target_age: FloatArray, latents: FloatArray | None = None
    ) -> AgedFaces:
        """Age a batch of faces; see `base.Ager.age`."""
        z = self.fit(pixels, source_age, latents).latents
        if latents is not None:
            kept = np.where(np.isnan(latents), z, latents)
            z = self.config.memory * kept + (1 - self.config.memory) * z
        (aged,) = self._generator(z, age_to_classes(target_age))
        if self._composite == "delta":
            (reference,) = self._generator(z, age_to_classes(source_age))
        else:
            reference = pixels
        deltas = aged - reference
        (before,) = self._identity(pixels)
        (after,) = self._identity(np.clip(pixels + deltas, -1, 1))
        return AgedFaces(deltas=deltas, latents=z, identity=(before * after).sum(1))
