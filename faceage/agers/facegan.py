"""FaceGAN: one pass of a U-Net draws the change, at the resolution that the face has in the picture.

Reference: Zoss et al.: Production-Ready Face Re-Aging for Visual Effects, SIGGRAPH Asia 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from faceage.agers.base import Ages, Architecture, EngineOf, ModelFiles, read_view
from faceage.agers.programs import EXAMPLES, graph_of, load_network
from faceage.checkpoint import read_header
from faceage.engines.base import Axis, Engine, Program, TensorSpec
from faceage.engines.examples import example_faces
from faceage.geometry import face_mask, skin_masks
from faceage.kernels import beside, maps
from faceage.types import Appearance, Change, Crops, FloatArray, Frame, Samples, View

if TYPE_CHECKING:
    from torch import nn

BATCH_PIXELS = 4 * 512**2
"""Pixels of one call of the U-Net at most: 64 faces of 128. It bounds the memory; a CPU gains nothing from more."""


class FaceGAN:
    """The FaceGAN ager (`base.Ager`) over its engines. Every face stands for itself: a key is its unmasked change."""

    needs_appearance = False
    warm_up_keys = 0

    def __init__(self, *, unet: Callable[[int], Engine], view: View) -> None:
        """Use engines of `unet_program`.

        Args:
            unet: returns the engine for one of the view's sizes, (faces, ages now, wanted ages) -> change. It is called
                once a size, when the first face of that size comes: building one takes seconds.
            view: the crops: a small face does not pay for a large one's resolution.
        """
        self._unet = cache(unet)
        self._loading = Lock()  # several threads may be the first to need a size
        self.views = (view,)

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
        self, looks: Sequence[Ages], crops: Sequence[Crops], previous: Sequence[Samples | None]
    ) -> list[Samples]:
        """Return the changes of faces, float32 [3, S, S] each, where the crops live; see `base.Ager.observe`."""
        (faces,) = crops
        source, target = Ages.columns(looks)
        size = faces.size_px
        with self._loading:
            unet = self._unet(size)
        keys: list[Samples] = []
        step = BATCH_PIXELS // size**2
        for start in range(0, len(faces), step):
            part = slice(start, start + step)
            now, wanted = (beside(faces.pixels, ages[part]) for ages in (source, target))
            (deltas,) = unet(faces.pixels[part], now, wanted)
            masks = skin_masks(faces.landmarks[part], size, deltas)  # eyeballs and teeth do not get older
            keys += list(deltas * masks[:, None])
        return keys

    def draw(self, look: Ages, before: Samples, after: Samples, share: float) -> list[Change | None]:
        """Return the change inside the blend mask; see `base.Ager.draw`."""
        delta = before if before is after else (1 - share) * before + share * after
        return [Change(delta=delta * maps.constant(face_mask, delta.shape[-1], like=delta))]


def _network(checkpoint: Path) -> nn.Module:
    from faceage.networks.facegan import FaceGANDims, UNet

    return load_network(checkpoint, lambda dims: UNet(FaceGANDims(**dims)))


def unet_program(checkpoint: Path, size_px: int) -> Program:
    """(faces [F, 3, S, S], ages now [F], wanted ages [F]) -> their change [F, 3, S, S], at one size S."""
    faces = BATCH_PIXELS // size_px**2
    batch = Axis("batch", typical=faces // 4, max=2 * faces)

    ages = np.linspace(10, 80, EXAMPLES, dtype=np.float32)
    name = f"facegan-{size_px}"
    return Program(
        name=name,
        graph=graph_of(checkpoint, name),
        checkpoints=(checkpoint,),
        network=lambda folded: _network(checkpoint),
        examples=lambda: (example_faces(EXAMPLES, size_px), ages, ages[::-1].copy()),
        inputs=(
            TensorSpec("faces", (batch, 3, size_px, size_px)),
            TensorSpec("now", (batch,)),
            TensorSpec("wanted", (batch,)),
        ),
        outputs=(TensorSpec("change", (batch, 3, size_px, size_px)),),
    )


def _programs(files: ModelFiles, identity: Path) -> dict[str, Program]:
    sizes = read_header(files.generator).dims["sizes_px"]
    return {f"unet-{size}": unet_program(files.generator, size) for size in sizes}


def _make(files: ModelFiles, engine: EngineOf) -> FaceGAN:
    view = read_view(files.generator, read_header(files.generator).dims["sizes_px"])
    return FaceGAN(unet=lambda size_px: engine(f"unet-{size_px}"), view=view)


ARCHITECTURE = Architecture(name="facegan", roles={"generator": "facegan"}, programs=_programs, make=_make)
