"""Copies what is not the video, packet for packet: audio, subtitles, data, cover art, attachments."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Stream

from faceage.media.probe import VideoInfo, open_input
from faceage.media.transport import read_programs

log = logging.getLogger(__name__)

SEEK_MARGIN_S = 10
"""How far before the cut the copied streams are read from: a container interleaves within less."""

_CONTAINER_TAGS = frozenset(("major_brand", "minor_version", "compatible_brands", "encoder"))
"""Tags that describe the file they were read from, not the work in it."""

_ITUNES_TAGS = frozenset(
    "title artist album_artist album composer date comment genre copyright grouping lyrics description "  # noqa: SIM905
    "synopsis show episode_id network keywords episode_sort season_number media_type hd_video "
    "gapless_playback compilation creation_time track disc tmpo".split()
)
"""Tags that FFmpeg's MP4 muxer knows by name; any other one needs its free-form table."""


_TRANSPORT_CODECS = frozenset(
    "h264 hevc mpeg1video mpeg2video mpeg4 vc1 aac aac_latm ac3 eac3 dts mp2 mp3 opus truehd s302m "  # noqa: SIM905
    "dvb_subtitle dvb_teletext klv timed_id3 scte_35 epg".split()
)
"""What an MPEG transport stream can label. FFmpeg muxes anything else too, but no player knows what it is."""


class StreamCopier:
    """Copies every stream but the edited one from the source into the output, in step with the video.

    It demuxes the source a second time, so the video's threads and these packets do not wait for one
    another and memory stays flat. Packets keep their bytes, side data, timestamps and durations; with a
    range, all timestamps are moved by the same amount as the video's.
    """

    def __init__(self, info: VideoInfo, source: InputContainer, output: OutputContainer) -> None:
        self._info = info
        self._source = source
        self._output = output
        self._streams: dict[int, Stream] = {}
        self._origin = Fraction(0)
        self._end: Fraction | None = None
        self._refused = 0
        self._packets: Iterator[Packet] = iter(())
        self._next: Packet | None = None

    def add(self, stream: Stream) -> None:
        """Add a stream of the source to the output, or say that its container cannot hold it."""
        if self._is_rewritten(stream):
            return
        if stream.disposition & av.stream.Disposition.attached_pic and self._output.format.name == "matroska":
            self._attach_picture(stream)  # Matroska keeps cover art as attached files
            return
        if _container_holds(self._output, stream):
            self._streams[stream.index] = _add_copy(self._output, stream)
            return
        log.warning(
            "%s: %s stream %d (%s) cannot be stored in %s; it is left out",
            *(self._info.path, stream.type, stream.index, _codec_name(stream), self._output.format.name),
        )

    def _is_rewritten(self, stream: Stream) -> bool:
        """Return whether the muxer makes the stream anew: QuickTime's chapter and time code tracks."""
        if stream.type != "data":
            return False
        chapters = stream.name == "bin_data" and bool(self._source.chapters())
        return chapters or (self._output.format.name in ("mov", "mp4") and "timecode" in stream.metadata)

    def _attach_picture(self, stream: Stream) -> None:
        codec = _codec_name(stream)
        kind = {"mjpeg": "jpeg"}.get(codec, codec)
        name = stream.metadata.get("filename", f"cover.{kind.replace('jpeg', 'jpg')}")
        with open_input(self._info.path) as source:
            packet = next(source.demux(source.streams[stream.index]))
            self._output.add_attachment(name, stream.metadata.get("mimetype", f"image/{kind}"), bytes(packet))

    def start(self, origin: Fraction, begin: Fraction | None, end: Fraction | None) -> None:
        """Begin to copy.

        Args:
            origin: time in seconds that becomes 0 in the output.
            begin: time in seconds of the first packet copied, None for the file's first.
            end: time in seconds before which packets are copied, None for the file's end.
        """
        self._origin, self._end = origin, end
        for stream in self._source.streams:
            if stream.index not in self._streams:
                stream.discard = av.stream.Discard.all
        if begin is not None:
            with suppress(av.FFmpegError):  # a file that starts later is read from its start
                self._source.seek(max(0, int((begin - SEEK_MARGIN_S) * av.time_base)))
        self._packets = self._shifted(begin)
        self._next = next(self._packets, None)

    def _shifted(self, begin: Fraction | None) -> Iterator[Packet]:
        """Yield the packets of the range, moved to the output's times and streams."""
        streams = [s for s in self._source.streams if s.index in self._streams]
        if not streams:
            return
        try:
            for packet in self._source.demux(streams):
                if packet.size == 0:  # the demuxer's flush
                    continue
                stamp = packet.pts if packet.pts is not None else packet.dts
                picture = packet.stream.disposition & av.stream.Disposition.attached_pic
                if stamp is not None and not picture:
                    time = stamp * packet.time_base
                    if begin is not None and time < begin:
                        over = (
                            packet.stream.type == "subtitle"
                            and time + (packet.duration or 0) * packet.time_base - begin
                        )
                        if not over or over <= 0:
                            continue
                        # A subtitle that is still shown where the range begins is shown from there on.
                        packet.pts = packet.dts = round(begin / packet.time_base)
                        packet.duration = round(over / packet.time_base)
                    if self._end is not None and time >= self._end:
                        continue
                    shift = round(self._origin / packet.time_base)
                    packet.pts = None if packet.pts is None else packet.pts - shift
                    packet.dts = None if packet.dts is None else packet.dts - shift
                packet.stream = self._streams[packet.stream_index]
                yield packet
        except av.FFmpegError as error:
            log.warning("%s: the streams beside the video end early: %s", self._info.path, error.strerror)

    def copy_until(self, time: Fraction | None) -> None:
        """Copy the packets up to a time of the output, in seconds; None for all that are left."""
        while self._next is not None:
            packet = self._next
            stamp = packet.dts if packet.dts is not None else packet.pts
            if time is not None and stamp is not None and stamp * packet.time_base > time:
                return
            try:
                self._output.mux(packet)
            except av.error.ArgumentError:
                self._refused += 1
            self._next = next(self._packets, None)

    def close(self) -> None:
        """Close the source and say what the output's container refused."""
        self._source.close()
        if self._refused:
            log.warning(
                "%s: %d packets beside the video are out of order in time; they are left out",
                *(self._info.path, self._refused),
            )


