"""What a video file is: its streams, its colour, its timing, and whether the file is whole."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from faceage.errors import MediaError, UnsupportedError
from faceage.types import PIXEL_LAYOUTS, ChromaSiting, ColorSpec, Matrix

log = logging.getLogger(__name__)

HD_HEIGHT_PX = 720
"""An untagged picture this high or higher is taken for BT.709, a lower one for BT.601, as players do."""

FIRST_FRAME_PACKETS = 500
"""Packets in which a first frame must decode; a stream cut into a group of pictures needs some."""

PROGRESSIVE, _BOTTOM_FIRST = 1, 3
"""AV_FIELD_PROGRESSIVE, AV_FIELD_BB."""

FULL_RANGE = 2
"""AVCOL_RANGE_JPEG."""

GENERATE_PTS = 1
"""AVFMT_FLAG_GENPTS, which PyAV sets. In AVI the times it makes up are a frame late and out of order."""

SAME_PLANES = {"gray16le": "gray16", "rgb48le": "rgb48", "rgba64le": "rgba64"} | {
    f"yuva{layout}": f"yuv{layout}"
    for layout in ("420p", "422p", "444p", "420p10le", "422p10le", "444p10le", "422p12le", "444p12le")
}
"""Decoded formats whose first planes are those of another name. Alpha stays in the decoder's frame."""

REPACKED = (
    dict.fromkeys(("bgr24", "bgr0", "rgb0", "0rgb", "0bgr", "gbrp"), "rgb24")
    | dict.fromkeys(("bgra", "argb", "abgr", "gbrap"), "rgba")
    | dict.fromkeys(("gbrp9le", "gbrp10le", "gbrp12le", "gbrp14le", "gbrp16le"), "rgb48le")
    | dict.fromkeys(("gbrap10le", "gbrap12le", "gbrap14le", "gbrap16le"), "rgba64le")
    | dict.fromkeys(("yuyv422", "uyvy422", "yvyu422", "nv16"), "yuv422p")
    | {"nv21": "nv12", "nv24": "yuv444p"}
)
"""Decoded formats that are copied, without loss, into one that faceage edits. Any other is refused."""

_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
"""What an ISO base media file begins with."""
_MATROSKA_HEAD = 1 << 16
"""Bytes of a Matroska file in which its streams are described."""
_DOLBY_VISION = re.compile(rb"dv[cvw]C(?:\x41\xed.)?..(.)", re.DOTALL)
"""In MP4 a box, in Matroska the type of a BlockAdditionMapping, whose data follows."""
_LONGEST_STSD = 1 << 16
_SPHERICAL_V1 = bytes.fromhex("ffcc8263f8554a938814587a02521fdd")
_PROJECTIONS = {
    b"sv3d": "spherical",
    _SPHERICAL_V1: "spherical",
    b"st3d": "stereoscopic",
    b"vexu": "stereoscopic",
}
"""Boxes of MP4 -> what they say of the picture: Google's of spherical video, and Apple's of spatial video."""

_SITING_ELEMENTS = re.compile(rb"\x55\xb7\x81(.)\x55\xb8\x81(.)", re.DOTALL)
"""ChromaSitingHorz and ChromaSitingVert of Matroska (RFC 9559, 5.1.4.1.28.23), a byte each."""
_SITINGS = {(1, 2): "left", (2, 2): "center", (1, 1): "topleft", (2, 1): "top"}
"""Their values -> FFmpeg's names."""

_MATRICES: dict[int, Matrix] = {
    0: "rgb",
    1: "bt709",
    4: "bt601",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
    10: "bt2020",
}
"""AVColorSpace to the matrix of `ColorSpec`. FCC (4) differs from BT.601 in the third digit."""

