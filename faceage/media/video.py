"""Videos in and out: frames in the decoder's own planes, everything beside the picture copied as it is.

`VideoReader` yields `Frame`s, `writable` makes one editable, `VideoWriter` encodes them like the source.
"""

from __future__ import annotations

import os

from faceage.media.codecs import EncodeOptions
from faceage.media.planes import writable
from faceage.media.probe import VideoInfo, probe_video
from faceage.media.reader import VideoReader
from faceage.media.writer import VideoWriter, check_output

__all__ = [
    "EncodeOptions",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "check_output",
    "probe_video",
    "transcode",
    "writable",
]


def transcode(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: EncodeOptions | None = None,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    device: str | None = None,
) -> int:
    """Decode and encode a video and nothing else: what any editing of it costs at least.

    Args:
        source: the video.
        target: the output.
        options: how it is encoded.
        start_s: frames before this time are left out.
        end_s: frames from this time on are left out.
        device: where the frames lie between; see `VideoReader`.

    Returns:
        The number of frames.
    """
    with (
        VideoReader(source, start_s=start_s, end_s=end_s, device=device) as reader,
        VideoWriter(target, reader, options) as writer,
    ):
        for frame in reader:
            writer.write(frame)
        return writer.frames_written
