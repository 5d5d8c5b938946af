"""How much of an aged face goes back into its frame, and putting it there.

    frame' = change of W^-1 (weight * gain, weight * delta)        see kernels.apply_change

A change is exactly 0 on the crop's rim, so nothing has an edge; samples outside the crop keep their bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from faceage.kernels import apply_change
from faceage.types import Change, FloatArray, Frame


def blend_faces(
    frame: Frame,
    changes: Sequence[Change | None],
    weights: Sequence[float] | FloatArray,
    frame_to_crop: Sequence[FloatArray] | FloatArray,
) -> None:
    """Apply changes to a frame, in place and in order: where two overlap, the second changes what the first gave.

    Args:
        frame: its planes must be writable.
        changes: one a face and view, masked; None changes nothing.
        weights: the share of each change, in [0, 1].
        frame_to_crop: float32 [2, 3] a change.
    """
    for change, weight, matrix in zip(changes, weights, frame_to_crop, strict=True):
        if change is not None and weight > 0:
            apply_change(frame, change, matrix, float(weight))
