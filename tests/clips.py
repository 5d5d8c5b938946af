"""Makers of tiny synthetic clips. Each frame's index is coded in its luma, so drops and repeats show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FRAMES = 64, 48, 16
TIME_BASE = Fraction(1, 90_000)
LUMA_STEP = 3
"""Luma from one frame to the next: more than a lossy codec blurs."""

Configure = Callable[[av.container.OutputContainer, av.VideoStream], None]


def regular_pts(count: int = FRAMES, *, step: int = 3600, start: int = 0) -> list[int]:
    return [start + step * i for i in range(count)]


def irregular_pts(count: int = FRAMES, *, start: int = 0) -> list[int]:
    """Variable frame rate: no two steps of a run of three are the same."""
    return [start + int(n) for n in np.cumsum([0, *([3000, 1001, 4507, 9100] * count)])[:count]]


def make_frame(index: int, pixel_format: str = "yuv420p", width: int = WIDTH, height: int = HEIGHT) -> av.VideoFrame:
    """Return a frame of seeded noise, whose left half has the luma 30 + index * LUMA_STEP."""
    frame = av.VideoFrame(width, height, pixel_format)
    rng = np.random.default_rng(index)
    depth = frame.format.components[0].bits
    for number, plane in enumerate(frame.planes):
        if plane.buffer_size == 0:
            continue
        wide = depth > 8
        data = np.frombuffer(plane, np.uint16 if wide else np.uint8)
        rows = data.reshape(-1, abs(plane.line_size) // (2 if wide else 1))
        noise = rng.integers(16, 235, rows.shape)
        rows[:] = noise << (depth - 8)
        if number == 0 and len(frame.planes) > 1 and not frame.format.is_rgb:
            rows[:, : width // 2] = (30 + index * LUMA_STEP) << (depth - 8)
        if pixel_format.startswith("p010"):
            rows[:] = rows << 6
    return frame


def index_of(luma: np.ndarray, depth: int = 8) -> int:
    """Return the index that is coded in a luma plane."""
    patch = luma[4:-4, 4 : luma.shape[1] // 2 - 8].astype(np.float64)
    return round((patch.mean() / 2 ** (depth - 8) - 30) / LUMA_STEP)


def make_clip(
    path: Path,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    pts: Sequence[int] | None = None,
    time_base: Fraction = TIME_BASE,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    configure: Configure | None = None,
    audio: str | None = None,
    subtitles: Sequence[tuple[float, float, str]] = (),
    draw: Callable[[int], av.VideoFrame] | None = None,
) -> Path:
    """Write a clip and return its path.

    Args:
        path: the file; its suffix names the container.
        codec: the video encoder.
        pixel_format: FFmpeg's name.
        pts: time stamps of the frames.
        time_base: of the time stamps.
        size: width and height in pixels.
        options: of the encoder.
        container_options: of the muxer.
        configure: called with the container and the video stream before the header: tags, colour, rotation.
        audio: encoder of a 440 Hz tone as long as the video.
        subtitles: (start in s, duration in s, text) of a SubRip track.
        draw: makes the picture of an index; None: `make_frame`.
    """
    pts = list(pts) if pts is not None else regular_pts()
    quiet = {"x265-params": "log-level=error"} if codec == "libx265" else {}
    scale = {"movie_timescale": str(time_base.denominator)} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", container_options=scale | (container_options or {})) as output:
        stream = output.add_stream(codec, rate=25, time_base=time_base, options=quiet | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        sound = output.add_stream(audio, rate=48_000) if audio else None
        text = _subtitle_stream(output) if subtitles else None
        if configure:
            configure(output, stream)
        output.start_encoding()
        for index, stamp in enumerate(pts):
            frame = draw(index) if draw else make_frame(index, pixel_format, *size)
            frame.pts, frame.time_base = stamp, time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound:
            _write_tone(output, sound, float((pts[-1] - pts[0]) * time_base), float(pts[0] * time_base))
        for start, duration, line in subtitles if text else ():
            packet = av.Packet(line.encode())
            packet.stream, packet.time_base = text, Fraction(1, 1000)
            packet.pts = packet.dts = round(start * 1000)
            packet.duration = round(duration * 1000)
            output.mux(packet)
    return path


def _subtitle_stream(output: av.container.OutputContainer) -> av.stream.Stream:
    stream = output.add_mux_stream("subrip")
    stream.time_base = Fraction(1, 1000)
    stream.metadata["language"] = "fra"
    return stream


def _write_tone(output: av.container.OutputContainer, stream: av.AudioStream, length_s: float, start_s: float) -> None:
    size = stream.codec_context.frame_size or 1024
    for number in range(int(length_s * 48_000) // size):
        time = (np.arange(size) + number * size) / 48_000
        tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), "fltp", "stereo")
        frame.sample_rate, frame.pts = 48_000, round(start_s * 48_000) + number * size
        frame.time_base = Fraction(1, 48_000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def packets_of(path: Path, kind: str, number: int = 0) -> list[av.Packet]:
    """Return the packets of a stream, chosen by its type and its place among those."""
    with av.open(str(path)) as container:
        stream = [s for s in container.streams if s.type == kind][number]
        return [packet for packet in container.demux(stream) if packet.size]


def frame_times(path: Path) -> list[Fraction]:
    """Return the presentation times of the video's packets in seconds, in presentation order."""
    return sorted(p.pts * p.time_base for p in packets_of(path, "video"))


def stream_duration(path: Path) -> Fraction | None:
    """Return how long the container says that the video lasts, in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return None if stream.duration is None else stream.duration * stream.time_base
