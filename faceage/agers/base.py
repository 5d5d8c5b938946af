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
    """float32 [F, 3, S, S]: what to add to the crop, RGB in units of its [-1, 1] range; neither masked nor weighted."""
    latents: FloatArray
    """float32 [F, Z]: start the same faces' next call from these. Z may be 0."""
    identity: FloatArray
    """float32 [F], cosine in [-1, 1] between the crop's embedding and that of the crop plus its delta; NaN for faces
    that came with a latent, whose identity was measured when they came without."""


class Ager(Protocol):
    """Ages aligned faces. Calls are independent of one another and may come from several threads."""

    @property
    def size_px(self) -> int:
        """Side of the aligned crops it takes."""

    def age(
        self, pixels: FloatArray, source_age: FloatArray, target_age: FloatArray, latents: FloatArray | None = None
    ) -> AgedFaces:
        """Age a batch of faces.

        Args:
            pixels: float32 [F, 3, S, S], RGB in [-1, 1], aligned. F may be 0.
            source_age: float32 [F], years.
            target_age: float32 [F], years.
            latents: what an earlier call gave for the same people, to start from; NaN in rows that have none.
        """
