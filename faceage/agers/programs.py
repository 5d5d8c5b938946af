"""The programs of Age-cGAN and its two readers: what the engine store builds, each from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from faceage.checkpoint import load, read_header, sha256_of
from faceage.engines.base import BATCH, Program, TensorSpec, fingerprint, module_file
from faceage.geometry import face_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_EXAMPLES = 5
"""Batch of the example inputs: unlike every other axis, see `networks.latent.gradient_network`."""


def generator_program(checkpoint: Path) -> Program:
    """(z [F, Z], classes [F, K]) -> faces [F, 3, S, S]."""
    dims = read_header(checkpoint).dims
    size = dims["size_px"]

    def build() -> tuple:
        import torch

        return _network(checkpoint), (torch.randn(_EXAMPLES, dims["latent"]), torch.eye(dims["classes"])[:_EXAMPLES])

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

        return _network(checkpoint), (torch.rand(_EXAMPLES, 3, size, size) * 2 - 1,)

    return Program(
        name=header.arch,
        fingerprint=_fingerprint(checkpoint),
        build=build,
        inputs=(TensorSpec("faces", (BATCH, 3, size, size)),),
        outputs=(TensorSpec("read", (BATCH,) if width is None else (BATCH, width)),),
    )


def latent_program(generator: Path, identity: Path, *, autograd: bool = False) -> Program:
    """(z, classes, faces, embeddings, weights [3]) -> (loss [F], d loss / d z [F, Z]); see `networks.latent`.

    Args:
        generator: its checkpoint.
        identity: the checkpoint of the identity network.
        autograd: let torch differentiate at run time, for an identity network with layers that the exported gradient
            does not know; only the torch backend runs that.
    """
    dims = read_header(generator).dims
    size, width = dims["size_px"], read_header(identity).dims["outputs"]

    def build() -> tuple:
        import torch

        from faceage.networks.latent import AutogradGradient, LatentObjective, gradient_network

        mask = torch.tensor(face_mask(size))
        objective = LatentObjective(_network(generator), _network(identity), mask).eval()
        examples = (
            torch.randn(_EXAMPLES, dims["latent"]),
            torch.eye(dims["classes"])[:_EXAMPLES],
            torch.rand(_EXAMPLES, 3, size, size) * 2 - 1,
            torch.nn.functional.normalize(torch.randn(_EXAMPLES, width), dim=1),
            torch.tensor([1.0, 4.0, 0.02]),
        )
        return (AutogradGradient(objective) if autograd else gradient_network(objective, examples)), examples

    return Program(
        name="age-cgan-latent",
        fingerprint=fingerprint(_fingerprint(generator), _fingerprint(identity)),
        build=build,
        inputs=(
            TensorSpec("z", (BATCH, dims["latent"])),
            TensorSpec("classes", (BATCH, dims["classes"])),
            TensorSpec("faces", (BATCH, 3, size, size)),
            TensorSpec("embeddings", (BATCH, width)),
            TensorSpec("weights", (3,)),
        ),
        outputs=(TensorSpec("loss", (BATCH,)), TensorSpec("gradient", (BATCH, dims["latent"]))),
    )


def _fingerprint(checkpoint: Path) -> str:
    sources = [module_file(f"faceage.networks.{name}") for name in ("age_cgan", "facenet", "latent", "regressors")]
    return fingerprint(sha256_of(checkpoint), *sources, module_file("faceage.geometry"))


def _network(checkpoint: Path) -> nn.Module:
    """Load the network that a checkpoint holds, frozen, in eval mode."""
    from faceage.networks.age_cgan import AgeCGANDims, Encoder, Generator
    from faceage.networks.facenet import FaceNet
    from faceage.networks.regressors import AgeEstimator, IdentityNet, TrunkDims

    makers: dict[str, Callable[[dict], nn.Module]] = {
        "age-cgan-generator": lambda dims: Generator(AgeCGANDims(**dims)),
        "age-cgan-encoder": lambda dims: Encoder(AgeCGANDims(**dims)),
        "age-estimator": lambda dims: AgeEstimator(TrunkDims(**dims)),
        "identity": lambda dims: IdentityNet(TrunkDims(**dims)),
        "facenet": lambda dims: FaceNet(dims["size_px"]),
    }
    arch = read_header(checkpoint).arch
    header, weights = load(checkpoint, arch)
    network = makers[arch](header.dims)
    (network.net if arch == "facenet" else network).load_state_dict(weights)
    return network.eval().requires_grad_(False)
