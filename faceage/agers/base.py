"""What the pipeline asks of a network that ages faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from faceage.types import FloatArray

Composite = Literal["delta", "replace"]


@dataclass(frozen=True, kw_only=True)
class AgedFaces:
    """What was made of a batch of aligned faces."""

    deltas: FloatArray
    """float32 [F, 3, S, S]: what to add to the crop, RGB in units of its [-1, 1] range; neither weighted nor cut to
    the blend mask."""
    latents: FloatArray
    """float32 [F, Z]: start the same faces' next call from these. Z is 0 where there are none."""
    identity: FloatArray
    """float32 [F], cosine in [-1, 1] between the crop's embedding and that of the crop plus its delta; NaN for faces
    that came with a latent, whose identity was measured when they came without."""


class Ager(Protocol):
    """Ages aligned faces. Calls are independent of one another and may come from several threads."""

    @property
    def sizes_px(self) -> tuple[int, ...]:
        """Sides of the aligned crops it takes, ascending; see `align.choose_size`."""

    def age(
        self,
        pixels: FloatArray,
        landmarks: FloatArray,
        source_age: FloatArray,
        target_age: FloatArray,
        latents: FloatArray | None = None,
    ) -> AgedFaces:
        """Age a batch of faces in crops of one size.

        Args:
            pixels: float32 [F, 3, S, S], RGB in [-1, 1], aligned; S is one of `sizes_px`. F may be 0.
            landmarks: float32 [F, 5, 2], the faces' own, in crop pixels: near the template's, but not on it.
            source_age: float32 [F], years.
            target_age: float32 [F], years.
            latents: what an earlier call gave for the same people, to start from; None for people seen first.
        """
