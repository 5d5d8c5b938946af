"""Age-cGAN: encode, optimize the latent, generate at two ages, and take the difference.

Reference: Antipov, Baccouche, Dugelay: Face Aging with Conditional Generative Adversarial Networks, ICIP 2017,
arXiv:1702.01983.
"""

from __future__ import annotations

import cv2
import numpy as np

from faceage.agers.base import AgedFaces, Composite
from faceage.agers.latent import Fit, LatentConfig, optimize_latents
from faceage.ages import age_to_classes
from faceage.engines.base import Engine
from faceage.geometry import face_mask, skin_mask
from faceage.types import FloatArray


class AgeCGAN:
    """The Age-cGAN ager (`base.Ager`) over its four engines."""

    def __init__(
        self,
        *,
        encoder: Engine,
        generator: Engine,
        latent: Engine,
        identity: Engine,
        root: FloatArray | None = None,
        size_px: int = 64,
        config: LatentConfig | None = None,
        composite: Composite = "delta",
    ) -> None:
        """Use engines of `agers.programs`.

        Args:
            encoder: faces -> z.
            generator: (z, classes) -> faces.
            latent: the step of latent optimization, see `optimize_latents`.
            identity: faces -> embeddings.
            root: see `optimize_latents`; the encoder's checkpoint has it; None: the identity.
            size_px: side of the faces.
            config: how latents are optimized.
            composite: "delta" adds the difference of two generated faces, so that reconstruction errors cancel;
                "replace" pastes the generated face, as the paper shows it.
        """
        self._encoder, self._generator, self._latent, self._identity = encoder, generator, latent, identity
        self._root = root
        self._size_px = size_px
        self.config = config or LatentConfig()
        self._composite = composite

    @property
    def sizes_px(self) -> tuple[int, ...]:
        """Side of the aligned crops it takes: one."""
        return (self._size_px,)

    def fit(self, pixels: FloatArray, source_age: FloatArray, latents: FloatArray | None = None) -> Fit:
        """Find the latents that reconstruct faces at their source age; arguments as `age`."""
        (embeddings,) = self._identity(pixels)
        return self._fit(pixels, embeddings, source_age, latents)

    def _fit(
        self, pixels: FloatArray, embeddings: FloatArray, source_age: FloatArray, latents: FloatArray | None
    ) -> Fit:
        config = self.config
        start = self._encoder(pixels)[0] if latents is None else latents
        budget = np.full(len(pixels), config.max_evaluations if latents is None else config.max_evaluations_known)
        root = np.eye(start.shape[1], dtype=np.float32) if self._root is None else self._root
        problem = age_to_classes(source_age), pixels, embeddings
        return optimize_latents(self._latent, start, problem, config, root=root, budget=budget)

    def age(
        self,
        pixels: FloatArray,
        landmarks: FloatArray,
        source_age: FloatArray,
        target_age: FloatArray,
        latents: FloatArray | None = None,
    ) -> AgedFaces:
        """Age a batch of faces; see `base.Ager.age`.

        The landmarks play no part: at 64 pixels the template's are as good, and the generator was taught with those.
        """
        (embeddings,) = self._identity(pixels)
        z = self._fit(pixels, embeddings, source_age, latents).latents
        if latents is not None:
            memory = np.float32(self.config.memory)
            z = memory * latents + (1 - memory) * z
        (aged,) = self._generator(z, age_to_classes(target_age))
        if self._composite == "delta":
            (reference,) = self._generator(z, age_to_classes(source_age))
            deltas = CHANGE_GAIN * _calm(aged - reference) * _contrast(pixels, reference)
        else:
            deltas = aged - pixels
        identity = np.full(len(pixels), np.nan, np.float32)
        if latents is None:
            (after,) = self._identity(np.clip(pixels + deltas, -1, 1))
            identity = (embeddings * after).sum(1)
        return AgedFaces(deltas=deltas, latents=z, identity=identity)


CHANGE_GAIN = np.float32(1.2)
"""What the change is multiplied by: estimators that err toward the middle ages leave it too small. Chosen on training
faces that the judge of `train.evaluate` had not seen: judged ages are off by 10.0 years in the mean at 1, by 8.4 at
1.2, by 7.8 at 1.3. Even more would score better still, but at 1.7 the oldest faces look bruised."""
CHROMA_SHARE = 0.1
"""Share of the generator's change of colour that is kept. Its luma is what ages a face, its chroma is mostly blotches:
with more, skin turns red or pale, and eyes and teeth take the colour of the skin."""
CHROMA_BLUR = 0.05
"""Standard deviation of the blur of that change, in sides of the crop."""
FEATURE_SHARE = 0.35
"""Share of the change that is kept on eyeballs and teeth: 64 pixels draw them badly."""


def _calm(deltas: FloatArray) -> FloatArray:
    """Keep of RGB differences [F, 3, S, S] what is age: little colour, no exposure, little on eyeballs and teeth.

    Old and young faces were not photographed in the same light: without its mean, the change makes no skin lighter.
    """
    size = deltas.shape[-1]
    mask = face_mask(size)
    luma = np.einsum("fchw,c->fhw", deltas, LUMA)
    chroma = deltas - luma[:, None]
    luma = (luma - (np.einsum("fhw,hw->f", luma, mask) / mask.sum())[:, None, None])[:, None]
    for face in chroma:
        for channel in face:
            cv2.GaussianBlur(channel, (0, 0), CHROMA_BLUR * size, dst=channel, borderType=cv2.BORDER_REPLICATE)
    return (luma + np.float32(CHROMA_SHARE) * chroma) * feature_shares(size)


def _contrast(pixels: FloatArray, reference: FloatArray) -> FloatArray:
    """Return how much weaker the contrast of faces [F, 3, S, S] is than that of their reconstructions, at most 1.

    The generator has hardly seen faces in the dark or in fog: it makes them brighter, and their change too strong.

    Returns:
        float32 [F, 1, 1, 1].
    """
    inside = face_mask(pixels.shape[-1]) > 0.5
    ours, theirs = (np.einsum("fchw,c->fhw", faces, LUMA)[:, inside].std(1) for faces in (pixels, reference))
    return np.minimum(1, ours / np.maximum(theirs, 1e-6)).astype(np.float32)[:, None, None, None]


def feature_shares(size_px: int) -> FloatArray:
    """Return the share of the change that is kept in each pixel of a crop: float32 [size_px, size_px]."""
    return np.float32(FEATURE_SHARE) + np.float32(1 - FEATURE_SHARE) * skin_mask(size_px)


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Rec. 601 weights: which standard's hardly matters to what is weakened here."""
