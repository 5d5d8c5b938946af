"""How much of an aged face goes back into its frame, and putting it there.

    frame' = frame + W^-1 (mask * weight * (aged - reference))

The mask is exactly 0 on the crop's rim, so nothing has an edge; samples outside it keep their bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from faceage.geometry import face_mask
from faceage.kernels import add_delta
from faceage.types import FloatArray, Frame


def blend_faces(
    frame: Frame,
    deltas: Sequence[FloatArray] | FloatArray,
    weights: Sequence[float] | FloatArray,
    frame_to_crop: Sequence[FloatArray] | FloatArray,
) -> None:
    """Add faces' deltas to a frame, in place.

    Args:
        frame: its planes must be writable.
        deltas: float32 [3, S, S] a face, RGB in units of [-1, 1], unmasked.
        weights: a face's share of its delta, in [0, 1].
        frame_to_crop: float32 [2, 3] a face.
    """
    for delta, weight, matrix in zip(deltas, weights, frame_to_crop, strict=True):
        if weight > 0:
            add_delta(frame, delta * (face_mask(delta.shape[-1]) * weight), matrix)
