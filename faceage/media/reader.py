"""Reads a video into frames in the decoder's own planes."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Self, cast

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from faceage.errors import MediaError, UnsupportedError
from faceage.kernels import ready_event
from faceage.media.device import (
    device_format,
    is_gpu,
    is_on_device,
    open_decoder,
    planes_on_device,
    planes_to_device,
    software_format,
)
from faceage.media.planes import read_only_planes
from faceage.media.probe import (
    REPACKED,
    counts_frames,
    frame_format,
    missing_bytes,
    open_input,
    probe_video,
)
from faceage.types import Frame, Plane

log = logging.getLogger(__name__)

FIRST_STEP_BACK_S = 1.0
"""A seek that lands behind its target is tried again this much earlier, then twice as much, and so on."""


class VideoReader:
    """Decodes a video into frames, in presentation order. Iterate inside `with`.

    The planes are read-only views of the decoder's buffers, which stay alive as long as the arrays do; keep
    as many as memory allows. `writable` gives a frame whose planes may be changed.

    A damaged file yields what decodes; then `damage` says in one line what is missing.

    Args:
        path: a video file.
        start_s: frames before this time are dropped, in seconds from the first frame.
        end_s: frames from this time on are dropped.
        threads: of the decoder; None: one a core.
        device: where the planes are to lie, as tensors: "cuda" or "cuda:N", decoded there if it can; None: arrays. The
            frames that a GPU decoded have no `native`.

    Raises:
        MediaError: if the file is not a video.
        UnsupportedError: if its pixel format or colour matrix is not one faceage edits.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        if end_s is not None and end_s <= (start_s or 0):
            raise UnsupportedError(f"the range ends at {end_s} s, before it starts at {start_s or 0} s; swap them")
        self.info = probe_video(path)
        name = frame_format(self.info.pixel_format)
        if name is None:
            raise UnsupportedError(
                f"{path} has pixel format {self.info.pixel_format}, which faceage cannot edit in place; "
                "convert it first, e.g. `ffmpeg -i IN -pix_fmt yuv420p10le -c:v ffv1 OUT.mkv`"
            )
        if self.info.pixel_format in REPACKED:
            log.info("%s: %s frames are repacked to %s without loss", path, self.info.pixel_format, name)
        self.pixel_format = name
        self.device = device
        self.start_s, self.end_s = start_s, end_s
        self._threads = threads or 0
        self.frames_read = 0
        self.damage: str | None = None
        self._container: InputContainer | None = None
        self._stamps: deque[int] = deque()
        self._packets = self._failed = self._concealed = self._restamped = 0

    def __enter__(self) -> Self:
        self._container = open_input(self.info.path)
        if self.device is not None and is_gpu(self.device):
            self._container = open_decoder(self._container, self.info, self.device)
        stream = cast(VideoStream, self._container.streams[self.info.stream_index])
        stream.thread_type = "NONE" if stream.codec_context.is_hwaccel else "AUTO"
        stream.codec_context.thread_count = self._threads
        for other in self._container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        return self

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    @property
    def counts_times(self) -> bool:
        """Whether times of frames read so far are guesses: the stream has none, or some that go back."""
        return self._restamped > 0

    def __iter__(self) -> Iterator[Frame]:
        return self.read()

    def read(self, from_pts: int | None = None) -> Iterator[Frame]:
        """Yield the frames of the range.

        Args:
            from_pts: a time stamp in the range; leave out the frames before it, without decoding all of them.
        """
        if self._container is None:
            raise RuntimeError("iterate over a VideoReader inside `with`")
        begin, end = self.range_s
        if from_pts is not None:
            begin = from_pts * self.info.time_base
        if begin is not None:
            self._seek(begin)
        elif self._packets:
            self.__exit__()
            self.__enter__()
        time_base = self.info.time_base
        last_pts: int | None = None
        for native in self._decode():
            pts = self._timestamp(native, last_pts)
            if end is not None and pts * time_base >= end:
                break
            last_pts = pts
            if begin is not None and pts * time_base < begin:
                continue
            self.frames_read += 1
            self._concealed += native.is_corrupt
            yield self._frame(native, pts)
        else:
            self._examine(is_whole=begin is None)
        if self.frames_read == 0:
            raise MediaError(
                f"{self.info.path} has no frame from {self.start_s or 0} s to {self.end_s or 'its end'} "
                f"(it lasts {self.info.duration_s} s); change the range"
            )

    @property
    def range_s(self) -> tuple[Fraction | None, Fraction | None]:
        """The first and the last time of the range on the stream's own clock, in seconds, None where open."""
        zero = self.info.start_pts * self.info.time_base
        times = (self.start_s, self.end_s)
        begin, end = (None if t is None else zero + Fraction(t).limit_denominator(av.time_base) for t in times)
        return begin, end

    def _decode(self) -> Iterator[VideoFrame]:
        """Yield every frame that decodes; packets that do not are counted."""
        assert self._container is not None
        stream = cast(VideoStream, self._container.streams[self.info.stream_index])
        packets = self._container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self._failed += 1
                log.debug("%s: reading stops: %s", self.info.path, error)
                packet = None
            if packet is not None and packet.size == 0 and packet.dts is None:
                packet = None  # PyAV's mark of the end
            if packet is not None:
                if packet.size == 0:
                    continue  # AVI marks a dropped frame by an empty packet, which a decoder takes for the end
                if packet.is_corrupt and counts_frames(self._container):
                    # Its end is missing. It would fail while the decoder is drained and take others with it.
                    self._failed += 1
                    continue
                if packet.dts is not None:
                    self._stamps.append(packet.dts)
                self._packets += 1
            try:
                yield from stream.decode(packet)
            except av.EOFError:
                pass  # the decoder was flushed already
            except av.FFmpegError as error:
                self._failed += 1
                log.debug("%s: packet %d: %s", self.info.path, self._packets, error)
            if packet is None:
                return

    def _seek(self, begin: Fraction) -> None:
        """Go to the last key frame that is shown at `begin` or before it.

        Indices count in decoding time, which runs ahead of presentation where there are B-frames, so the
        key frame found is checked by its own presentation time.
        """
        assert self._container is not None
        self._stamps.clear()
        stream = self._container.streams[self.info.stream_index]
        back = Fraction(0)
        while begin - back > 0:
            target = int((begin - back) / self.info.time_base)
            try:
                self._container.seek(target, stream=stream)
                packet = next(self._container.demux(stream), None)
                # Without an index, as in a transport stream, a seek may end between key frames.
                if packet is None or (
                    packet.is_keyframe and (packet.pts is None or packet.pts * self.info.time_base <= begin)
                ):
                    self._container.seek(target, stream=stream)
                    return
            except av.FFmpegError:
                break
            back = 2 * back + Fraction(FIRST_STEP_BACK_S)
        self.__exit__()
        self.__enter__()

    def _timestamp(self, native: VideoFrame, last_pts: int | None) -> int:
        """Return the frame's time stamp; where the stream has none, or goes back, the one after the last."""
        slot = self._stamps.popleft() if self._stamps else None
        pts = slot if native.pts is None else native.pts  # AVI knows only the slots of the frames, in order
        if pts is not None and (last_pts is None or pts > last_pts):
            return pts
        if last_pts is None:
            return 0
        step = native.duration or (
            round(1 / (self.info.average_rate * self.info.time_base)) if self.info.average_rate else 1
        )
        if not self._restamped:
            log.warning(
                "%s: time stamp %s follows %d, so frames are counted on from there; their times are guesses",
                *(self.info.path, pts, last_pts),
            )
        self._restamped += 1
        return last_pts + max(1, step)

    def _frame(self, native: VideoFrame, pts: int) -> Frame:
        info = self.info
        name = software_format(native)
        expected = device_format(info) if is_on_device(native) else info.pixel_format
        if (native.width, native.height, name) != (info.width, info.height, expected):
            raise UnsupportedError(
                f"{info.path} changes from {info.width}x{info.height} {info.pixel_format} to {native.width}x"
                f"{native.height} {name} on the way; split it there and process the parts"
            )
        planes, pixel_format, kept = self._planes(native)
        if kept is not None:
            kept.pts, kept.time_base = pts, info.time_base
        color = replace(info.color, full_range=True) if info.pixel_format.startswith("yuvj") else info.color
        return Frame(
            planes=planes,
            pixel_format=pixel_format,
            color=color,
            rotation=0 if info.rotation % 90 else info.rotation,  # other angles are left to the player
            pts=pts,
            time_base=info.time_base,
            native=kept,
            ready=ready_event(planes, is_decoded=True),
        )

    def _planes(self, native: VideoFrame) -> tuple[tuple[Plane, ...], str, VideoFrame | None]:
        """Return a decoded frame's planes where they are to lie, their format, and the frame on the host if it is."""
        if is_on_device(native):
            return planes_on_device(native), software_format(native), None
        if native.format.name in REPACKED:
            native = native.reformat(format=REPACKED[native.format.name])
        if self.device is not None:
            return planes_to_device(native, self.device)
        return read_only_planes(native, self.pixel_format), self.pixel_format, native

    def _examine(self, *, is_whole: bool) -> None:
        """Set `damage` from what went wrong on the way to the end of the file."""
        found = []
        try:
            missing = missing_bytes(self.info.path)
        except OSError as error:
            raise MediaError(
                f"{self.info.path} is gone ({error.strerror}) since it was begun; put it back and run the command again"
            ) from error
        if missing:
            found.append(f"the file ends {missing:,} bytes early")
        if self._failed:
            found.append(f"packets that do not decode: {self._failed}")
        if self._concealed:
            found.append(f"frames with errors that the decoder concealed: {self._concealed}")
        assert self._container is not None
        if counts_frames(self._container) and is_whole:
            listed = len(self._container.streams[self.info.stream_index].index_entries)
            if self._packets < listed:
                found.append(f"{self._packets} of {listed} packets are there")
        if found:
            self.damage = f"{self.info.path} is damaged: {', '.join(found)}; {self.frames_read} frames were read"
