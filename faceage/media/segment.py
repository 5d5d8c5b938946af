"""A stretch of a video, encoded by an encoder of its own: it can be made, kept and put together apart from the others.

On disk a segment is two files: `NAME.packets` has the encoder's packets one after the other, `NAME.npz` their sizes,
times and flags. No container is used: none holds every codec with its exact times. The second file appears last, so
where it is, the segment is complete.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import PictureType
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from faceage.errors import MediaError, UnsupportedError
from faceage.media.codecs import Encoder, add_encoder, loses_rgb
from faceage.media.device import device_frame
from faceage.media.files import partial_of, write_atomically
from faceage.media.planes import to_native
from faceage.media.probe import VideoInfo
from faceage.types import Frame, IntArray


@dataclass(frozen=True, kw_only=True)
class SegmentFormat:
    """What the segments of one output have in common: with it they can be encoded anywhere."""

    encoder: Encoder
    info: VideoInfo
    """The source."""
    container: str
    """FFmpeg's name of the output's: encoders are set up for it."""
    extradata: bytes | None
    """The encoder's global header in the output."""
    shift: int
    """What is subtracted from the frames' time stamps, in units of their time base."""


class SegmentEncoder:
    """Encodes consecutive frames into closed groups of pictures.

    Args:
        form: of the segment.
        stream: an output's, whose encoder is open and was given no frame; None: one of its own.
        device: where the frames lie; None: on the host.

    Raises:
        MediaError: if the encoder would need another header than the output has.
    """

    def __init__(self, form: SegmentFormat, stream: VideoStream | None = None, device: str | None = None) -> None:
        if stream is None:
            # An output that is never written: there is no encoder without one.
            output = av.open(io.BytesIO(), "w", format=form.container)
            stream = add_encoder(output, form.encoder, form.info, device)
        if stream.codec_context.extradata != form.extradata:
            raise MediaError(
                f"{form.encoder.name} writes another header for each segment, so they cannot be put together; "
                "choose another codec, e.g. --codec libx264"
            )
        self._stream, self._encoder, self._info, self._shift = stream, form.encoder, form.info, form.shift
        self.ticks: list[int] = []
        """Of every frame that came, its time in units of the encoder's time base."""

    def encode(self, frame: Frame) -> list[Packet]:
        """Encode one frame. The frame is used up: its time stamp may be moved.

        Raises:
            MediaError: if the encoder cannot express the frame's time.
        """
        native = device_frame(frame) if self._encoder.on_device else to_native(frame)
        if not self._encoder.on_device and native.format.name != self._encoder.pixel_format:
            color_range = self._info.color_tags[1] or None
            native = native.reformat(
                format=self._encoder.pixel_format,
                dst_colorspace=Colorspace.ITU709 if loses_rgb(self._encoder, self._info) else None,
                src_color_range=color_range,
                dst_color_range=color_range,
            )
        native.pts, native.time_base = frame.pts - self._shift, frame.time_base
        tick = native.pts * frame.time_base / self._stream.codec_context.time_base
        if tick.denominator != 1:
            raise MediaError(
                f"{self._info.path}: the frame at {float(frame.time_s):.3f} s lies between two ticks of "
                f"{self._encoder.name}, which knows constant frame rates only; choose another codec, "
                "e.g. --codec libx264"
            )
        native.pict_type = PictureType.NONE  # else x264 repeats the source's choice of I, P and B
        self.ticks.append(tick.numerator)
        return self._stream.encode(native)

    def finish(self) -> list[Packet]:
        """Return the packets that the encoder still holds. It takes no more frames."""
        return self._stream.encode(None)


class SegmentWriter:
    """Writes packets of one segment to disk; it is there when `finish` has returned.

    Args:
        path: the name of both files, without a suffix; their folder is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._time_base = Fraction(1)
        # Of this process: where one was taken for dead, two may be writing the same segment.
        self._partial = partial_of(_packets_of(path))
        self._file = open(self._partial, "wb")  # noqa: SIM115  closed by close and finish

    def close(self) -> None:
        """Give up a segment, if it is not complete."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def write(self, packets: list[Packet]) -> None:
        """Add packets, in the encoder's order."""
        for packet in packets:
            if packet.has_sidedata("matroska_block_additional"):
                raise UnsupportedError(
                    f"{self._path}: packets that carry transparency cannot be kept to go on later; "
                    "run it with --no-resume"
                )
            assert packet.pts is not None  # encoders stamp what they give out
            assert packet.dts is not None
            assert packet.time_base is not None
            self._time_base = packet.time_base
            self._rows.append((packet.size, packet.pts, packet.dts, packet.duration or 0, int(packet.is_keyframe)))
            self._file.write(packet)

    def finish(self, ticks: list[int], notes: Mapping[str, npt.NDArray]) -> None:
        """Complete the segment.

        Args:
            ticks: the times of its frames, as `SegmentEncoder.ticks`.
            notes: any arrays to be kept with it.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(_packets_of(self._path))
        with write_atomically(self._path.with_suffix(".npz")) as file:
            np.savez(
                file,
                allow_pickle=False,
                packets=np.array(self._rows, np.int64).reshape(-1, 5),
                ticks=np.array(ticks, np.int64),
                time_base=np.array([self._time_base.numerator, self._time_base.denominator], np.int64),
                **{f"note_{name}": value for name, value in notes.items()},
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """A segment on disk."""

    path: Path
    rows: IntArray
    """int64 [P, 5]: of every packet its size in bytes, pts, dts, duration, and whether it is a key frame's."""
    ticks: IntArray
    """int64 [N], the times of its frames in units of `time_base`."""
    time_base: Fraction
    notes: dict[str, npt.NDArray]

    def packets(self) -> Iterator[Packet]:
        """Yield the packets.

        Raises:
            MediaError: if the file ends early.
        """
        with open(_packets_of(self.path), "rb") as file:
            for size, pts, dts, duration, is_keyframe in self.rows.tolist():
                data = file.read(size)
                if len(data) < size:
                    raise MediaError(f"{file.name} ends early; delete it and run the command again")
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.duration = pts, dts, duration
                packet.time_base, packet.is_keyframe = self.time_base, bool(is_keyframe)
                yield packet


def open_segment(path: Path) -> Segment | None:
    """Return a segment, or None if it is not there or not complete.

    Args:
        path: as `SegmentWriter` was given it.
    """
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            rows, (numerator, denominator) = arrays["packets"], arrays["time_base"].tolist()
            notes = {name.removeprefix("note_"): arrays[name] for name in arrays if name.startswith("note_")}
            ticks = arrays["ticks"]
        if _packets_of(path).stat().st_size != rows[:, 0].sum():
            return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return Segment(path=path, rows=rows, ticks=ticks, time_base=Fraction(numerator, denominator), notes=notes)


def _packets_of(path: Path) -> Path:
    return path.with_suffix(".packets")
