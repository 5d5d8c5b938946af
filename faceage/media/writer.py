"""Writes a video like its source: same codec, timing, colour and tags, every other stream copied."""

from __future__ import annotations

import logging
import os
import shutil
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import av
import numpy as np
from av.codec import Codec
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from faceage.errors import MediaError, UnsupportedError
from faceage.media.codecs import EncodeOptions, add_encoder, choose_encoder, frame_rate
from faceage.media.probe import VideoInfo, open_input
from faceage.media.reader import VideoReader
from faceage.media.remux import StreamCopier, advance_timecode, can_label, copied_tags, muxer_options, stream_tags
from faceage.media.segment import Segment, SegmentEncoder, SegmentFormat
from faceage.types import Frame, IntArray

if TYPE_CHECKING:
    from av.container.core import Chapter  # only the stubs have it

log = logging.getLogger(__name__)

_NO_TIMES = 0x80
"""FFmpeg's AVFMT_NOTIMESTAMPS: a muxer's flag."""
UNEVEN_FRAMES = 0.1
"""How far a frame's time may be from that of an even frame rate, in frames, where a container keeps no times."""
_WITH_COMMENT = ("mp4", "mov", "ipod", "matroska", "webm", "avi", "flv", "asf", "nut")
"""Containers, by their muxers, from which a comment was read back; others lose it, and with it the label."""
_ASF_CODECS = ("wmv1", "wmv2", "msmpeg4v2", "msmpeg4v3", "mjpeg")
"""Codecs that ASF (.wmv) has the right times of: it has none of presentation, and readers guess those of others."""


