"""Which encoder writes a video: the source's own codec and pixel format wherever this build has them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction

import av
from av.codec.codec import Codec, PixFmtLoss, UnknownCodecError, find_best_pix_fmt_of_list
from av.codec.context import CodecContext
from av.codec.context import Flags as CodecFlags
from av.container import OutputContainer
from av.video.format import VideoFormat
from av.video.stream import VideoStream

from faceage.errors import MediaError, UnsupportedError
from faceage.media.device import device_format, encoder_missing, hardware, is_gpu
from faceage.media.probe import BARE_STREAMS, PROGRESSIVE, VideoInfo, frame_format

log = logging.getLogger(__name__)

_QSCALE_2 = {"flags": "+qscale", "global_quality": "236"}
"""A fixed quantiser of 2 (in FFmpeg's lambda units of 118), the finest that these codecs are used with."""

_THREADS = {"threads": "6"}
"""What x264 takes on four cores. What these encoders write depends on it, so it is the same on every machine, and
however many segments are encoded at a time."""

ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"crf": "18", "preset": "medium", **_THREADS}),
    "hevc": ("libx265", {"crf": "20", "preset": "medium", **_THREADS}),
    "av1": ("libsvtav1", {"crf": "22", "preset": "6"}),
    "vp9": ("libvpx-vp9", {"crf": "22", "b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "1"}),
    "vp8": ("libvpx", {"crf": "8", "b": "50M", "deadline": "good", "cpu-used": "2"}),
    "prores": ("prores_ks", {}),
    "dnxhd": ("dnxhd", {}),
    "mjpeg": ("mjpeg", _QSCALE_2),
    "mpeg4": ("mpeg4", _QSCALE_2 | _THREADS),
    "mpeg2video": ("mpeg2video", _QSCALE_2 | _THREADS),
    "mpeg1video": ("mpeg1video", _QSCALE_2 | _THREADS),
    "ffv1": ("ffv1", {"level": "3", "slicecrc": "1"}),
    **{name: (name, {}) for name in ("ffvhuff", "huffyuv", "magicyuv", "png", "qtrle", "rawvideo", "utvideo", "v210")},
}
"""Codec of the source -> encoder and its settings: visually lossless, or lossless where the codec is."""

FALLBACKS = ("h264", "hevc")
"""What a source is written in when its own codec has no encoder here that keeps its pixel format."""

DEFAULTS = dict(ENCODERS.values()) | {
    "wmv2": _QSCALE_2,
    "libx264rgb": {"crf": "18", "preset": "medium", **_THREADS},
    "h264_nvenc": {"cq": "19", "preset": "p5", "b": "0"},
    "hevc_nvenc": {"cq": "21", "preset": "p5", "b": "0"},
    "av1_nvenc": {"cq": "24", "preset": "p5", "b": "0"},
}
"""Encoder -> its settings."""

_NVENC = {"libx264": "h264_nvenc", "libx265": "hevc_nvenc", "libsvtav1": "av1_nvenc"}
_NVENC |= {name: name for name in _NVENC.values()}
"""Encoder -> the one of the same codec that takes frames on a GPU."""

_TOLERABLE_LOSS = PixFmtLoss.DEPTH | PixFmtLoss.COLORQUANT
"""A source keeps its codec at this price, with a warning: ProRes 4444 decodes to 12 bits, encodes from 10."""

_DOLBY_VISION_ALONE = 5
"""The profile whose base layer no plain decoder shows rightly."""

_BT709 = 1
"""FFmpeg's number of the matrix."""

MPEG4_MAX_TICKS = 65_535
"""The finest time base of MPEG-4 part 2, in ticks a second: it has 16 bits for it."""

_DNXHR_PROFILES = {f"DNXHR {name}": f"dnxhr_{name.lower()}" for name in ("LB", "SQ", "HQ", "HQX", "444")}
_PRORES_PROFILES = {"Proxy": "0", "LT": "1", "Standard": "2", "HQ": "3", "4444": "4", "XQ": "5"}
_INTERLACED_ENCODERS = ("libx264", "mpeg2video", "mpeg4", "prores_ks", "dnxhd")
"""Encoders that code the two fields of a frame apart."""
_PARAMS_OPTION = {"libx264": "x264-params", "libx265": "x265-params", "libsvtav1": "svtav1-params"}


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How the output is encoded. The defaults follow the source."""

    codec: str | None = None
    """FFmpeg's name of a codec or an encoder ("h264", "libx265", "h264_nvenc"); None: the source's codec."""
    crf: float | None = None
    """Constant quality of the encoder's own scale, lower is better; None: `DEFAULTS`."""
    preset: str | None = None
    """The encoder's preset; None: `DEFAULTS`."""
    encoder_options: Mapping[str, str] = field(default_factory=dict)
    """Any option of the encoder by FFmpeg's name, over everything above."""
    overwrite: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Container tags that are added to the source's: the label."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder, the pixel format it gets and its options."""

    name: str
    pixel_format: str
    options: dict[str, str]
    on_device: bool = False
    """Whether it takes frames where they lie on a GPU; else they come to the host."""


def choose_encoder(info: VideoInfo, options: EncodeOptions, suffix: str = "", device: str | None = None) -> Encoder:
    """Return the encoder for a source: its own codec and pixel format, or the nearest, with a warning.

    Args:
        info: the source.
        options: may name a codec.
        suffix: of the output; ASF gets WMV2, whose times it keeps.
        device: where the frames lie; on a GPU NVENC writes H.264, HEVC and AV1 where it can.

    Raises:
        UnsupportedError: if the codec that `options` names does not exist here, or does not have an option.
    """
    encoder = _host_encoder(info, options, suffix)
    if device is None or not is_gpu(device):
        return encoder
    name, pixel_format, reason = _NVENC.get(encoder.name), device_format(info), None
    if name is None:
        reason = f"{encoder.name} runs on the CPU"
    elif pixel_format is None:
        reason = f"NVENC takes 4:2:0 with even sides, not {info.pixel_format} {info.width}x{info.height}"
    elif info.field_order > 1:
        reason = "NVENC writes no interlaced video"
    elif info.mastering_display or info.content_light:
        reason = f"{name} cannot carry the HDR mastering metadata"
    elif info.closed_captions:
        reason = f"{name} would get the frames without their closed captions"
    elif options.codec in _NVENC and options.codec != name:
        reason = f"{options.codec} was asked for"
    elif options.codec != name and (options.preset is not None or options.encoder_options):
        reason = f"the preset and the options are for {encoder.name}; with --codec {name} they are for NVENC"
    else:
        reason = encoder_missing(name, pixel_format, device)
    if name is None or pixel_format is None or reason:
        log.info("%s: frames are copied to the host and encoded by %s: %s", info.path, encoder.name, reason)
        return encoder
    log.info("%s: encoded on %s by %s %s", info.path, device, name, pixel_format)
    return Encoder(name=name, pixel_format=pixel_format, options=_options(name, info, options), on_device=True)


def _host_encoder(info: VideoInfo, options: EncodeOptions, suffix: str) -> Encoder:
    """Return the encoder for frames on the host."""
    _check_kept(info)
    wanted = options.codec
    if wanted is None and suffix.lower() in (".wmv", ".asf"):
        wanted = "wmv2"
        if info.codec != wanted:
            log.warning("%s: %s has no presentation times; writing wmv2 (choose with --codec)", info.path, suffix)
    if wanted:
        name = ENCODERS.get(wanted, (wanted,))[0]
        pixel_format, loss = _pixel_format(name, info)
        if loss:
            log.warning("%s: %s has no %s; writing %s", info.path, name, info.pixel_format, pixel_format)
        return Encoder(name=name, pixel_format=pixel_format, options=_options(name, info, options))
    for codec in dict.fromkeys((info.codec, *FALLBACKS)):
        if codec not in ENCODERS:
            continue
        name = ENCODERS[codec][0]
        pixel_format, loss = _pixel_format(name, info)
        if name == "libx264" and loss and frame_format(info.pixel_format) in ("rgb24", "rgba"):
            name, pixel_format, loss = "libx264rgb", "rgb24", PixFmtLoss.NONE
        # In eight bits, an HDR picture has steps that show.
        tolerable = _TOLERABLE_LOSS & ~PixFmtLoss.DEPTH if info.hdr else _TOLERABLE_LOSS
        if loss and (codec != info.codec or loss & ~tolerable):
            continue
        if codec != info.codec or loss:
            log.warning(
                "%s: no encoder here writes %s %s; writing %s %s (choose with --codec)",
                *(info.path, info.codec, info.pixel_format, name, pixel_format),
            )
        return Encoder(name=name, pixel_format=pixel_format, options=_options(name, info, options))
    raise UnsupportedError(
        f"{info.path} is {info.codec} {info.pixel_format}, and no encoder here keeps that format; "
        "choose one with --codec (ffv1 keeps most)"
    )


def _check_kept(info: VideoInfo) -> None:
    """Say what of the picture's description no encoder here writes; refuse what would show wrong colours without it."""
    if info.dolby_vision == _DOLBY_VISION_ALONE:
        raise UnsupportedError(
            f"{info.path} is Dolby Vision of profile 5, whose colours are wrong without its metadata, which no encoder "
            "here writes; convert it to HDR10 first"
        )
    if info.dolby_vision is not None:
        log.warning(
            "%s: its Dolby Vision metadata (profile %d) is left out; its base layer is kept",
            info.path,
            info.dolby_vision,
        )
    if info.projection:
        log.warning(
            "%s: that its picture is %s is left out; say it again with a tool for it", info.path, info.projection
        )


def _encoder(name: str) -> Codec:
    try:
        codec = Codec(name, "w")
    except UnknownCodecError as error:
        raise UnsupportedError(
            f"this build has no encoder {name!r} (it has {', '.join(sorted(DEFAULTS))} and FFmpeg's others); "
            "name one of them with --codec"
        ) from error
    if codec.type != "video":
        raise UnsupportedError(f"{name} encodes {codec.type}, not video; name a video encoder, e.g. --codec libx264")
    return codec


def _pixel_format(name: str, info: VideoInfo) -> tuple[str, PixFmtLoss]:
    """Return the encoder's format nearest to the source's, and what is lost on the way."""
    formats = [item.name for item in _encoder(name).video_formats or []]
    if not formats or info.pixel_format in formats:
        return info.pixel_format, PixFmtLoss.NONE
    best, loss = find_best_pix_fmt_of_list(formats, info.pixel_format, "a" in info.pixel_format.split("v")[-1][:1])
    if best is None:
        return formats[0], PixFmtLoss(-1)
    # The full-range twins (yuvj420p) are one format under two names: the range is kept as a tag.
    if best.name.replace("yuvj", "yuv") == info.pixel_format.replace("yuvj", "yuv"):
        loss = PixFmtLoss.NONE
    return best.name, loss


def _options(name: str, info: VideoInfo, options: EncodeOptions) -> dict[str, str]:
    known = {option.name for option in CodecContext.create(name, "w").supported_options.private}
    result = dict(DEFAULTS.get(name, {}))
    if options.crf is not None:
        quality = next((key for key in ("crf", "cq") if key in known), None)
        if quality is None:
            raise UnsupportedError(f"{name} has no constant quality (crf); leave --crf out, or use --encoder-option")
        result[quality] = f"{options.crf:g}"
    if options.preset is not None:
        if "preset" not in known:
            raise UnsupportedError(f"{name} has no presets; leave --preset out, or use --encoder-option")
        result["preset"] = options.preset
    if name == "prores_ks" and info.profile:
        result["profile"] = _PRORES_PROFILES.get(info.profile, "3")
    if name == "dnxhd":  # the older profiles take a few sizes only, each at bit rates of its own
        pixel_format = _pixel_format(name, info)[0]
        usual = {"yuv422p": "dnxhr_hq", "yuv422p10le": "dnxhr_hqx"}.get(pixel_format, "dnxhr_444")
        result["profile"] = _DNXHR_PROFILES.get(info.profile or "", usual)
    if info.chroma_siting:
        result["chroma_sample_location"] = info.chroma_siting
    if info.field_order > PROGRESSIVE:
        result["field_order"] = str(info.field_order)  # the container says it, whatever the encoder does
        if name in _INTERLACED_ENCODERS:
            result["flags"] = result.get("flags", "") + "+ildct+ilme"
    result |= options.encoder_options
    if params := _params(name, info):
        key = _PARAMS_OPTION[name]
        result[key] = ":".join([*params, *filter(None, [result.get(key)])])
    return result


def _params(name: str, info: VideoInfo) -> list[str]:
    """Return the settings that go into the encoder's own parameter string: the HDR metadata, and quiet."""
    params = ["log-level=error"] if name == "libx265" else []
    if info.mastering_display is None and info.content_light is None:
        return params
    if name not in _PARAMS_OPTION:
        log.warning("%s: %s cannot carry the HDR mastering metadata; it is left out", info.path, name)
        return params
    if info.mastering_display:
        key = "master-display" if name == "libx265" else "mastering-display"
        params.append(f"{key}={_mastering_text(name, info.mastering_display)}")
    if info.content_light:
        key = {"libx264": "cll", "libx265": "max-cll", "libsvtav1": "content-light"}[name]
        params.append(f"{key}={info.content_light[0]},{info.content_light[1]}")
    return params


def _mastering_text(name: str, mastering: tuple[float, ...]) -> str:
    """Return "G(x,y)B(x,y)R(x,y)WP(x,y)L(max,min)": ST 2086's integers, plain numbers for SVT-AV1."""
    xy, (low, high) = mastering[:8], mastering[8:]
    if name == "libsvtav1":
        values = [f"{v:.5f}" for v in xy]
        light = f"{high:.4f},{low:.4f}"
    else:
        values = [str(round(v * 50000)) for v in xy]
        light = f"{round(high * 10000)},{round(low * 10000)}"
    rx, ry, gx, gy, bx, by, wx, wy = values
    return f"G({gx},{gy})B({bx},{by})R({rx},{ry})WP({wx},{wy})L({light})"


def loses_rgb(encoder: Encoder, info: VideoInfo) -> bool:
    """Return whether RGB is written as YUV, for which BT.709 is chosen: the source's tag says that there is none."""
    return VideoFormat(info.pixel_format).is_rgb and not VideoFormat(encoder.pixel_format).is_rgb


def encoder_time_base(name: str, info: VideoInfo) -> Fraction:
    """Return the encoder's time base: the stream's, except for codecs that know constant frame rates only."""
    is_constant = name in ("mpeg1video", "mpeg2video") or info.container in BARE_STREAMS
    if is_constant or (name == "mpeg4" and info.time_base.denominator > MPEG4_MAX_TICKS):
        return 1 / frame_rate(info)
    return info.time_base


def frame_rate(info: VideoInfo) -> Fraction:
    """Return the average rate in frames a second, by which encoders plan their bits; 25 if unknown."""
    return (info.average_rate or Fraction(25)).limit_denominator(1 << 20)


def add_encoder(output: OutputContainer, encoder: Encoder, info: VideoInfo, device: str | None = None) -> VideoStream:
    """Add a stream to an output, set it up as the source is and open its encoder.

    Args:
        output: where the stream goes.
        encoder: from `choose_encoder`.
        info: the source.
        device: where the frames lie, for an encoder that takes them there.

    Raises:
        ValueError: if the container cannot hold the codec.
        MediaError: if the encoder refuses the picture or an option.
    """
    ticks = encoder_time_base(encoder.name, info)
    with hardware(device) if encoder.on_device and device is not None else nullcontext() as accelerator:
        stream = output.add_stream(encoder.name, rate=frame_rate(info), time_base=ticks, hwaccel=accelerator)
        assert isinstance(stream, VideoStream)  # choose_encoder refuses everything else
        _open_encoder(stream, encoder, info)
    return stream


def _open_encoder(stream: VideoStream, encoder: Encoder, info: VideoInfo) -> None:
    context = stream.codec_context
    context.width, context.height = info.width, info.height
    context.pix_fmt = encoder.pixel_format
    context.sample_aspect_ratio = info.sample_aspect_ratio
    context.colorspace, context.color_range, context.color_primaries, context.color_trc = info.color_tags
    if loses_rgb(encoder, info):
        context.colorspace = _BT709
    # PyAV's default, slices only, makes x264 cut pictures into slices: worse and slower than frame threads.
    context.thread_type = "AUTO"
    context.flags |= CodecFlags.frame_duration
    context.options = dict(encoder.options)
    if encoder.name == "libx265" and stream.container.format.name in ("mp4", "mov"):
        context.codec_tag = "hvc1"  # FFmpeg's default, hev1, does not play in QuickTime
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings to stderr otherwise
    try:
        context.open()
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(
            f"{encoder.name} refuses {info.width}x{info.height} {encoder.pixel_format} with "
            f"{encoder.options} ({error.strerror if isinstance(error, av.FFmpegError) else error}); "
            "change --codec or its options"
        ) from error
    if context.options:
        raise UnsupportedError(f"{encoder.name} has no option {', '.join(context.options)}; leave it out")
