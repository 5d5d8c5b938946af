"""The programs that all models share, and what the programs of the agers' own modules are made with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from faceage.checkpoint import load, read_header
from faceage.engines.base import BATCH, Program, TensorSpec
from faceage.engines.examples import example_faces
from faceage.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

EXAMPLES = 5
"""Batch of the example inputs: unlike every other axis, see `networks.latent.gradient_network`."""


def reader_program(
    checkpoint: Path, size_px: int | None = None, make: Callable[[dict], nn.Module] | None = None
) -> Program:
    """Faces [F, 3, S, S] -> what the checkpoint's network reads off them: z, ages [F] or embeddings [F, D].

    Args:
        checkpoint: of an encoder, an age estimator, or an identity network.
        size_px: side of the faces, for FaceNet, which takes any; None: the network's own.
        make: see `load_network`; None: the checkpoint is an age estimator or an identity network.
    """
    header = read_header(checkpoint)
    size = size_px or header.dims["size_px"]
    width = None if header.arch == "age-estimator" else header.dims.get("latent") or header.dims["outputs"]
    name = header.arch if size_px in (None, header.dims["size_px"]) else f"{header.arch}-{size}"
    return Program(
        name=name,
        graph=graph_of(checkpoint, name),
        checkpoints=(checkpoint,),
        network=lambda folded: load_network(checkpoint, make or make_measuring(header.arch)),
        examples=lambda: (example_faces(EXAMPLES, size),),
        inputs=(TensorSpec("faces", (BATCH, 3, size, size)),),
        outputs=(TensorSpec("read", (BATCH,) if width is None else (BATCH, width)),),
        exact=True,
    )


def graph_of(checkpoint: Path, name: str) -> Path:
    """Return where the graph of a program of that name is: beside the checkpoint that has its weights."""
    return checkpoint.parent / f"{name}.onnx"


def load_network(checkpoint: Path, make: Callable[[dict], nn.Module]) -> nn.Module:
    """Load the network that a checkpoint holds, frozen, in eval mode.

    Args:
        checkpoint: its file.
        make: makes the network, with any weights, from the header's dims.

    Raises:
        CheckpointError: if the file holds other weights.
    """
    arch = read_header(checkpoint).arch
    header, weights = load(checkpoint, arch)
    network = make(header.dims)
    try:
        (network.net if arch == "facenet" else network).load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} holds other weights than this version's {arch} has; train it again, or update faceage"
        ) from error
    return network.eval().requires_grad_(False)


def make_measuring(arch: str) -> Callable[[dict], nn.Module]:
    """Return what makes the networks of the shared roles and FaceNet, for `load_network`."""
    from faceage.networks.facenet import FaceNet
    from faceage.networks.regressors import AgeEstimator, IdentityNet, TrunkDims

    makers: dict[str, Callable[[dict], nn.Module]] = {
        "age-estimator": lambda dims: AgeEstimator(TrunkDims(**dims)),
        "identity": lambda dims: IdentityNet(TrunkDims(**dims)),
        "facenet": lambda dims: FaceNet(dims["size_px"]),
    }
    return makers[arch]
