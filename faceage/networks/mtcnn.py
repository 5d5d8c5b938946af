"""The three networks of MTCNN, with the weights that facenet-pytorch carries.

Each takes RGB pictures scaled to (x - 127.5) / 128 of 8-bit values, about [-1, 1], and gives box offsets
as fractions of the box side, and probabilities: P-Net's of a face, R- and O-Net's of [no face, a face].

Reference: Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", 2016, arXiv:1604.02878.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from faceage.checkpoint import load
from faceage.engines.base import BATCH, Axis, Program, TensorSpec
from faceage.engines.examples import example_faces

if TYPE_CHECKING:
    from torch import Tensor, nn

ARCH = "mtcnn"
CHECKPOINT = Path(__file__).parent.parent / "models" / f"{ARCH}.safetensors"
"""The bundled weights, in float32: `facenet_pytorch_weights`."""

PNET_CELL_PX = 12
"""Side of what P-Net sees of one position; its positions are `PNET_STRIDE_PX` apart."""
PNET_STRIDE_PX = 2
RNET_SIZE_PX = 24
ONET_SIZE_PX = 48

PNET_MIN_PX = 14
"""P-Net's least side. Sides are even, so that its pooling, which rounds up, has no partial window."""

PNET_MAX_PX = 16386
"""A pyramid's level has a pixel more than the frame at its scale, and one more to be even."""

COARSE_PNET_MIN_PX = 128
"""The least side of pictures for P-Net in half precision: what that loses is compared over many positions."""

_FRAMES = Axis("batch", typical=2, max=16)
_ROWS, _COLUMNS = Axis("rows"), Axis("columns")


def pnet_program(*, exact: bool = True) -> Program:
    """Return P-Net: pixels [B, 3, H, W], H and W even, to offsets [B, 4, h, w] and scores [B, 1, h, w].

    Args:
        exact: whether its proposals must be those of facenet-pytorch to the last one; else it takes no pictures that
            are smaller than `COARSE_PNET_MIN_PX`.
    """
    least = PNET_MIN_PX if exact else COARSE_PNET_MIN_PX
    height = Axis("height", min=least, typical=360, max=PNET_MAX_PX, multiple=2)
    width = Axis("width", min=least, typical=640, max=PNET_MAX_PX, multiple=2)
    return _program(
        "PNet",
        exact=exact,
        inputs=(TensorSpec("pixels", (_FRAMES, 3, height, width)),),
        outputs=(
            TensorSpec("offsets", (BATCH, 4, _ROWS, _COLUMNS)),
            TensorSpec("probability", (BATCH, 1, _ROWS, _COLUMNS)),
        ),
        example_shape=(5, 30, 42) if exact else (2, 180, 240),
    )


def rnet_program() -> Program:
    """Return R-Net: pixels [B, 3, 24, 24] to offsets [B, 4] and probabilities [B, 2]."""
    return _program(
        "RNet",
        inputs=(TensorSpec("pixels", (BATCH, 3, RNET_SIZE_PX, RNET_SIZE_PX)),),
        outputs=(TensorSpec("offsets", (BATCH, 4)), TensorSpec("probabilities", (BATCH, 2))),
        example_shape=(5, RNET_SIZE_PX, RNET_SIZE_PX),
    )


def onet_program() -> Program:
    """Return O-Net: pixels [B, 3, 48, 48] to offsets [B, 4], landmarks [B, 10] and probabilities [B, 2].

    The landmarks are fractions of the picture's side: five x, then five y, ordered as `geometry.LANDMARKS_5`.
    """
    return _program(
        "ONet",
        inputs=(TensorSpec("pixels", (BATCH, 3, ONET_SIZE_PX, ONET_SIZE_PX)),),
        outputs=(
            TensorSpec("offsets", (BATCH, 4)),
            TensorSpec("landmarks", (BATCH, 10)),
            TensorSpec("probabilities", (BATCH, 2)),
        ),
        example_shape=(5, ONET_SIZE_PX, ONET_SIZE_PX),
    )


def _program(
    network: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    example_shape: tuple[int, int, int],
    *,
    exact: bool = True,
) -> Program:
    def build(folded: bool) -> nn.Module:
        from facenet_pytorch.models import mtcnn

        from faceage.networks.pnet import FastPNet

        _, weights = load(CHECKPOINT, ARCH)
        prefix = f"{network.lower()}."
        mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if network == "PNet":
            return FastPNet(mine).eval()
        module = getattr(mtcnn, network)(pretrained=False)
        module.load_state_dict(mine)
        return module.eval().requires_grad_(False)

    name = f"mtcnn-{network.lower()}"
    return Program(
        name=name,
        graph=CHECKPOINT.with_name(f"{name}.onnx"),
        checkpoints=(CHECKPOINT,),
        network=build,
        examples=lambda: (example_faces(*example_shape),),
        inputs=inputs,
        outputs=outputs,
        exact=exact,  # which of many near boxes wins depends on the scores' last digits
    )


def facenet_pytorch_weights() -> dict[str, Tensor]:
    """Return the weights of the three networks that facenet-pytorch carries, P-Net's as `FastPNet` has them."""
    import facenet_pytorch
    import torch

    from faceage.networks.pnet import rewrite_pnet

    found: dict[str, Tensor] = {}
    for network in ("pnet", "rnet", "onet"):
        path = Path(facenet_pytorch.__file__).parent / "data" / f"{network}.pt"
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = rewrite_pnet(weights) if network == "pnet" else weights
        found |= {f"{network}.{name}": value for name, value in weights.items()}
    return found