_UNSPECIFIED = 2
_HDR_TRANSFERS = {16: "pq", 18: "hlg"}
BARE_STREAMS = ("h264", "hevc")
"""Demuxers of bare streams, which say in their own headers how many frames a second there are."""
_STILL_DEMUXERS = ("image2", "_pipe")
_TEXT_DEMUXERS = ("tty", "lrc", "srt", "webvtt", "ass")


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """A video file and its first moving picture stream, as container and first frame describe them."""

    path: Path
    container: str
    """FFmpeg's demuxer, e.g. "mov,mp4,m4a,3gp,3g2,mj2"."""
    stream_index: int
    codec: str
    profile: str | None
    width: int
    height: int
    pixel_format: str
    """FFmpeg's name of the decoded format; `Frame.pixel_format` may differ (`SAME_PLANES`, `REPACKED`)."""
    color: ColorSpec
    color_tags: tuple[int, int, int, int]
    """Matrix, range, primaries, transfer as FFmpeg's numbers, unspecified ones included."""
    chroma_siting: str | None
    """FFmpeg's name, None where the stream does not say."""
    time_base: Fraction
    start_pts: int
    """Time stamp of the first frame, from which `start_s` and `end_s` of a reader count."""
    duration_s: float | None
    frame_count: int | None
    """Frames that the container lists, None where it keeps no count."""
    average_rate: Fraction | None
    bit_rate: int | None
    sample_aspect_ratio: Fraction
    display_matrix: tuple[int, ...] | None
    rotation: int
    """Degrees counter-clockwise that a player turns the picture by."""
    field_order: int
    """FFmpeg's AVFieldOrder: 0 unknown, 1 progressive, above interlaced."""
    hdr: str | None
    """"pq" or "hlg"."""
    mastering_display: tuple[float, ...] | None
    """Red x y, green x y, blue x y, white x y (CIE 1931), then minimum and maximum luminance in cd/m²."""
    dolby_vision: int | None
    """Its profile, if there is Dolby Vision."""
    projection: str | None
    """"spherical" or "stereoscopic", if the container says that the picture is not a plain one."""
    content_light: tuple[int, int] | None
    """MaxCLL and MaxFALL in cd/m²."""
    closed_captions: bool
    """Whether frames carry them (CEA-608 and 708), as the first one does."""
    audio_streams: int
    subtitle_streams: int
    other_streams: int


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Return what a video file is. Its first frame is decoded, so what is returned is known to decode.

    Args:
        path: a file.

    Raises:
        MediaError: if the file is not there or not a video, saying which.
        UnsupportedError: if its colour matrix is none of `Matrix`.
    """
    path = Path(path)
    with open_input(path) as container:
        stream = video_stream(container, path)
        siting = _chroma_siting(stream)
        frame = _first_frame(container, stream, path)
        return _describe(path, container, stream, frame, siting)


def open_input(path: Path) -> InputContainer:
    """Open a file for demuxing, or say in one line why it cannot be."""
    if path.is_dir():
        raise MediaError(f"{path} is a folder, not a video file; name the files in it")
    if not path.exists():
        raise MediaError(f"{path} does not exist; check the name")
    if path.stat().st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes), not a video; copy or download it again")
    try:
        container = av.open(str(path.absolute()), metadata_errors="replace")  # a relative "a:b" is a URL
        if container.format.name in BARE_STREAMS and (rate := container.streams.video[0].guessed_rate):
            container.close()  # a bare stream has no times; its demuxer counts 25 frames a second unless it is told
            container = av.open(str(path.absolute()), metadata_errors="replace", options={"framerate": str(rate)})
    except PermissionError as error:
        raise MediaError(f"{path} cannot be read by this user; change its permissions") from error
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path} is not a readable video: {_why(path, error)}") from error
    if container.format.name == "avi":
        container.flags &= ~GENERATE_PTS
    if any(name in container.format.name for name in _STILL_DEMUXERS):
        raise MediaError(f"{path} is a still image, not a video; use `faceage images`")
    if container.format.name in _TEXT_DEMUXERS:
        raise MediaError(f"{path} is text, not a video; name a video file")
    return container


def read_comment(path: Path) -> str | None:
    """Return the comment of a file's container; errors as `open_input`."""
    with open_input(path) as container:
        return next((text for name, text in container.metadata.items() if name.lower() == "comment"), None)


