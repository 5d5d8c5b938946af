"""Shot cuts: find them, and cut a stream of frames into spans that never cross one.

A cut changes what is where (the correlation of two thumbnails falls) and how much is dark and light (their
histograms), and it does so much more than the frames before it did. A flash or a fade keeps the
correlation, a pan keeps the histogram and changes no faster than before; and after a flash the old picture
comes back, which a look ahead of a few frames sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np

from faceage.types import FloatArray, Frame, Plane

SUBSAMPLE = 8
"""Every n-th luma sample each way is looked at: 0.1 ms a 1080p frame."""
THUMBNAIL_PX = (48, 27)
"""Width and height of the thumbnail: small motions stay within one of its pixels."""
HISTOGRAM_BINS = 32
CORRELATION_NOISE = 3.0
"""Standard deviation, in 8-bit luma, below which structure is noise: black correlates with nothing."""
MIN_DECORRELATION = 0.35
"""1 - correlation of the thumbnails across a cut, at least."""
MIN_DIFFERENCE = 8.0
"""Mean absolute difference of the thumbnails across a cut, 8-bit luma, at least."""
MIN_HISTOGRAM_CHANGE = 0.08
"""Share of the samples that change their bin across a cut, at least."""
MIN_RATIO = 3.0
"""How many times more than on average before it the picture changes at a cut, at least."""
HISTORY = 8
"""Frames in that average."""
LOOK_AHEAD = 3
"""Frames after a cut whose last must differ from the frame before it too: shorter intermezzi are flashes."""


@dataclass(frozen=True)
class _Look:
    """What a frame looks like from afar."""

    thumbnail: FloatArray
    histogram: FloatArray


def _look(frame: Frame) -> _Look:
    luma = frame.planes[0][::SUBSAMPLE, ::SUBSAMPLE]
    if luma.ndim == 3:  # stills' packed RGB: green is nearest to luma
        luma = luma[..., 1]
    luma = cast(Plane, np.ascontiguousarray(luma))  # numpy's stubs join the union's dtypes to generic
    if frame.layout.bit_depth > 8:
        luma = (luma >> (frame.layout.shift + frame.layout.bit_depth - 8)).astype(np.uint8)
    histogram = cv2.calcHist([luma], [0], None, [HISTOGRAM_BINS], [0, 256]).ravel()
    thumbnail = cv2.resize(luma, THUMBNAIL_PX, interpolation=cv2.INTER_AREA)
    return _Look(thumbnail.astype(np.float32), histogram / luma.size)


def _difference(a: _Look, b: _Look) -> float:
    return float(np.abs(a.thumbnail - b.thumbnail).mean())


def _differs(a: _Look, b: _Look) -> bool:
    """Return whether two frames can be of different shots."""
    x, y = a.thumbnail - a.thumbnail.mean(), b.thumbnail - b.thumbnail.mean()
    floor = CORRELATION_NOISE**2
    correlation = (x * y).mean() / np.sqrt(((x * x).mean() + floor) * ((y * y).mean() + floor))
    change = np.abs(a.histogram - b.histogram).sum() / 2
    return bool(
        1 - correlation > MIN_DECORRELATION and change > MIN_HISTOGRAM_CHANGE and _difference(a, b) > MIN_DIFFERENCE
    )


def mark_cuts(frames: Iterable[Frame]) -> Iterator[tuple[Frame, bool]]:
    """Yield every frame with whether it is the first one of a shot; reads `LOOK_AHEAD` frames ahead."""
    ahead: deque[tuple[Frame, _Look]] = deque()
    changes: deque[float] = deque(maxlen=HISTORY)
    before: _Look | None = None

    def mark() -> tuple[Frame, bool]:
        nonlocal before
        frame, look = ahead.popleft()
        if before is None:
            before = look
            return frame, True
        change = _difference(before, look)
        usual = sum(changes) / len(changes) if changes else 0.0
        cut = change > MIN_RATIO * usual and _differs(before, look)
        # The last frame in view stands for what comes after a flash, or for the new shot.
        if cut and ahead and not _differs(before, ahead[-1][1]):
            return frame, False  # `before` stays: the end of the flash is no cut either
        if cut:
            changes.clear()
        else:
            changes.append(change)
        before = look
        return frame, cut

    for frame in frames:
        ahead.append((frame, _look(frame)))
        if len(ahead) > LOOK_AHEAD:
            yield mark()
    while ahead:
        yield mark()


def split_spans(frames: Iterable[Frame], length: int) -> Iterator[tuple[list[Frame], bool]]:
    """Cut the frames into spans of `length` + 1, each beginning with the last frame of the one before.

    Yields:
        A span and whether it ends its shot. The spans of a shot overlap by one frame.
    """
    span: list[Frame] = []
    for frame, starts_shot in mark_cuts(frames):
        if starts_shot and span:
            yield span, True
            span = []
        span.append(frame)
        if len(span) > length:
            yield span, False
            span = [frame]
    if span:
        yield span, True
