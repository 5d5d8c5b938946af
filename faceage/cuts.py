"""Shot cuts: find them, and cut a stream of frames into spans that never cross one.

A cut changes what is where (the correlation of two thumbnails falls) and how much is dark and light (their
histograms), and it does so much more than the frames before it did. A flash or a fade keeps the
correlation, a pan keeps the histogram and changes no faster than before; and after a flash the old picture
comes back, which a look ahead of a few frames sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from faceage.kernels import Thumbnail, begin_thumbnail
from faceage.types import Frame

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


def _difference(a: Thumbnail, b: Thumbnail) -> float:
    return float(np.abs(a.luma - b.luma).mean())


def _differs(a: Thumbnail, b: Thumbnail) -> bool:
    """Return whether two frames can be of different shots."""
    x, y = a.luma - a.luma.mean(), b.luma - b.luma.mean()
    floor = CORRELATION_NOISE**2
    correlation = (x * y).mean() / np.sqrt(((x * x).mean() + floor) * ((y * y).mean() + floor))
    change = np.abs(a.histogram - b.histogram).sum() / 2
    return bool(
        1 - correlation > MIN_DECORRELATION and change > MIN_HISTOGRAM_CHANGE and _difference(a, b) > MIN_DIFFERENCE
    )


def mark_cuts(frames: Iterable[Frame]) -> Iterator[tuple[Frame, bool, Thumbnail]]:
    """Yield every frame with whether it is the first one of a shot, and its thumbnail.

    It reads `LOOK_AHEAD` frames ahead: what a device is asked for has come by the time that it is needed.
    """
    ahead: deque[tuple[Frame, Callable[[], Thumbnail]]] = deque()
    changes: deque[float] = deque(maxlen=HISTORY)
    before: Thumbnail | None = None

    def mark() -> tuple[Frame, bool, Thumbnail]:
        nonlocal before
        frame, begun = ahead.popleft()
        seen = begun()
        if before is None:
            before = seen
            return frame, True, seen
        change = _difference(before, seen)
        usual = sum(changes) / len(changes) if changes else 0.0
        cut = change > MIN_RATIO * usual and _differs(before, seen)
        # The last frame in view stands for what comes after a flash, or for the new shot.
        if cut and ahead and not _differs(before, ahead[-1][1]()):
            return frame, False, seen  # `before` stays: the end of the flash is no cut either
        if cut:
            changes.clear()
        else:
            changes.append(change)
        before = seen
        return frame, cut, seen

    for frame in frames:
        ahead.append((frame, begin_thumbnail(frame)))
        if len(ahead) > LOOK_AHEAD:
            yield mark()
    while ahead:
        yield mark()


def split_spans(frames: Iterable[Frame], length: int) -> Iterator[tuple[list[Frame], bool, Thumbnail]]:
    """Cut the frames into spans of `length` + 1, each beginning with the last frame of the one before.

    Yields:
        A span, whether it ends its shot, and the thumbnail of its last frame. The spans of a shot overlap by one frame.
    """
    span: list[Frame] = []
    last: Thumbnail | None = None
    for frame, starts_shot, seen in mark_cuts(frames):
        if starts_shot and last:
            yield span, True, last
            span = []
        span.append(frame)
        last = seen
        if len(span) > length:
            yield span, False, last
            span = [frame]
    if last:
        yield span, True, last
