"""Upright views of pictures that are stored turned, as phones do."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from faceage.types import Frame

log = logging.getLogger(__name__)


def upright(frame: Frame, rotation: int) -> Frame:
    """Return a frame as a player shows it: the same samples, seen through turned views.

    Args:
        frame: as stored.
        rotation: degrees counter-clockwise that a player turns it by. Only quarter turns are views; by anything else,
            and for 4:2:2, whose chroma would change its shape, the frame is returned as it is.

    Returns:
        A frame over the same memory. Its chroma siting is called "center": turned, the others have no name, and the
        difference is half a luma sample.
    """
    layout = frame.layout
    turns = round(rotation / 90) % 4
    if turns == 0 or rotation % 90 or any(p.sub_x != p.sub_y for p in layout.planes):
        return frame
    planes = tuple(np.rot90(plane, turns) for plane in frame.planes)
    return replace(frame, planes=planes, color=replace(frame.color, chroma_siting="center"))
