"""Age-cGAN: encode, optimize the latent, generate at two ages, and take the difference.

Reference: Antipov, Baccouche, Dugelay: Face Aging with Conditional Generative Adversarial Networks, ICIP 2017,
arXiv:1702.01983.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from faceage.agers.base import Ages, Architecture, Composite, EngineOf, ModelFiles, read_view
from faceage.agers.latent import Fit, LatentConfig, optimize_latents
from faceage.agers.programs import EXAMPLES, graph_of, load_network, make_measuring, reader_program
from faceage.ages import age_to_classes
from faceage.checkpoint import read_array, read_header, sha256_of
from faceage.engines.base import BATCH, Engine, Program, TensorSpec
from faceage.engines.examples import example_faces
from faceage.errors import CheckpointError
from faceage.geometry import face_mask, skin_mask
from faceage.kernels import maps, to_host
from faceage.types import Appearance, Change, Crops, FloatArray, Frame, Samples, View

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class FittedFace:
    """A face at one key frame."""

    delta: FloatArray
    """float32 [3, S, S], its change, unmasked."""
    latent: FloatArray
    """float32 [Z], where the fit at the next key frame starts."""


class AgeCGAN:
    """The Age-cGAN ager (`base.Ager`) over its four engines."""

    needs_appearance = False
    warm_up_keys = 8
    """On a talking head the change steps at a cut by 0.38 without a warm-up, 0.29 after four key frames and 0.21 after
    eight (mean luma of the picture's 8 bits), and by up to 0.19 in any other frame: `LatentConfig.memory` would be
    forgotten sooner, but where a fit ends depends on where it starts."""

    def __init__(
        self,
        *,
        encoder: Engine,
        generator: Engine,
        latent: Engine,
        identity: Engine,
        view: View,
        root: FloatArray | None = None,
        config: LatentConfig | None = None,
        composite: Composite = "delta",
    ) -> None:
        """Use engines of this module's programs.

        Args:
            encoder: faces -> z.
            generator: (z, classes) -> faces.
            latent: the step of latent optimization, see `optimize_latents`.
            identity: faces -> embeddings.
            view: the crops, of one size.
            root: see `optimize_latents`; the encoder's checkpoint has it; None: the identity.
            config: how latents are optimized.
            composite: "delta" adds the difference of two generated faces, so that reconstruction errors cancel;
                "replace" pastes the generated face, as the paper shows it.
        """
        self._encoder, self._generator, self._latent, self._identity = encoder, generator, latent, identity
        self._root = root
        self.views = (view,)
        self.config = config or LatentConfig()
        self._composite = composite

    def fit(self, pixels: FloatArray, source_age: FloatArray, latents: FloatArray | None = None) -> Fit:
        """Find the latents that reconstruct faces at their source age.

        Args:
            pixels: float32 [F, 3, S, S], RGB in [-1, 1], aligned. F may be 0.
            source_age: float32 [F], years.
            latents: float32 [F, Z], where to start; None: the encoder says.
        """
        (embeddings,) = self._identity(pixels)
        config = self.config
        start = self._encoder(pixels)[0] if latents is None else latents
        budget = np.full(len(pixels), config.max_evaluations if latents is None else config.max_evaluations_known)
        root = np.eye(start.shape[1], dtype=np.float32) if self._root is None else self._root
        problem = age_to_classes(source_age), pixels, embeddings
        device = self._latent.device
        return optimize_latents(self._latent, start, problem, config, root=root, budget=budget, device=device)

    def look(
        self,
        appearances: Sequence[Appearance],
        source_age: FloatArray,
        target_age: FloatArray,
        home: Frame | Samples | None = None,
    ) -> list[Ages]:
        """Return the ages; see `base.Ager.look`."""
        return Ages.rows(source_age, target_age)

    def observe(
        self, looks: Sequence[Ages], crops: Sequence[Crops], previous: Sequence[FittedFace | None]
    ) -> list[FittedFace]:
        """Fit faces, those of known latents apart from the others; see `base.Ager.observe`.

        The landmarks play no part: at 64 pixels the template's are as good, and the generator was taught with those.
        """
        (faces,) = crops
        pixels = to_host(faces.pixels)
        source, target = Ages.columns(looks)
        keys: dict[int, FittedFace] = {}
        known = [face.latent for face in previous if face is not None]
        is_known = np.array([face is not None for face in previous], bool)
        for rows, latents in ((np.flatnonzero(~is_known), None), (np.flatnonzero(is_known), known)):
            if len(rows):
                z = None if latents is None else np.stack(latents)
                fitted = self._age(pixels[rows], source[rows], target[rows], z)
                keys |= zip(rows.tolist(), fitted, strict=True)
        return [keys[row] for row in range(len(faces))]

    def _age(
        self, pixels: FloatArray, source: FloatArray, target: FloatArray, latents: FloatArray | None
    ) -> list[FittedFace]:
        """Age faces [F, 3, S, S] from and to ages [F]; all have latents [F, Z] or none has."""
        z = self.fit(pixels, source, latents).latents
        if latents is not None:
            memory = np.float32(self.config.memory)
            z = memory * latents + (1 - memory) * z
        (aged,) = self._generator(z, age_to_classes(target))
        if self._composite == "delta":
            (reference,) = self._generator(z, age_to_classes(source))
            deltas = CHANGE_GAIN * _calm(aged - reference) * _contrast(pixels, reference)
        else:
            deltas = aged - pixels
        return [FittedFace(delta, latent) for delta, latent in zip(deltas, z, strict=True)]

    def draw(self, look: Ages, before: FittedFace, after: FittedFace, share: float) -> list[Change | None]:
        """Return the change inside the blend mask; see `base.Ager.draw`."""
        delta = before.delta if before is after else (1 - share) * before.delta + share * after.delta
        return [Change(delta=delta * maps.constant(face_mask, delta.shape[-1], like=delta))]


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


def _generator_network(checkpoint: Path) -> nn.Module:
    from faceage.networks.age_cgan import AgeCGANDims, Generator

    return load_network(checkpoint, lambda dims: Generator(AgeCGANDims(**dims)))


def _make_encoder(dims: dict) -> nn.Module:
    from faceage.networks.age_cgan import AgeCGANDims, Encoder

    return Encoder(AgeCGANDims(**dims))


def encoder_program(checkpoint: Path) -> Program:
    """Faces [F, 3, S, S] -> z [F, Z]."""
    return reader_program(checkpoint, make=_make_encoder)


def generator_program(checkpoint: Path) -> Program:
    """(z [F, Z], classes [F, K]) -> faces [F, 3, S, S]."""
    dims = read_header(checkpoint).dims
    size = dims["size_px"]

    def network(folded: bool) -> nn.Module:
        from faceage.networks.age_cgan import FoldedGenerator

        return FoldedGenerator(_generator_network(checkpoint), keep=folded).eval()

    def examples() -> tuple[FloatArray, ...]:
        z = np.random.default_rng(0).standard_normal((EXAMPLES, dims["latent"]), np.float32)
        return z, np.eye(dims["classes"], dtype=np.float32)[:EXAMPLES]

    return Program(
        name="age-cgan-generator",
        graph=graph_of(checkpoint, "age-cgan-generator"),
        checkpoints=(checkpoint,),
        network=network,
        examples=examples,
        inputs=(TensorSpec("z", (BATCH, dims["latent"])), TensorSpec("classes", (BATCH, dims["classes"]))),
        outputs=(TensorSpec("faces", (BATCH, 3, size, size)),),
    )


def latent_program(generator: Path, identity: Path, *, autograd: bool = False) -> Program:
    """One step of latent optimization: the state, the problem -> the next state; see `networks.latent.LatentStep`.

    Args:
        generator: its checkpoint.
        identity: the checkpoint of the identity network.
        autograd: let torch differentiate at run time, for an identity network with layers that the exported gradient
            does not know; only the torch backend runs that.
    """
    dims = read_header(generator).dims
    size, latent, width = dims["size_px"], dims["latent"], read_header(identity).dims["outputs"]

    def examples() -> tuple[FloatArray, ...]:
        random = np.random.default_rng(0)

        def normal(*shape: int) -> FloatArray:
            return random.standard_normal(shape, np.float32)

        embeddings = normal(EXAMPLES, width)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        # In the middle of an optimization, and one face has stopped.
        state = (
            np.float32(0.1) * normal(EXAMPLES, latent), np.full(EXAMPLES, 100, np.float32), normal(EXAMPLES, latent),
            normal(EXAMPLES, latent), np.full(EXAMPLES, 0.5, np.float32), np.arange(EXAMPLES, dtype=np.float32),
        )  # fmt: skip
        problem = (
            normal(EXAMPLES, latent), np.eye(dims["classes"], dtype=np.float32)[:EXAMPLES],
            example_faces(EXAMPLES, size), embeddings, np.array([1.0, 4.0, 0.02, 0.005], np.float32),
        )  # fmt: skip
        return *state, *problem, np.eye(latent, dtype=np.float32)

    def network(folded: bool) -> nn.Module:
        import torch

        from faceage.networks.age_cgan import FoldedGenerator
        from faceage.networks.latent import AutogradGradient, LatentObjective, LatentStep, gradient_network

        mask = torch.tensor(face_mask(size))
        who = load_network(identity, make_measuring(read_header(identity).arch))
        made = FoldedGenerator(_generator_network(generator), keep=folded)
        objective = LatentObjective(made, who, mask).eval()
        if autograd:
            return LatentStep(AutogradGradient(objective)).eval()
        start, classes, faces, embeddings, settings = map(torch.from_numpy, examples()[6:11])
        problem = (start, classes, faces, embeddings, settings[:3])
        return LatentStep(gradient_network(objective, problem, keep=folded)).eval()

    state = (
        TensorSpec("u", (BATCH, latent)),
        TensorSpec("loss", (BATCH,)),
        TensorSpec("gradient", (BATCH, latent)),
        TensorSpec("direction", (BATCH, latent)),
        TensorSpec("length", (BATCH,)),
        TensorSpec("left", (BATCH,)),
    )
    return Program(
        name="age-cgan-latent",
        graph=graph_of(generator, "age-cgan-latent"),
        checkpoints=(generator, identity),
        network=network,
        examples=examples,
        inputs=(
            *state,
            TensorSpec("start", (BATCH, latent)),
            TensorSpec("classes", (BATCH, dims["classes"])),
            TensorSpec("faces", (BATCH, 3, size, size)),
            TensorSpec("embeddings", (BATCH, width)),
            TensorSpec("settings", (4,)),
            TensorSpec("root", (latent, latent)),
        ),
        outputs=state,
    )


def _programs(files: ModelFiles, identity: Path) -> dict[str, Program]:
    return {
        "encoder": encoder_program(files.paths["encoder"]),
        "generator": generator_program(files.generator),
        # FaceNet's pooling and resizing have no exported gradient.
        "latent": latent_program(files.generator, identity, autograd=read_header(identity).arch == "facenet"),
    }


def _make(
    files: ModelFiles, engine: EngineOf, *, latent: LatentConfig | None = None, composite: Composite = "delta"
) -> AgeCGAN:
    return AgeCGAN(
        encoder=engine("encoder"),
        generator=engine("generator"),
        latent=engine("latent"),
        identity=engine("identity"),
        view=read_view(files.generator, (read_header(files.generator).dims["size_px"],)),
        root=read_array(files.paths["encoder"], "latent_root"),
        config=latent,
        composite=composite,
    )


def _check(paths: dict[str, Path]) -> None:
    generator = paths["generator"]
    if read_header(paths["encoder"]).parents.get("gan") not in (None, sha256_of(generator)):
        raise CheckpointError(f"the encoder was not trained for {generator}; name the generator it was trained for")


ARCHITECTURE = Architecture(
    name="age-cgan",
    roles={"generator": "age-cgan-generator", "encoder": "age-cgan-encoder"},
    programs=_programs,
    make=_make,
    options=("latent", "composite"),
    check=_check,
)
