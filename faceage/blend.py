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
    *,
    following: Sequence[Change | None] | None = None,
    share: float = 0.0,
) -> None:
    """Apply changes to a frame, in place and in order: where two overlap, the second changes what the first gave.

    Args:
        frame: its planes must be writable.
        changes: one a face and view, masked; None changes nothing.
        weights: the share of each change, in [0, 1].
        frame_to_crop: float32 [2, 3] a change.
        following: what each change turns into; None: they stay as they are.
        share: of those in the mixture, in [0, 1].
    """
    if following is None:
        following = [None] * len(changes)
    for change, other, weight, matrix in zip(changes, following, weights, frame_to_crop, strict=True):
        if weight <= 0:
            continue
        if change is None and other is not None:
            apply_change(frame, other, matrix, float(weight) * share)
        elif change is not None:
            apply_change(frame, change, matrix, float(weight), following=other, share=share)