def _codec_name(stream: Stream) -> str:
    if stream.codec_context is not None:
        return stream.codec_context.codec.canonical_name
    return stream.name or "unknown codec"


def can_label(output: OutputContainer, codec: str) -> bool:
    """Return whether a transport stream has a type for a codec; other containers are asked by their muxer."""
    return output.format.name != "mpegts" or codec in _TRANSPORT_CODECS


def _container_holds(output: OutputContainer, stream: Stream) -> bool:
    """Return whether the output's container takes a stream: its muxer is asked for a header in memory."""
    if stream.type != "attachment" and stream.codec_context is None and stream.type != "data":
        return False
    if not can_label(output, _codec_name(stream)):
        return False
    trial = av.open(io.BytesIO(), "w", format=output.format.name)
    try:
        _add_copy(trial, stream)
        trial.start_encoding()
        trial.close()
    except (ValueError, av.FFmpegError):
        return False
    return True


def _add_copy(output: OutputContainer, stream: Stream) -> Stream:
    copy = output.add_stream_from_template(stream, opaque=True)
    copy.metadata.update(stream_tags(stream))
    copy.disposition = stream.disposition
    if output.format.name == "mpegts":
        copy.id = stream.id
    return copy


def stream_tags(stream: Stream) -> dict[str, str]:
    """Return a stream's tags by the names that muxers take: FFmpeg reads the title of a track in MP4 as its "name"."""
    tags = stream.metadata
    return {"title": tags["name"]} | tags if "name" in tags else tags


def advance_timecode(timecode: str, frames: int, rate: Fraction) -> str:
    """Return the time code of a later frame (SMPTE ST 12-1).

    A time code with a semicolon drops numbers, not frames: two of 30 (four of 60) at the start of each minute but every
    tenth, so that it keeps to the clock at 29.97 frames a second.

    Args:
        timecode: "HH:MM:SS:FF" or "HH:MM:SS;FF"; any other text is returned as it is.
        frames: how many frames later.
        rate: frames a second.
    """
    found = re.fullmatch(r"(\d\d):(\d\d):(\d\d)([:;.])(\d\d)", timecode)
    if not found:
        return timecode
    hours, minutes, seconds, separator, number = (*map(int, found.group(1, 2, 3)), found[4], int(found[5]))
    base = round(rate)
    drop = round(rate / 15) if separator != ":" else 0
    passed = 60 * hours + minutes
    count = (60 * passed + seconds) * base + number - drop * (passed - passed // 10) + frames
    ten_minutes, minute = 600 * base - 9 * drop, 60 * base - drop
    tens, rest = divmod(count % (144 * ten_minutes), ten_minutes)
    # The first of ten minutes drops nothing, so it is the longest.
    count = ten_minutes * tens + rest + drop * (9 * tens + max(0, (rest - drop) // minute) if drop else 0)
    seconds, number = divmod(count, base)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{separator}{number:02}"


def copied_tags(source: InputContainer, label: dict[str, str]) -> dict[str, str]:
    """Return the source's container tags with the label over them; Matroska has their names in capitals."""
    replaced = _CONTAINER_TAGS | label.keys()
    tags = {k: v for k, v in source.metadata.items() if k.lower() not in replaced} | label
    if source.format.name != "mpegts":
        return tags
    programs = read_programs(Path(source.name))
    if programs.number > 1:
        log.warning(
            "%s: its %d programs are written as one, without their names; give a file of one of them",
            *(source.name, programs.number),
        )
    return tags | programs.tags


def muxer_options(path: Path, source: InputContainer, tags: dict[str, str]) -> dict[str, str]:
    """Return the container's options that keep times and tags as they are.

    MP4 and MOV state when a stream starts in the movie's time scale, by default milliseconds: the least
    common multiple of the streams' scales states it exactly. Tags that iTunes has no name for need the
    free-form table (`use_metadata_tags`), into which FFmpeg then writes all tags: FFmpeg, MediaInfo, ExifTool
    and QuickTime read it, so it is switched on only when such a tag is there.
    """
    suffix = path.suffix.lower()
    if suffix in (".mp4", ".m4v", ".mov"):
        scale = 1
        # Chapters become a track whose samples, in these units, have 31 bits for their lengths.
        length_s = (source.duration or 0) / av.time_base if source.chapters() else 1
        for stream in source.streams:
            assert stream.time_base is not None  # FFmpeg gives every stream that it demuxes one
            common = math.lcm(scale, stream.time_base.denominator)
            scale = common if common * max(length_s, 1) < 2**31 else scale
        options = {"movie_timescale": str(scale)}
        if any(key.split("-")[0] not in _ITUNES_TAGS for key in tags):
            options["movflags"] = "use_metadata_tags"
        return options
    if suffix in (".ts", ".m2ts", ".mts"):
        return {"mpegts_copyts": "1"}
    return {}