def check_output(
    path: str | os.PathLike[str], inputs: list[str | os.PathLike[str]], *, overwrite: bool = False
) -> Path:
    """Return the path of an output that can be written, before any work is done.

    Raises:
        MediaError: if it exists and may not be overwritten, is an input, or its folder is missing or closed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise MediaError(f"the output {path} is a folder; name a file in it")
    except OSError as error:
        raise MediaError(f"the output {path} cannot be written ({error.strerror}); name another") from error
    for source in inputs:
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise MediaError(f"the output {path} is the input {source}; faceage does not edit in place, name another")
    if path.exists() and not overwrite:
        raise MediaError(f"the output {path} exists; pass --overwrite or name another")
    if not path.parent.is_dir():
        raise MediaError(f"the output's folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise MediaError(f"the output's folder {path.parent} cannot be written by this user; name another")
    return path


class VideoWriter:
    """Puts a video together: its picture from segments, everything else copied from the source beside it.

    A segment is encoded here, of frames (`write`, and `cut` between two segments), or was encoded before (`add`). The
    output appears under its name when the `with` block ends without an error; until then it is a hidden file beside it,
    which is removed on an error. Frames must come in order; times are written as they are, moved to start at 0 only
    where the reader was given a `start_s`.

    Args:
        path: the output; its suffix chooses the container.
        source: the reader whose frames come, or a description to write its whole length.
        options: codec, quality, tags.

    Raises:
        MediaError: if the output cannot be written, or the encoder refuses the picture.
        UnsupportedError: if the container cannot hold the codec.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: VideoReader | VideoInfo,
        options: EncodeOptions | None = None,
    ) -> None:
        options = options or EncodeOptions()
        self.info = source.info if isinstance(source, VideoReader) else source
        self.path = check_output(path, [self.info.path], overwrite=options.overwrite)
        self._device = source.device if isinstance(source, VideoReader) else None
        self.encoder = choose_encoder(self.info, options, self.path.suffix, self._device)
        if self.path.suffix.lower() == ".avi":
            self.encoder.options.setdefault("bf", "0")  # AVI has no presentation times, so no B-frames
        self._ticks: list[int] = []
        self._sent: list[int] = []
        self._reorder = 0
        self._segment: SegmentEncoder | None = None
        self._has_fresh_encoder = True
        self._is_begun = False
        self._range = source.range_s if isinstance(source, VideoReader) else (None, None)
        # Of this process: another one may be writing the same output, and the last to finish wins.
        self._partial = self.path.with_name(f".{self.path.stem[:32]}.{os.getpid()}.part{self.path.suffix}")
        self._copies_source = False
        self._options = options
        self._origin_pts = 0
        self._first_tick = 0
        self._open(options)

    def check_times(self, pts: IntArray) -> None:
        """Raise UnsupportedError if the container keeps no times, and these could not be guessed from a frame rate.

        Args:
            pts: int64 [N], of all frames, in units of the source's time base.
        """
        if not self._output.format.flags & _NO_TIMES or len(pts) < 2:
            return
        even = np.linspace(pts[0], pts[-1], len(pts))
        if np.abs(pts - even).max() > max(1, UNEVEN_FRAMES * (even[1] - even[0])):
            raise UnsupportedError(
                f"{self.info.path}: its frames come at uneven times, and {self.path.suffix} files keep no times; "
                "name the output .mkv or .mp4"
            )

    def _open(self, options: EncodeOptions) -> None:
        """Open the output, add its streams, and write its header."""
        source = open_input(self.info.path)
        tags = copied_tags(source, dict(options.metadata))
        try:
            output = av.open(
                str(self._partial.absolute()), "w", container_options=muxer_options(self.path, source, tags)
            )
        except ValueError as error:
            raise UnsupportedError(
                f"{self.path} has a suffix that names no container; use .mp4, .mov or .mkv"
            ) from error
        self._output = output
        self._copier = StreamCopier(self.info, source, output)
        for stream in source.streams:
            if stream.index == self.info.stream_index:
                self._add_video(cast(VideoStream, stream))
            else:
                self._copier.add(stream)
        output.metadata.update(tags)
        if options.metadata and output.format.name not in _WITH_COMMENT:
            log.warning("%s: %s files keep no comment, so this one carries no label", self.path, self.path.suffix)
        output.set_chapters(_chapters_of(source, *self._range))
        try:
            output.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            self._discard()
            if isinstance(error, FileNotFoundError | PermissionError):
                raise MediaError(
                    f"{self.path} cannot be created ({error.strerror}); name a folder that can be written"
                ) from error
            raise MediaError(f"{self.path} cannot be written as {output.format.name}: {error}; use .mkv") from error

    def _open_stream(self) -> VideoStream:
        """Add the video stream to the output and open its encoder."""
        try:
            codec, is_asf = Codec(self.encoder.name, "w").canonical_name, self._output.format.name == "asf"
            if not can_label(self._output, codec) or (is_asf and codec not in _ASF_CODECS):
                raise ValueError("a transport stream has no type for it, ASF no times")
            return add_encoder(self._output, self.encoder, self.info, self._device)
        except ValueError as error:
            suffix = self.info.path.suffix
            like = "" if suffix.lower() == self.path.suffix.lower() else f"{suffix} like the input, or "
            raise UnsupportedError(
                f"{self.path.suffix} cannot hold {self.encoder.name} video; name the output "
                f"{like}.mkv, or choose a codec, e.g. --codec {'wmv2' if is_asf else 'libx264'}"
            ) from error

    def _add_video(self, source: VideoStream) -> None:
        stream = self._open_stream()
        stream.time_base = self.info.time_base
        stale = ["encoder", "BPS", "DURATION", "NUMBER_OF", "_STATISTICS"]
        if source.metadata.get("alpha_mode") == "1":
            log.warning("%s: its transparency is in a second VP8 or VP9 picture, which is left out", self.info.path)
            stale.append("alpha_mode")
        stream.metadata.update({k: v for k, v in stream_tags(source).items() if not k.startswith(tuple(stale))})
        if self._range[0] is not None:
            rate = frame_rate(self.info)
            skipped = round((self._range[0] - self.info.start_pts * self.info.time_base) * rate)
            for name in [name for name in stream.metadata if name.lower() == "timecode"]:
                stream.metadata[name] = advance_timecode(stream.metadata[name], skipped, rate)
        stream.disposition = source.disposition
        stream.set_display_matrix(self.info.display_matrix)
        if self._output.format.name == "mpegts":
            stream.id = source.id
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error_type is None:
            try:
                self._finish()
                return
            except (av.FFmpegError, OSError) as failure:
                self._discard()
                raise MediaError(f"{self.path} cannot be finished: {failure}; is the disk full?") from failure
            except BaseException:
                self._discard()
                raise
        self._discard()

    @property
    def frames_written(self) -> int:
        """Frames of the segments so far."""
        return len(self._ticks) + (len(self._segment.ticks) if self._segment else 0)

    @property
    def can_copy_source(self) -> bool:
        """Whether the source itself is a valid output: same container, whole length, and no encoding asked for."""
        asked = (self._options.codec, self._options.crf, self._options.preset, self._options.encoder_options)
        is_whole = self._range == (None, None)
        return is_whole and not any(asked) and self.path.suffix.lower() == self.info.path.suffix.lower()

    def copy_source(self) -> None:
        """Give out a copy of the source, byte for byte, in place of encoded frames: for when none changes."""
        self._copies_source = True

    def begin(self, first_pts: int) -> None:
        """Say which time stamp the first frame of the output has; `write` finds it out by itself."""
        begin, end = self._range
        if begin is not None:
            self._origin_pts = first_pts
        elif self._stream.codec_context.time_base != self.info.time_base:
            self._first_tick = first_pts  # the encoder counts frames from 0
        self._copier.start(self._origin_pts * self.info.time_base, begin, end)
        self._is_begun = True

    def segment_format(self) -> SegmentFormat:
        """Return what segments must be like to be added. Call `begin` before."""
        return SegmentFormat(
            encoder=self.encoder,
            info=self.info,
            container=self._output.format.name,
            extradata=self._stream.codec_context.extradata,
            shift=self._origin_pts + self._first_tick,
        )

    def write(self, frame: Frame) -> None:
        """Encode one frame. The frame is used up: its time stamp may be moved.

        Raises:
            MediaError: if the disk is full or the time stamp is not after the last one.
        """
        if not self._is_begun:
            self.begin(frame.pts)
        if self._segment is None:
            stream = self._stream if self._has_fresh_encoder else None
            self._segment = SegmentEncoder(self.segment_format(), stream, self._device)
            self._has_fresh_encoder = False
        number = self.frames_written
        try:
            self._mux(self._segment.encode(frame), self._segment.ticks)
        except (av.FFmpegError, OSError) as error:
            raise MediaError(f"{self.path}: frame {number} cannot be written: {error}") from error

    def cut(self) -> None:
        """End the segment of the frames written so far: the next frame begins another.

        The first one has to be longer than the run of frames that the encoder reorders.
        """
        if self._segment is None:
            return
        self._mux(self._segment.finish(), self._segment.ticks)
        self._ticks += self._segment.ticks
        self._segment = None

    def add(self, segment: Segment) -> None:
        """Add a segment of the right format, of this run or of another one alike."""
        ticks = segment.ticks.tolist()
        try:
            for packet in segment.packets():
                self._mux([packet], ticks)
        except (av.FFmpegError, OSError) as error:
            raise MediaError(
                f"{self.path} cannot be written: {error}; free space there and run the same command again"
            ) from error
        self._ticks += ticks

    def _mux(self, packets: list[Packet], ticks: list[int]) -> None:
        """Write packets of the segment whose frames are at `ticks`."""
        for packet in packets:
            self._order(packet, ticks)
            if self._first_tick:
                self._move(packet)
            stamp = packet.dts if packet.dts is not None else packet.pts
            assert stamp is not None  # encoders stamp what they give out
            assert packet.time_base is not None
            self._copier.copy_until(stamp * packet.time_base)
            packet.stream = self._stream
            self._output.mux(packet)

    def _order(self, packet: Packet, ticks: list[int]) -> None:
        """Give a packet the decoding time that one encoder of the whole video would give it.

        An encoder that reorders frames gives each packet the time of a frame some places earlier. At the start of a
        segment it has none and makes times up, which may lie before the last ones of the segment before.
        """
        assert packet.pts is not None
        if packet.dts is not None and not self._ticks and packet.dts < ticks[0]:
            self._reorder += 1  # the packets before the first frame's time
        place = len(self._sent) - self._reorder
        self._sent.append(packet.pts)
        if self._reorder and 0 <= place < len(self._ticks) + len(ticks):
            packet.dts = self._ticks[place] if place < len(self._ticks) else ticks[place - len(self._ticks)]

    def _move(self, packet: Packet) -> None:
        """Give a packet that an encoder of constant frame rates made its time in the stream."""
        assert packet.time_base is not None
        ticks = packet.time_base / self.info.time_base
        packet.pts = None if packet.pts is None else round(packet.pts * ticks) + self._first_tick
        packet.dts = None if packet.dts is None else round(packet.dts * ticks) + self._first_tick
        packet.duration = round((packet.duration or 0) * ticks)
        packet.time_base = self.info.time_base

    def _finish(self) -> None:
        if self._copies_source:
            self._discard()
            shutil.copyfile(self.info.path, self._partial)
            self._partial.replace(self.path)
            return
        self.cut()
        if lost := len(set(self._ticks) - set(self._sent)):
            raise MediaError(
                f"{self.path}: {lost} of {len(self._ticks)} frames did not come out of {self.encoder.name}; "
                "choose another codec, e.g. --codec libx264"
            )
        self._copier.copy_until(None)
        self._copier.close()
        self._output.close()
        self._partial.replace(self.path)

    def _discard(self) -> None:
        self._copier.close()
        try:
            self._output.close()
        except (av.FFmpegError, OSError) as error:
            log.debug("%s: closing the unfinished output: %s", self._partial, error)
        self._partial.unlink(missing_ok=True)


def _chapters_of(source: InputContainer, begin: Fraction | None, end: Fraction | None) -> list[Chapter]:
    """Return the chapters of a range of the source, in the output's times."""
    chapters: list[Chapter] = []
    for chapter in source.chapters():
        base = chapter["time_base"]
        assert base is not None  # FFmpeg's demuxers state one with each chapter
        first, last = chapter["start"] * base, chapter["end"] * base
        if (begin is not None and last <= begin) or (end is not None and first >= end):
            continue
        origin = begin or Fraction(0)
        first = max(first, origin) - origin
        last = (last if end is None else min(last, end)) - origin
        chapters.append({**chapter, "start": round(first / base), "end": round(last / base)})
    return chapters
