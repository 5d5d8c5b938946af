"""Upright views of pictures that are stored turned, as phones do."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from faceage.types import PIXEL_LAYOUTS, Frame

log = logging.getLogger(__name__)


def upright(frame: Frame, rotation: int) -> Frame:
    """Return a frame as a player shows it: the same samples, seen through turned views.

    Args:
        frame: as stored.
        rotation: degrees counter-clockwise that a player turns it by. Only quarter turns are views; by anything else,
            and for 4:1:1, which has no turned format, the frame is returned as it is.

    Returns:
        A frame over the same memory. Its chroma siting is called "center": turned, the others have no name, and the
        difference is half a luma sample.
    """
    layout = frame.layout
    turns = round(rotation / 90) % 4
    if turns == 0 or rotation % 90:
        return frame
    pixel_format: str | None = frame.pixel_format
    if turns % 2 and any(p.sub_x != p.sub_y for p in layout.planes):
        turned = replace(layout, planes=tuple(replace(p, sub_x=p.sub_y, sub_y=p.sub_x) for p in layout.planes))
        pixel_format = next((name for name, other in PIXEL_LAYOUTS.items() if other == turned), None)
    if pixel_format is None:
        return frame
    planes = tuple(np.rot90(plane, turns) for plane in frame.planes)
    return replace(frame, planes=planes, pixel_format=pixel_format, color=replace(frame.color, chroma_siting="center"))
