"""One picture that shows the same faces at several ages, labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from faceage.errors import NoFaceError
from faceage.kernels import gather_crops, to_host
from faceage.media.image import read_image
from faceage.media.planes import writable
from faceage.pipeline.photos import AgedPhoto, age_frames
from faceage.pipeline.request import AgeRequest, Networks
from faceage.types import Frame

CELL_PX = 224
_GAP_PX = 6
_HEADER_PX = 40
_CONTEXT = 0.25
"""How much of its surroundings a cell shows on each side of the aligned crop, in sides of it."""


def make_sheet(
    networks: Networks, source: Path, ages: Sequence[float], *, source_age: float | None = None, strength: float = 1.0
) -> np.ndarray:
    """Return a sheet: a row for each face, from left to right in the photo; the original, then each age.

    Args:
        networks: from `load_networks`.
        source: a photo.
        ages: target ages in years.
        source_age: everybody's present age in years; None: estimated.
        strength: as in `AgeRequest`.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        MediaError: if the photo cannot be read.
        NoFaceError: if it shows no face.
    """
    still = read_image(source)
    columns: list[list[np.ndarray]] = []
    aged: AgedPhoto | None = None
    for age in ages:
        frame = writable(still.frame)
        request = AgeRequest(age=age, source_age=source_age, strength=strength)
        (aged,) = age_frames(networks, [frame], request)
        if not len(aged.faces):
            raise NoFaceError(f"{source} shows no face of a size that faceage ages; try a smaller --min-face")
        columns.append(_cells(frame, aged))
    assert aged is not None  # the command line asks for one age at least
    columns.insert(0, _cells(still.frame, aged))
    order = np.argsort(aged.faces.boxes[:, 0])
    rows = [[column[i] for column in columns] for i in order]
    present = [f"now, about {aged.source_ages[i]:.0f}" for i in order]
    return _draw(rows, present, [f"{age:g}" for age in ages])


def _cells(frame: Frame, photo: AgedPhoto) -> list[np.ndarray]:
    """Return each face of a picture, upright and with some surroundings, uint8 RGB."""
    cells = []
    for frame_to_crop, size in zip(photo.frame_to_crop, photo.sizes_px, strict=True):
        scale = CELL_PX / (size * (1 + 2 * _CONTEXT))
        frame_to_cell = scale * frame_to_crop
        frame_to_cell[:, 2] += scale * size * _CONTEXT
        (pixels,) = to_host(gather_crops([frame], np.zeros(1, np.int64), frame_to_cell[None], CELL_PX))
        cells.append(((pixels + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0))
    return cells


def _draw(rows: list[list[np.ndarray]], present: list[str], ages: list[str]) -> np.ndarray:
    pitch = CELL_PX + _GAP_PX
    width, height = pitch * len(rows[0]) + _GAP_PX, _HEADER_PX + pitch * len(rows)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(22), ImageFont.load_default(15)
    for i, text in enumerate(["original", *ages]):
        draw.text((_GAP_PX + i * pitch + CELL_PX / 2, _HEADER_PX / 2), text, "black", font, anchor="mm")
    for j, row in enumerate(rows):
        for i, cell in enumerate(row):
            canvas.paste(Image.fromarray(cell), (_GAP_PX + i * pitch, _HEADER_PX + j * pitch))
        corner = (_GAP_PX + 6, _HEADER_PX + j * pitch + CELL_PX - 6)
        draw.text(corner, present[j], "white", small, anchor="ls", stroke_width=2, stroke_fill="black")
    return np.asarray(canvas)
