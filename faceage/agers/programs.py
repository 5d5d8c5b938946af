"""The programs of the models: what the engine store builds, each from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from faceage.agers.facegan import BATCH_PIXELS
from faceage.checkpoint import load, read_header, sha256_of
from faceage.engines.base import BATCH, Axis, Program, TensorSpec, fingerprint, module_file
from faceage.engines.examples import example_faces
from faceage.errors import CheckpointError
from faceage.geometry import face_mask
from faceage.models import ModelFiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_EXAMPLES = 5
"""Batch of the example inputs: unlike every other axis, see `networks.latent.gradient_network`."""


def model_programs(files: ModelFiles, identity: Path | None = None) -> dict[str, Program]:
    """Return all programs of a model, the detector's aside, by what they are to its ager.

    Args:
        files: its checkpoints.
        identity: the checkpoint of another identity network than the model's own: FaceNet's.
    """
    who = identity or files.identity
    if files.architecture == "facegan":
        size_px = read_header(files.identity).dims["size_px"]
        own = {
            f"unet-{size}": unet_program(files.generator, size)
            for size in read_header(files.generator).dims["sizes_px"]
        }
    else:
        size_px = read_header(files.generator).dims["size_px"]
        own = {
            "encoder": reader_program(files.encoder, size_px),
            "generator": generator_program(files.generator),
            # FaceNet's pooling and resizing have no exported gradient.
            "latent": latent_program(files.generator, who, autograd=read_header(who).arch == "facenet"),
        }
    return own | {"identity": reader_program(who, size_px), "age": reader_program(files.age)}


def unet_program(checkpoint: Path, size_px: int) -> Program:
    """(faces [F, 3, S, S], ages now [F], wanted ages [F]) -> their change [F, 3, S, S], at one size S."""
    faces = BATCH_PIXELS // size_px**2
    batch = Axis("batch", typical=faces // 4, max=2 * faces)

    def build() -> tuple:
        import torch

        ages = torch.linspace(10, 80, _EXAMPLES)
        return _network(checkpoint), (torch.from_numpy(example_faces(_EXAMPLES, size_px)), ages, ages.flip(0))

    return Program(
        name=f"facegan-{size_px}",
        fingerprint=fingerprint(
            sha256_of(checkpoint), module_file("faceage.networks.facegan"), module_file("faceage.geometry")
        ),
        build=build,
        inputs=(
            TensorSpec("faces", (batch, 3, size_px, size_px)),
            TensorSpec("now", (batch,)),
            TensorSpec("wanted", (batch,)),
        ),
        outputs=(TensorSpec("change", (batch, 3, size_px, size_px)),),
    )


def generator_program(checkpoint: Path) -> Program:
    """(z [F, Z], classes [F, K]) -> faces [F, 3, S, S]."""
    dims = read_header(checkpoint).dims
    size = dims["size_px"]

    def build() -> tuple:
        import torch

        from faceage.networks.age_cgan import FoldedGenerator

        z = torch.randn(_EXAMPLES, dims["latent"], generator=torch.Generator().manual_seed(0))
        return FoldedGenerator(_network(checkpoint)).eval(), (z, torch.eye(dims["classes"])[:_EXAMPLES])

    return Program(
        name="age-cgan-generator",
        fingerprint=_fingerprint(checkpoint),
        build=build,
        inputs=(TensorSpec("z", (BATCH, dims["latent"])), TensorSpec("classes", (BATCH, dims["classes"]))),
        outputs=(TensorSpec("faces", (BATCH, 3, size, size)),),
    )


def reader_program(checkpoint: Path, size_px: int | None = None) -> Program:
    """Faces [F, 3, S, S] -> what the checkpoint's network reads off them: z, ages [F] or embeddings [F, D].

    Args:
        checkpoint: of an encoder, an age estimator, or an identity network.
        size_px: side of the faces, for FaceNet, which takes any; None: the network's own.
    """
    header = read_header(checkpoint)
    size = size_px or header.dims["size_px"]
    width = None if header.arch == "age-estimator" else header.dims.get("latent") or header.dims["outputs"]

    def build() -> tuple:
        import torch

        return _network(checkpoint), (torch.from_numpy(example_faces(_EXAMPLES, size)),)

    return Program(
        name=header.arch,
        fingerprint=_fingerprint(checkpoint),
        build=build,
        inputs=(TensorSpec("faces", (BATCH, 3, size, size)),),
        outputs=(TensorSpec("read", (BATCH,) if width is None else (BATCH, width)),),
        exact=True,
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

    def build() -> tuple:
        import torch

        from faceage.networks.age_cgan import FoldedGenerator
        from faceage.networks.latent import AutogradGradient, LatentObjective, LatentStep, gradient_network

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=seeded)

        seeded = torch.Generator().manual_seed(0)
        mask = torch.tensor(face_mask(size))
        objective = LatentObjective(FoldedGenerator(_network(generator)), _network(identity), mask).eval()
        problem = (
            random(_EXAMPLES, latent),
            torch.eye(dims["classes"])[:_EXAMPLES],
            torch.from_numpy(example_faces(_EXAMPLES, size)),
            torch.nn.functional.normalize(random(_EXAMPLES, width), dim=1),
            torch.tensor([1.0, 4.0, 0.02, 0.005]),
        )
        examples = (*problem[:4], problem[4][:3])
        gradient = AutogradGradient(objective) if autograd else gradient_network(objective, examples)
        # In the middle of an optimization, and one face has stopped.
        state = (
            0.1 * random(_EXAMPLES, latent), torch.full((_EXAMPLES,), 100.0), random(_EXAMPLES, latent),
            random(_EXAMPLES, latent), torch.full((_EXAMPLES,), 0.5), torch.arange(_EXAMPLES).float(),
        )  # fmt: skip
        return LatentStep(gradient).eval(), (*state, *problem, torch.eye(latent))

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
        fingerprint=fingerprint(_fingerprint(generator), _fingerprint(identity)),
        build=build,
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


def _fingerprint(checkpoint: Path) -> str:
    sources = [module_file(f"faceage.networks.{name}") for name in ("age_cgan", "facenet", "latent", "regressors")]
    return fingerprint(sha256_of(checkpoint), *sources, module_file("faceage.geometry"))


def _network(checkpoint: Path) -> nn.Module:
    """Load the network that a checkpoint holds, frozen, in eval mode."""
    from faceage.networks.age_cgan import AgeCGANDims, Encoder, Generator
    from faceage.networks.facegan import FaceGANDims, UNet
    from faceage.networks.facenet import FaceNet
    from faceage.networks.regressors import AgeEstimator, IdentityNet, TrunkDims

    makers: dict[str, Callable[[dict], nn.Module]] = {
        "age-cgan-generator": lambda dims: Generator(AgeCGANDims(**dims)),
        "age-cgan-encoder": lambda dims: Encoder(AgeCGANDims(**dims)),
        "facegan": lambda dims: UNet(FaceGANDims(**dims)),
        "age-estimator": lambda dims: AgeEstimator(TrunkDims(**dims)),
        "identity": lambda dims: IdentityNet(TrunkDims(**dims)),
        "facenet": lambda dims: FaceNet(dims["size_px"]),
    }
    arch = read_header(checkpoint).arch
    header, weights = load(checkpoint, arch)
    network = makers[arch](header.dims)
    try:
        (network.net if arch == "facenet" else network).load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} holds other weights than this version's {arch} has; train it again, or update faceage"
        ) from error
    return network.eval().requires_grad_(False)