def _why(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if head[4:8] == b"ftyp":
        return "its index (moov) is missing, so it was cut short; copy it again, or mend it with untrunc"
    if all(byte >= 9 and byte < 127 for byte in head):
        return "it holds text; name a video file"
    return f"{getattr(error, 'strerror', None) or error}; play it to see whether it is whole"


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the first moving picture stream: cover art is a video stream too."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise MediaError(f"{path} has a video stream that no decoder here reads; convert it to H.264 first")
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no stream"
    raise MediaError(f"{path} has no video stream ({kinds} only); name a file with a picture")


def _chroma_siting(stream: VideoStream) -> str | None:
    """Return FFmpeg's name of the stream's chroma location, None where it is not said.

    PyAV 18 has no attribute for it. The header of a Matroska file that the stream is copied to says it, but for the two
    locations below the luma row, which Matroska does not know.
    """
    if stream.codec_context.codec.canonical_name == "dvvideo":
        return "topleft"  # of 4:2:0 DV, which Matroska does not hold
    header = io.BytesIO()
    try:
        with av.open(header, "w", format="matroska") as copy:
            copy.add_stream_from_template(stream)
            copy.start_encoding()
    except (av.FFmpegError, ValueError):
        return None  # a codec that Matroska has no name for
    found = _SITING_ELEMENTS.search(header.getvalue())
    return None if found is None else _SITINGS.get((found[1][0], found[2][0]))


def _first_frame(container: InputContainer, stream: VideoStream, path: Path) -> VideoFrame:
    for count, packet in enumerate(container.demux(stream)):
        try:
            if frames := packet.decode():
                return frames[0]
        except av.FFmpegError:
            log.debug("%s: packet %d does not decode", path, count)
        if count > FIRST_FRAME_PACKETS:
            break
    raise MediaError(f"{path} has a {stream.codec_context.name} stream of which no frame decodes; the file is damaged")


def color_of(pixel_format: str, tags: tuple[int, int, int, int], height: int, siting: str | None) -> ColorSpec:
    """Return what the samples mean: the stream's tags, and for what it does not say the usual assumption.

    Raises:
        UnsupportedError: if the matrix is none of `Matrix` (YCgCo, ICtCp, XYZ).
    """
    matrix_tag, range_tag = tags[:2]
    layout = PIXEL_LAYOUTS.get(frame_format(pixel_format) or "")
    if layout and layout.planes[0].components.startswith("RGB"):
        return ColorSpec(matrix="rgb", full_range=True, chroma_siting="center")
    matrix: Matrix | None = _MATRICES.get(matrix_tag)
    if matrix_tag in (_UNSPECIFIED, 0, 3):
        matrix = "bt709" if height >= HD_HEIGHT_PX else "bt601"
    if matrix is None:
        raise UnsupportedError(
            f"the video's colour matrix is FFmpeg's number {matrix_tag}, which faceage does not know "
            "(BT.601, BT.709, BT.2020, 240M, RGB); convert it: `ffmpeg -vf scale=out_color_matrix=bt709`"
        )
    full_range = range_tag == FULL_RANGE or "yuvj" in pixel_format or (range_tag == 0 and "gray" in pixel_format)
    sited: ChromaSiting = siting if siting in ("left", "center", "topleft") else "left"  # type: ignore[assignment]
    return ColorSpec(matrix=matrix, full_range=full_range, chroma_siting=sited)


def frame_format(pixel_format: str) -> str | None:
    """Return the `Frame.pixel_format` that a decoded format is read as, None where it is refused."""
    name = REPACKED.get(pixel_format, pixel_format)
    name = SAME_PLANES.get(name, name)
    return name if name in PIXEL_LAYOUTS else None


def _describe(
    path: Path, container: InputContainer, stream: VideoStream, frame: VideoFrame, siting: str | None
) -> VideoInfo:
    assert stream.time_base is not None  # FFmpeg gives every stream that it demuxes one, 1/90000 if nothing else
    context = stream.codec_context
    tags = (context.colorspace, context.color_range, context.color_primaries, context.color_trc)
    side_data = _side_data(path, frame)
    matrix = side_data.get("DISPLAYMATRIX", b"")
    duration = container.duration / av.time_base if container.duration else None
    count = len(stream.index_entries) if counts_frames(container) else stream.frames
    kinds = [s.type for s in container.streams]
    boxes = _description_of(path)
    return VideoInfo(
        path=path,
        container=container.format.name,
        stream_index=stream.index,
        codec=context.codec.canonical_name,
        profile=context.profile,
        width=frame.width,
        height=frame.height,
        pixel_format=frame.format.name,
        color=color_of(frame.format.name, tags, frame.height, siting),
        color_tags=tags,
        chroma_siting=siting,
        time_base=stream.time_base,
        start_pts=stream.start_time or 0,
        duration_s=duration,
        frame_count=count or None,
        average_rate=stream.average_rate or stream.guessed_rate,
        bit_rate=context.bit_rate or container.bit_rate or None,
        sample_aspect_ratio=stream.sample_aspect_ratio or Fraction(1),
        display_matrix=struct.unpack("=9i", matrix) if matrix else None,
        rotation=180 - frame.rotation if _is_mirrored(matrix) else frame.rotation,
        field_order=_field_order(context, frame),
        hdr=_HDR_TRANSFERS.get(context.color_trc),
        mastering_display=_mastering_display(side_data.get("MASTERING_DISPLAY_METADATA", b"")),
        dolby_vision=_dolby_vision(boxes),
        projection=next((kind for mark, kind in _PROJECTIONS.items() if mark in boxes), None),
        content_light=_content_light(side_data.get("CONTENT_LIGHT_LEVEL", b"")),
        closed_captions="A53_CC" in side_data,
        audio_streams=kinds.count("audio"),
        subtitle_streams=kinds.count("subtitle"),
        other_streams=len(kinds) - kinds.count("audio") - kinds.count("subtitle") - 1,
    )


def _field_order(context: VideoCodecContext, frame: VideoFrame) -> int:
    """Return AVFieldOrder; AVI does not say it, and DV has the bottom field first."""
    if context.field_order < PROGRESSIVE + 1 and frame.interlaced_frame and context.name == "dvvideo":
        return _BOTTOM_FIRST
    return context.field_order


def _is_mirrored(matrix: bytes) -> bool:
    """Return whether a display matrix mirrors: FFmpeg reads its angle as if left and right were where they are not."""
    if not matrix:
        return False
    a, b, _, c, d = struct.unpack("=9i", matrix)[:5]
    return a * d < b * c


def counts_frames(container: InputContainer) -> bool:
    """Return whether the container's index lists every frame, so that a missing one shows."""
    return container.format.name.startswith("mov,") or container.format.name == "avi"


def _side_data(path: Path, frame: VideoFrame) -> dict[str, bytes]:
    """Return the side data of a frame by FFmpeg's names."""
    try:
        every = cast(Iterable[SideData], frame.side_data)  # PyAV's stubs give the container the type of its items
        return {data.type.name: bytes(data) for data in every}
    except ValueError:
        # PyAV 18 refuses all where it has no name for one: EXIF in MJPEG, LCEVC, the views of MV-HEVC.
        log.info("%s: its side data cannot be read; what it says of HDR mastering is left out", path)
        if not frame.rotation:
            return {}
        turn = math.radians(-frame.rotation)
        sine, cosine = round(math.sin(turn) * (1 << 16)), round(math.cos(turn) * (1 << 16))
        return {"DISPLAYMATRIX": struct.pack("=9i", cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30)}


def _mastering_display(data: bytes) -> tuple[float, ...] | None:
    """Decode AVMasteringDisplayMetadata: ten rationals, then two flags that say which are set."""
    if len(data) < 88:
        return None
    numbers = struct.unpack("=22i", data[:88])
    if not (numbers[20] and numbers[21]):
        return None
    return tuple(n / d if d else 0.0 for n, d in zip(numbers[0:20:2], numbers[1:20:2], strict=True))


def _content_light(data: bytes) -> tuple[int, int] | None:
    return struct.unpack("=2I", data[:8]) if len(data) >= 8 else None


def missing_bytes(path: Path) -> int:
    """Return by how many bytes a file ends before its own structure says, 0 if whole or not said.

    FFmpeg reads an MP4, Matroska or AVI file that was cut short without an error. These containers state
    the sizes of their outer boxes, so a cut shows there.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"\x1aE\xdf\xa3":
            return max(0, _matroska_end(file.read(4096), head) - size)
        if head[:4] == b"RIFF":
            return max(0, 8 + struct.unpack("<I", head[4:8])[0] - size)
        if head[4:8] in _ISO_BOXES:
            return max(0, max((end for _, _, end in _boxes(path)), default=0) - size)
    return 0


def _boxes(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type, the start and the end of each outer box of an ISO base media file (ISO/IEC 14496-12, 4.2)."""
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset + 8 <= size:
            file.seek(offset)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8:  # 0: to the end of the file
                return
            yield head[4:8], offset, offset + length
            offset += length


def _description_of(path: Path) -> bytes:
    """Return the part of an MP4 or Matroska file that describes its streams; empty for others."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"\x1aE\xdf\xa3":
            return file.read(_MATROSKA_HEAD)
        if head[4:8] not in _ISO_BOXES:
            return b""
        for kind, start, end in _boxes(path):
            if kind == b"moov":
                file.seek(start)
                return b"".join(_sample_descriptions(file.read(end - start)))
    return b""


def _sample_descriptions(moov: bytes) -> Iterator[bytes]:
    """Yield the stsd box of each track, and the box of old spherical videos, if it is there."""
    for found in re.finditer(b"stsd", moov):
        length = int.from_bytes(moov[found.start() - 4 : found.start()], "big")
        if length < _LONGEST_STSD:  # else it is a number in a table
            yield moov[found.start() : found.start() + length]
    if _SPHERICAL_V1 in moov:
        yield _SPHERICAL_V1


def _dolby_vision(description: bytes) -> int | None:
    """Return the profile of a Dolby Vision configuration record: it begins with two bytes of version, then 7 bits."""
    found = _DOLBY_VISION.search(description)
    return None if found is None else found[1][0] >> 1


def _matroska_end(body: bytes, head: bytes) -> int:
    """Return where the Segment element ends, 0 where its size is unknown (RFC 8794, section 6)."""
    data = head + body

    def vint(at: int) -> tuple[int, int]:
        length = 9 - data[at].bit_length()
        value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
        return value, at + length

    size, at = vint(4)
    at += size
    if data[at : at + 4] != b"\x18S\x80g":
        return 0
    size, start = vint(at + 4)
    return 0 if size == (1 << 7 * (start - at - 4)) - 1 else start + size
