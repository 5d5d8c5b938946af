"""The cells of score maps that pass a threshold: of dense maps on a device, only what passes goes to the host.

For maps of several resolutions, with s the scores and v the values of a cell:

    {(map, n, row, column, s, v) : s[n, row, column] >= threshold}      in order of map, n, row, column

Bytes moved: the maps once, and to the host 8 + 4 C bytes a cell of the `AT_ONCE` best ones, 48 KB for the detector's
four values. A tensor's device is waited for once: how many cells pass is seen on the host. Where more do, all that pass
are fetched, with two more waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from faceage.kernels.transfer import to_host
from faceage.types import FloatArray, IntArray, Samples

if TYPE_CHECKING:
    import torch


AT_ONCE = 2048
"""A street full of people in 1080p has 1400 candidates, one face 150 to 260."""


class Candidates(NamedTuple):
    """The cells of one map that pass, K of them."""

    places: tuple[IntArray, ...]
    """n, row and column: int64 [K] each."""
    scores: FloatArray
    """float32 [K]."""
    values: FloatArray
    """float32 [K, C]."""


def select_candidates(scores: Sequence[Samples], values: Sequence[Samples], threshold: float) -> list[Candidates]:
    """Return the cells that pass, map by map.

    Args:
        scores: float32 [N, H, W] each.
        values: float32 [N, C, H, W] each.
        threshold: the lowest score that passes.
    """
    if isinstance(scores[0], np.ndarray):
        return [_select_cpu(s, v, threshold) for s, v in zip(scores, values, strict=True)]
    return _select_ref(scores, values, threshold)


def _select_cpu(scores: FloatArray, values: FloatArray, threshold: float) -> Candidates:
    n, row, column = np.nonzero(scores >= threshold)
    return Candidates((n, row, column), scores[n, row, column], values[n, :, row, column])


def _select_ref(scores: Sequence[torch.Tensor], values: Sequence[torch.Tensor], threshold: float) -> list[Candidates]:
    """Do the same with PyTorch, all maps at once."""
    import torch

    flat = torch.cat([s.flatten() for s in scores])
    cells = torch.cat([v.permute(0, 2, 3, 1).flatten(0, 2) for v in values])

    def fetch(places: torch.Tensor) -> tuple[IntArray, FloatArray]:
        """Return places, and scores and values [K, 1 + C] there, by ascending place."""
        # The bits of all as integers, so that they go in one piece.
        parts = [places[:, None].int(), flat[places][:, None].view(torch.int32), cells[places].view(torch.int32)]
        table = to_host(torch.cat(parts, 1))
        table = table[table[:, 0].argsort()]
        return table[:, 0].astype(np.int64), table[:, 1:].view(np.float32)

    passes = np.float32(threshold)
    places, table = fetch(flat.topk(min(AT_ONCE, len(flat)), sorted=False).indices)
    if len(table) < len(flat) and (table[:, 0] >= passes).all():
        places, table = fetch((flat >= threshold).nonzero()[:, 0])
    ends = np.cumsum([0] + [int(np.prod(s.shape)) for s in scores])
    found = []
    for first, last, s in zip(ends[:-1], ends[1:], scores, strict=True):
        rows = (first <= places) & (places < last) & (table[:, 0] >= passes)
        where = np.unravel_index(places[rows] - first, tuple(s.shape))
        found.append(Candidates(where, table[rows, 0], table[rows, 1:]))
    return found
