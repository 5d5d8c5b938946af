"""Videos in and out: planes, times, streams, tags, damage, and files that are no videos."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import (
    FRAMES,
    TIME_BASE,
    frame_times,
    index_of,
    irregular_pts,
    make_clip,
    make_frame,
    packets_of,
    regular_pts,
    stream_duration,
)
from PIL import Image

from faceage.errors import MediaError, UnsupportedError
from faceage.media.codecs import choose_encoder
from faceage.media.planes import read_only_planes, to_native
from faceage.media.probe import open_input
from faceage.media.remux import advance_timecode, copied_tags
from faceage.media.transport import read_programs
from faceage.media.video import (
    EncodeOptions,
    VideoReader,
    VideoWriter,
    check_output,
    probe_video,
    transcode,
    writable,
)
from faceage.types import PIXEL_LAYOUTS, ColorSpec, Frame

MEDIA = Path(__file__).parents[2] / "shared" / "media"
FAST = EncodeOptions(preset="ultrafast")

FFV1_FORMATS = [
    "yuv420p", "yuv422p", "yuv444p", "yuv440p", "yuv411p", "yuv420p10le", "yuv422p10le", "yuv444p10le",
    "yuv420p12le", "yuv422p12le", "yuv444p12le", "yuv440p10le", "yuv440p12le",
    "gray", "gray10le", "gray12le", "gray16le",
]  # fmt: skip
RAW_FORMATS = ["nv12", "rgb24", "rgba", "rgb48le", "rgba64le"]
REPACKED_FORMATS = [
    ("bgr0", "rgb24"),
    ("bgra", "rgba"),
    ("gbrp10le", "rgb48"),
    ("gbrp12le", "rgb48"),
    ("gbrp16le", "rgb48"),
    ("gbrap10le", "rgba64"),
    ("gbrap16le", "rgba64"),
]


@pytest.fixture(autouse=True, params=[None, 7], ids=["whole", "segments"])
def segments(request, monkeypatch):
    """Every test twice: the second time, outputs are put together from segments of seven frames."""
    write = VideoWriter.write

    def cut_and_write(writer, frame):
        if writer.frames_written and writer.frames_written % request.param == 0:
            writer.cut()
        write(writer, frame)

    if request.param:
        monkeypatch.setattr(VideoWriter, "write", cut_and_write)


def read_all(path: Path, **range_s: float) -> list[Frame]:
    with VideoReader(path, **range_s) as reader:
        return list(reader)


def planes_equal(a: list[Frame], b: list[Frame]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x.planes, y.planes, strict=True)
    )


def indices(frames: list[Frame]) -> list[int]:
    return [index_of(f.planes[0], f.layout.bit_depth) for f in frames]


# Planes


@pytest.mark.parametrize("pixel_format", [*FFV1_FORMATS, *RAW_FORMATS])
@pytest.mark.parametrize("size", [(64, 48), (37, 21)], ids=["even", "odd"])
def test_planes_survive_a_lossless_round_trip(tmp_path, pixel_format, size):
    raw = pixel_format in RAW_FORMATS
    suffix = ".nut" if raw else ".mkv"
    clip = make_clip(
        tmp_path / f"in{suffix}",
        codec="rawvideo" if raw else "ffv1",
        pixel_format=pixel_format,
        pts=regular_pts(3),
        size=size,
    )
    assert transcode(clip, tmp_path / f"out{suffix}") == 3
    source, result = read_all(clip), read_all(tmp_path / f"out{suffix}")
    assert probe_video(tmp_path / f"out{suffix}").pixel_format == pixel_format
    assert planes_equal(source, result)
    made = make_frame(1, pixel_format, *size)
    width = source[1].planes[0].shape[1] * source[1].planes[0].itemsize
    row = np.frombuffer(made.planes[0], np.uint8)[:width]
    np.testing.assert_array_equal(source[1].planes[0][0].reshape(-1).view(np.uint8)[:width], row)


@pytest.mark.parametrize(("decoded", "read_as"), REPACKED_FORMATS)
def test_repacked_formats_come_back_as_they_were(tmp_path, decoded, read_as):
    clip = make_clip(tmp_path / "in.mkv", codec="ffv1", pixel_format=decoded, pts=regular_pts(3))
    transcode(clip, tmp_path / "out.mkv")
    assert read_all(clip)[0].pixel_format == read_as
    assert probe_video(tmp_path / "out.mkv").pixel_format == decoded
    with av.open(str(clip)) as a, av.open(str(tmp_path / "out.mkv")) as b:
        for x, y in zip(a.decode(video=0), b.decode(video=0), strict=True):
            left, right = (f.reformat(format="rgba64le").to_ndarray() for f in (x, y))
            np.testing.assert_array_equal(left, right)


def test_alpha_stays_untouched(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", codec="ffv1", pixel_format="yuva420p", pts=regular_pts(3))
    with VideoReader(clip) as reader, VideoWriter(tmp_path / "out.mkv", reader) as writer:
        for frame in reader:
            assert (frame.pixel_format, len(frame.planes)) == ("yuv420p", 3)
            edited = writable(frame)
            edited.planes[0][:] = 99
            writer.write(edited)
    with av.open(str(tmp_path / "out.mkv")) as container:
        for number, frame in enumerate(container.decode(video=0)):
            assert frame.format.name == "yuva420p"
            assert bytes(frame.planes[3])[:64] == bytes(make_frame(number, "yuva420p").planes[3])[:64]


@pytest.mark.parametrize("size", [(64, 48), (37, 21)], ids=["even", "odd"])
def test_p010_planes(size):
    """No decoder on a CPU gives P010, so its views are tested alone."""
    frame = make_frame(3, "p010le", *size)
    luma, chroma = (plane.copy() for plane in read_only_planes(frame, "p010le"))
    assert luma.shape == size[::-1]
    assert chroma.shape == (-(-size[1] // 2), -(-size[0] // 2), 2)
    assert not (luma & 63).any()
    row = np.frombuffer(frame.planes[1], np.uint16)[: chroma[0].size]
    np.testing.assert_array_equal(chroma[0].ravel(), row)


def test_every_layout_has_a_test():
    tested = {"p010le", *FFV1_FORMATS, *RAW_FORMATS}
    names = {"gray16": "gray16le", "rgb48": "rgb48le", "rgba64": "rgba64le"}
    assert {names.get(n, n) for n in PIXEL_LAYOUTS if "yuvj" not in n} <= tested


def test_planes_are_views_without_a_copy(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", size=(62, 46))
    frame = read_all(clip)[0]
    assert frame.planes[0].__array_interface__["data"][0] == frame.native.planes[0].buffer_ptr
    assert frame.planes[0].strides[0] == frame.native.planes[0].line_size
    with pytest.raises(ValueError, match="read-only"):
        frame.planes[0][:] = 0


def test_unsupported_pixel_format_says_what_to_do(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", codec="ffv1", pixel_format="yuv410p", pts=regular_pts(2))
    with pytest.raises(UnsupportedError, match=r"yuv410p.*convert it first"):
        VideoReader(clip)


def test_writing_into_frames_does_not_disturb_later_ones(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", options={"bf": "3", "refs": "4", "g": "250"}, pts=regular_pts(30))
    with av.open(str(clip)) as container:
        expected = [frame.to_ndarray() for frame in container.decode(video=0)]
    with VideoReader(clip) as reader:
        for frame, want in zip(reader, expected, strict=True):
            before = frame.planes[0].copy()
            np.testing.assert_array_equal(before, want[:48])
            edited = writable(frame)
            for plane in edited.planes:
                plane[:] = 0
            assert not edited.native.to_ndarray().any()
            np.testing.assert_array_equal(frame.planes[0], before)  # the decoder's own picture is as it was
            assert (edited.pts, edited.color) == (frame.pts, frame.color)


def test_frames_outlive_the_reader(tmp_path):
    frames = read_all(make_clip(tmp_path / "in.mp4", pts=regular_pts(30)))
    assert indices(frames) == list(range(30))


def test_a_frame_built_from_arrays_can_be_written(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", codec="ffv1")
    frames = read_all(clip)
    with VideoReader(clip) as reader, VideoWriter(tmp_path / "out.mkv", reader) as writer:
        for frame in frames:
            planes = tuple(plane.copy() for plane in frame.planes)
            writer.write(
                Frame(
                    planes=planes,
                    pixel_format=frame.pixel_format,
                    color=frame.color,
                    pts=frame.pts,
                    time_base=frame.time_base,
                )
            )
    assert planes_equal(frames, read_all(tmp_path / "out.mkv"))


# Times


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".ts"])
@pytest.mark.parametrize(
    ("codec", "start"), [("libx264", 0), ("libx264", 12_345), ("libx264", 900_000), ("libx265", 12_345)]
)
def test_times_are_kept_exactly(tmp_path, suffix, start, codec):
    container = {"mpegts_copyts": "1"} if suffix == ".ts" else {}
    # TS has no negative decoding times, so its clips start late enough for B-frames.
    pts = irregular_pts(start=start + (90_000 if suffix == ".ts" else 0))
    clip = make_clip(tmp_path / f"in{suffix}", codec=codec, pts=pts, options={"bf": "3"}, container_options=container)
    transcode(clip, tmp_path / f"out{suffix}", FAST)
    assert frame_times(tmp_path / f"out{suffix}") == frame_times(clip)
    source = read_all(clip)
    assert [f.pts * f.time_base for f in read_all(tmp_path / f"out{suffix}")] == [f.pts * f.time_base for f in source]
    if suffix != ".mkv":  # Matroska counts milliseconds
        assert [f.pts * f.time_base for f in source] == [p * TIME_BASE for p in pts]
    assert indices(source) == list(range(FRAMES))


@pytest.mark.parametrize(
    ("pts", "b_frames"),
    [(regular_pts(start=3600), "3"), (irregular_pts(start=3600), "0")],
    ids=["cfr", "vfr"],
)
def test_durations_are_kept_exactly(tmp_path, pts, b_frames):
    """With B-frames and a variable rate, MP4 has no frame durations to keep: it states decoding intervals."""
    clip = make_clip(tmp_path / "in.mp4", pts=pts, options={"bf": b_frames})
    transcode(clip, tmp_path / "out.mp4", EncodeOptions(encoder_options={"bf": b_frames}))
    assert stream_duration(tmp_path / "out.mp4") == stream_duration(clip)
    before, after = packets_of(clip, "video"), packets_of(tmp_path / "out.mp4", "video")
    assert sorted((p.pts, p.duration) for p in after) == sorted((p.pts, p.duration) for p in before)


def test_a_stream_without_times_counts_on(tmp_path, caplog):
    clip = make_clip(tmp_path / "in.h264", time_base=Fraction(1, 25), pts=range(20), options={"bf": "2"})
    assert [f.time_s for f in read_all(clip)] == [i / 25 for i in range(20)]
    assert len([r for r in caplog.records if "guesses" in r.message]) == 1


@pytest.mark.parametrize(("suffix", "codec"), [(".h264", "libx264"), (".hevc", "libx265")])
def test_a_bare_stream_keeps_its_rate(tmp_path, suffix, codec):
    rate = Fraction(30_000, 1001)

    def configure(_, stream):
        stream.codec_context.framerate = rate

    options = {"time_base": 1 / rate, "pts": range(12), "codec": codec, "configure": configure}
    clip = make_clip(tmp_path / f"in{suffix}", **options)
    transcode(clip, tmp_path / f"out{suffix}", FAST)
    for path in (clip, tmp_path / f"out{suffix}"):
        assert probe_video(path).average_rate == rate
        assert [f.time_s for f in read_all(path)] == pytest.approx([i / float(rate) for i in range(12)], abs=1e-5)


@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_avi_times_are_those_of_its_slots(tmp_path, b_frames):
    clip = make_clip(tmp_path / "in.avi", time_base=Fraction(1, 25), pts=range(20), options={"bf": b_frames})
    with VideoReader(clip) as reader:
        assert [f.pts for f in reader] == list(range(20))


@pytest.mark.parametrize(("start_s", "end_s"), [(0.1, 0.3), (0.24, None), (None, 0.2), (0.0, 0.04)])
def test_a_range_keeps_its_frames_and_starts_at_zero(tmp_path, start_s, end_s):
    clip = make_clip(tmp_path / "in.mp4", options={"bf": "3", "g": "5"}, pts=regular_pts(24, start=9_000), audio="aac")
    expected = [i for i in range(24) if (start_s or 0) <= i * 0.04 < (end_s or 9)]
    assert indices(read_all(clip, start_s=start_s, end_s=end_s)) == expected
    transcode(clip, tmp_path / "out.mp4", FAST, start_s=start_s, end_s=end_s)
    result = read_all(tmp_path / "out.mp4")
    assert indices(result) == expected
    first = 9_000 * TIME_BASE if start_s is None else 0
    assert [f.pts * f.time_base for f in result] == [first + Fraction(i, 25) for i in range(len(expected))]
    sound = packets_of(tmp_path / "out.mp4", "audio")
    times = [float(p.pts * p.time_base) for p in sound]
    assert not times or times[0] - float(first) < 0.03
    assert not times or times[-1] <= float(first) + len(expected) * 0.04


@pytest.mark.parametrize("suffix", [".ts", ".m2ts"])
@pytest.mark.parametrize("name", ["Das Erste", "第一"])
def test_a_transport_stream_keeps_the_name_of_its_service(tmp_path, suffix, name):
    wanted = {"service_name": name, "service_provider": "ARD"}
    clip = make_clip(tmp_path / f"in{suffix}", configure=lambda output, _: output.metadata.update(wanted))
    transcode(clip, tmp_path / f"out{suffix}", FAST)
    assert read_programs(tmp_path / f"out{suffix}") == (1, wanted)
    assert read_programs(clip) == (1, wanted)


def test_programs_of_a_transport_stream_are_counted(tmp_path, caplog):
    clip = make_clip(tmp_path / "in.ts")
    data = bytearray(clip.read_bytes())
    table = data.index(b"\x47\x40\x00")  # the program association, of one program, after which the packet is filled up
    section = bytes([0, 0xB0, 17, 0, 1, 0xC1, 0, 0, 0, 1, 0xF0, 0, 0, 2, 0xF1, 0]) + bytes(4)
    data[table + 5 : table + 5 + len(section)] = section
    (tmp_path / "two.ts").write_bytes(data)
    assert read_programs(tmp_path / "two.ts").number == 2
    with open_input(tmp_path / "two.ts") as source:
        copied_tags(source, {})
    assert "its 2 programs are written as one" in caplog.text
    (tmp_path / "none.ts").write_bytes(bytes(2000))
    assert read_programs(tmp_path / "none.ts") == (1, {})


def test_a_range_of_a_transport_stream_has_all_its_frames(tmp_path):
    """It has no index, and its times start late: a seek ends before it, or between key frames."""
    options = {"bf": "2", "g": "20", "x264-params": "scenecut=0"}
    clip = make_clip(
        tmp_path / "in.ts", draw=lambda i: make_frame(i % 16), pts=regular_pts(100), options=options, audio="aac"
    )
    times = [f.time_s for f in read_all(clip)]
    assert len(times) == 100
    for start_s in (0.2, 1.9, 3.1):
        expected = [t for t in times if t >= times[0] + start_s - 1e-6]
        transcode(clip, tmp_path / f"{start_s}.ts", FAST, start_s=start_s)
        assert len(read_all(tmp_path / f"{start_s}.ts")) == len(expected)


def test_a_range_without_frames_is_said(tmp_path):
    clip = make_clip(tmp_path / "in.mp4")
    with pytest.raises(MediaError, match=r"no frame from 99 s to its end \(it lasts 0.64 s\)"):
        read_all(clip, start_s=99)
    with pytest.raises(UnsupportedError, match="before it starts"):
        VideoReader(clip, start_s=2, end_s=1)


def test_frames_outside_the_edit_list_stay_hidden(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", pts=regular_pts(20, start=-18_000), options={"bf": "2"})
    with VideoReader(clip) as reader:
        frames = list(reader)
    assert (indices(frames), frames[0].pts, reader.damage) == (list(range(5, 20)), 0, None)
    transcode(clip, tmp_path / "out.mp4", FAST)
    assert [f.time_s for f in read_all(tmp_path / "out.mp4")] == [f.time_s for f in frames]


def test_avi_is_written_without_b_frames(tmp_path):
    clip = make_clip(
        tmp_path / "in.avi", time_base=Fraction(1, 25), pts=range(20), options={"bf": "0"}, audio="libmp3lame"
    )
    transcode(clip, tmp_path / "out.avi")
    assert [f.pts for f in read_all(tmp_path / "out.avi")] == [f.pts for f in read_all(clip)]
    before, after = packets_of(clip, "audio"), packets_of(tmp_path / "out.avi", "audio")
    assert [bytes(p) for p in after] == [bytes(p) for p in before]


def test_asf_takes_no_codec_whose_times_it_would_shuffle(tmp_path, caplog):
    clip = make_clip(tmp_path / "in.wmv", codec="wmv2", time_base=Fraction(1, 1000), pts=regular_pts(20, step=40))
    for source, target in [("in.wmv", "out.wmv"), ("in.wmv", "out.mkv"), ("out.mkv", "out.asf")]:
        transcode(tmp_path / source, tmp_path / target)
        assert [f.time_s for f in read_all(tmp_path / target)] == [f.time_s for f in read_all(clip)]
        assert probe_video(tmp_path / target).codec == ("h264" if target == "out.mkv" else "wmv2")
    assert caplog.messages[-1].endswith(".asf has no presentation times; writing wmv2 (choose with --codec)")
    with pytest.raises(UnsupportedError, match=r"wmv cannot hold libx264 video; .*\.mkv, or choose .* --codec wmv2"):
        transcode(clip, tmp_path / "no.wmv", EncodeOptions(codec="libx264"))


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_constant_rates_may_start_between_two_ticks(tmp_path, codec):
    clip = make_clip(tmp_path / "in.mkv", pts=regular_pts(12, start=12_345))
    mpeg = tmp_path / "in.ts"
    transcode(clip, mpeg, EncodeOptions(codec=codec))
    times = frame_times(mpeg)
    assert (times[0] * 25).denominator != 1
    transcode(mpeg, tmp_path / "out.ts")
    assert frame_times(tmp_path / "out.ts") == times


def test_a_variable_rate_does_not_fit_into_mpeg4(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", pts=irregular_pts())
    with pytest.raises(MediaError, match="knows constant frame rates only"):
        transcode(clip, tmp_path / "out.mkv", EncodeOptions(codec="mpeg4"))
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_seeking_in_an_open_gop_finds_every_frame(tmp_path):
    clip = make_clip(
        tmp_path / "in.mkv",
        options={"bf": "3", "g": "8", "b-adapt": "0", "x264-params": "open-gop=1:scenecut=0"},
        pts=regular_pts(30),
    )
    for first in (7, 8, 9, 23):
        assert indices(read_all(clip, start_s=first * 0.04)) == list(range(first, 30))


# Everything beside the picture


def test_other_streams_are_copied_packet_for_packet(tmp_path):
    clip = make_clip(
        tmp_path / "in.mkv",
        audio="aac",
        subtitles=[(0.0, 0.2, "un"), (0.3, 0.2, "deux")],
        pts=regular_pts(20),
        configure=lambda output, _: output.add_attachment("a.ttf", "application/x-truetype-font", b"fontfont"),
    )
    transcode(clip, tmp_path / "out.mkv", FAST)
    for kind in ("audio", "subtitle"):
        before, after = packets_of(clip, kind), packets_of(tmp_path / "out.mkv", kind)
        assert before
        assert [bytes(p) for p in after] == [bytes(p) for p in before]
        assert [(p.pts, p.duration, p.time_base) for p in after] == [(p.pts, p.duration, p.time_base) for p in before]
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [s.type for s in container.streams] == ["video", "audio", "subtitle", "attachment"]
        assert container.streams.subtitles[0].language == "fra"
        assert container.streams.attachments[0].data == b"fontfont"


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_audio_is_interleaved_with_the_video(tmp_path, suffix):
    clip = make_clip(tmp_path / f"in{suffix}", audio="aac", pts=regular_pts(60))
    transcode(clip, tmp_path / f"out{suffix}", EncodeOptions(preset="medium"))
    before, after = packets_of(clip, "audio"), packets_of(tmp_path / f"out{suffix}", "audio")
    assert [(bytes(p), p.pts, p.dts, p.time_base) for p in after] == [
        (bytes(p), p.pts, p.dts, p.time_base) for p in before
    ]
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        ahead, clock = 0.0, {0: 0.0, 1: 0.0}
        for packet in container.demux():
            if packet.size:
                stamp = packet.pts if packet.dts is None else packet.dts
                clock[packet.stream_index] = float(stamp * packet.time_base)
                ahead = max(ahead, abs(clock[0] - clock[1]))
    assert ahead < 0.5


def test_a_stream_that_the_container_cannot_hold_is_named(tmp_path, caplog):
    clip = make_clip(tmp_path / "in.mkv", subtitles=[(0.0, 0.2, "un")], audio="aac")
    with caplog.at_level(logging.WARNING):
        transcode(clip, tmp_path / "out.mp4", FAST)
    assert "subtitle stream 2 (subrip) cannot be stored in mp4" in caplog.text
    info = probe_video(tmp_path / "out.mp4")
    assert (info.audio_streams, info.subtitle_streams) == (1, 0)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_chapters_tags_and_rotation_are_kept(tmp_path, suffix):
    def configure(output, stream):
        base = Fraction(1, 1000)
        output.set_chapters(
            [
                {
                    "id": i,
                    "start": 200 * i,
                    "end": 200 * i + 200,
                    "time_base": base,
                    "metadata": {"title": f"c{i}"},
                }
                for i in range(3)
            ]
        )
        output.metadata.update({"title": "Clip", "comment": "mine", "artist": "me"})
        stream.metadata["language"] = "ger"
        stream.set_display_rotation(90)

    clip = make_clip(tmp_path / f"in{suffix}", configure=configure)
    label = {"digital_source_type": "compositeWithTrainedAlgorithmicMedia", "comment": "aged to 70"}
    transcode(clip, tmp_path / f"out{suffix}", EncodeOptions(preset="ultrafast", metadata=label))
    info = probe_video(tmp_path / f"out{suffix}")
    assert info.rotation == 90
    assert info.display_matrix == probe_video(clip).display_matrix
    with av.open(str(clip)) as a, av.open(str(tmp_path / f"out{suffix}")) as b:
        assert [s.type for s in a.streams] == [s.type for s in b.streams]
        ours = {k.lower(): v for k, v in b.metadata.items()}
        assert (ours["title"], ours["artist"], ours["comment"]) == ("Clip", "me", "aged to 70")
        assert ours["digital_source_type"] == "compositeWithTrainedAlgorithmicMedia"
        assert b.streams.video[0].language == a.streams.video[0].language == "ger"
        assert [(c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]) for c in b.chapters()] == [
            (c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]) for c in a.chapters()
        ]


def test_quicktime_has_its_chapter_track_whatever_the_time_scales(tmp_path):
    """The streams' least common multiple has some 2^31 units in two seconds: too many for a chapter of six."""

    def configure(output, stream):
        base = Fraction(1, 1000)
        chapter = {"id": 0, "start": 0, "end": 6000, "time_base": base, "metadata": {"title": "all"}}
        output.set_chapters([chapter])

    base = Fraction(1, 30_011)
    clip = make_clip(
        tmp_path / "in.mov", pts=[0, 3 * 30_011, 6 * 30_011], time_base=base, audio="aac", configure=configure,
        container_options={"movie_timescale": "1000"},
    )  # fmt: skip
    transcode(clip, tmp_path / "out.mov")
    assert b"chap" in clip.read_bytes()
    assert b"chap" in (tmp_path / "out.mov").read_bytes()
    with av.open(str(tmp_path / "out.mov")) as container:
        (chapter,) = container.chapters()
        assert chapter["end"] * chapter["time_base"] == 6


@pytest.mark.parametrize(
    ("matrix", "rotation"),
    [
        ((0, 1, -1, 0), 270),
        ((-1, 0, 0, -1), 180),
        ((-1, 0, 0, 1), 0),
        ((1, 0, 0, -1), 180),
        ((0, 1, 1, 0), 270),
        ((0, -1, -1, 0), 90),
    ],
)
def test_rotation_of_mirrored_pictures(tmp_path, matrix, rotation):
    """Taken off, what is left of the matrix mirrors left and right at most: faces are upright."""
    a, b, c, d = (n << 16 for n in matrix)

    def configure(output, stream):
        stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))

    info = probe_video(make_clip(tmp_path / "in.mp4", configure=configure))
    assert info.rotation % 360 == rotation
    unit = np.array([[1, 0], [0, 1]])
    turn = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), rotation // 90)  # of (x, y) row vectors, as FFmpeg's
    left = turn.T @ np.array(matrix).reshape(2, 2)
    assert (left == unit).all() or (left == unit * [-1, 1]).all()


@pytest.mark.parametrize("kind", ["array", "tensor", "array of another layout", "nothing"])
def test_the_planes_are_what_is_written(tmp_path, kind):
    """Whatever stands in a frame's planes is encoded, not what the decoder had made of it."""
    source = make_clip(tmp_path / "in.mkv", codec="ffv1", pts=regular_pts(3))
    with VideoReader(source) as reader, VideoWriter(tmp_path / "out.mkv", reader) as writer:
        wanted = []
        for frame in reader:
            planes = [np.clip(plane.astype(int) + 7, 0, 255).astype(np.uint8) for plane in frame.planes]
            if kind == "tensor":
                frame = dataclasses.replace(frame, planes=tuple(torch.from_numpy(p.copy()) for p in planes))
            elif kind == "array of another layout":
                frame = dataclasses.replace(frame, planes=tuple(np.asfortranarray(p) for p in planes))
            elif kind == "array":
                frame = dataclasses.replace(frame, planes=tuple(planes))
            else:
                planes = [plane.copy() for plane in frame.planes]
            wanted.append(planes)
            writer.write(frame)
    with VideoReader(tmp_path / "out.mkv") as reader:
        for frame, planes in zip(reader, wanted, strict=True):
            for plane, want in zip(frame.planes, planes, strict=True):
                np.testing.assert_array_equal(plane, want)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_writable_frame_leaves_the_given_one_alone(tmp_path, as_tensor):
    with VideoReader(make_clip(tmp_path / "in.mp4", pts=regular_pts(3))) as reader:
        for frame in reader:
            if as_tensor:
                frame = dataclasses.replace(frame, planes=tuple(torch.from_numpy(p.copy()) for p in frame.planes))
            before = [np.array(plane) for plane in frame.planes]
            edited = writable(writable(frame))
            for plane in edited.planes:
                plane[:] = 3
            for plane, was in zip(frame.planes, before, strict=True):
                np.testing.assert_array_equal(plane, was)
            for plane in to_native(edited).planes:
                assert set(bytes(plane)[: plane.width]) == {3}


def test_tags_keep_one_comment_and_track_titles(tmp_path):
    def configure(output, stream):
        output.metadata["comment"] = "mine"
        stream.metadata["title"] = "Camera A"

    mkv = make_clip(tmp_path / "in.mkv", configure=configure)  # whose tags have names in capitals
    transcode(mkv, tmp_path / "out.mkv", EncodeOptions(preset="ultrafast", metadata={"comment": "mine; aged"}))
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [v for k, v in container.metadata.items() if k.lower() == "comment"] == ["mine; aged"]
    mp4 = make_clip(tmp_path / "in.mp4", configure=configure)
    transcode(mp4, tmp_path / "out.mp4", FAST)
    with av.open(str(mp4)) as before, av.open(str(tmp_path / "out.mp4")) as after:
        assert before.streams.video[0].metadata["name"] == "Camera A" == after.streams.video[0].metadata["name"]


def test_what_a_container_drops_is_said(tmp_path, caplog):
    clip = make_clip(tmp_path / "in.mp4", pts=regular_pts(4))
    label = EncodeOptions(preset="ultrafast", metadata={"comment": "aged"})
    for suffix in (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".flv", ".nut", ".ts", ".3gp", ".h264"):
        caplog.clear()
        target = tmp_path / f"out{suffix}"
        transcode(clip, target, label)
        with av.open(str(target)) as container:
            is_labelled = "aged" in container.metadata.values()
        said = f"{target}: {suffix} files keep no comment, so this one carries no label"
        assert caplog.messages == ([] if is_labelled else [said])
    transcode(clip, tmp_path / "quiet.ts", FAST)
    assert len(caplog.messages) == 1

    webm = make_clip(tmp_path / "in.webm", codec="libvpx-vp9", pixel_format="yuva420p", pts=regular_pts(4))
    transcode(webm, tmp_path / "out.webm")
    assert "its transparency is in a second VP8 or VP9 picture, which is left out" in caplog.messages[-1]
    with av.open(str(tmp_path / "out.webm")) as container:
        assert not {"alpha_mode", "ALPHA_MODE"} & container.streams.video[0].metadata.keys()


def test_cover_art_is_kept(tmp_path):
    picture = make_frame(0, "rgb24")
    with av.open(str(tmp_path / "in.mp4"), "w") as output:
        video = output.add_stream("libx264", rate=25, time_base=TIME_BASE)
        cover = output.add_stream("png", rate=1)
        for stream, pixel_format in ((video, "yuv420p"), (cover, "rgb24")):
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        cover.disposition = av.stream.Disposition.attached_pic
        output.start_encoding()
        output.mux([*cover.encode(picture), *cover.encode(None)])
        for index, pts in enumerate(regular_pts(4)):
            frame = make_frame(index)
            frame.pts, frame.time_base = pts, TIME_BASE
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    for source, target in (("in.mp4", "out.mp4"), ("in.mp4", "out.mkv"), ("out.mkv", "again.mkv")):
        assert transcode(tmp_path / source, tmp_path / target, FAST) == 4
        assert [bytes(p) for p in packets_of(tmp_path / target, "video", 1)] == [
            bytes(p) for p in packets_of(tmp_path / "in.mp4", "video", 1)
        ]


def test_time_code_track_is_kept_once(tmp_path):
    clip = make_clip(
        tmp_path / "in.mov",
        time_base=Fraction(1, 25),
        pts=range(5),
        configure=lambda _, stream: stream.metadata.update(timecode="01:02:03:04"),
    )
    transcode(clip, tmp_path / "out.mov", FAST)
    with av.open(str(tmp_path / "out.mov")) as container:
        assert [s.metadata.get("timecode") for s in container.streams] == ["01:02:03:04"] * 2


def test_a_range_has_the_time_code_and_the_subtitle_of_its_first_frame(tmp_path):
    clip = make_clip(
        tmp_path / "in.mkv",
        time_base=Fraction(1, 1000),
        pts=range(0, 4000, 40),
        draw=lambda index: make_frame(index % 16),
        subtitles=[(0.2, 0.3, "gone"), (0.5, 1.0, "still there"), (2.0, 1.0, "later")],
        configure=lambda _, stream: stream.metadata.update(timecode="01:02:58:24"),
    )
    with VideoReader(clip, start_s=1, end_s=3) as reader, VideoWriter(tmp_path / "out.mkv", reader) as writer:
        for frame in reader:
            writer.write(frame)
    with av.open(str(tmp_path / "out.mkv")) as container:
        stream = container.streams.video[0]
        assert {"TIMECODE": "01:02:59:24"}.items() <= {k.upper(): v for k, v in stream.metadata.items()}.items()
    shown = [
        (bytes(p), p.pts * p.time_base, p.duration * p.time_base) for p in packets_of(tmp_path / "out.mkv", "subtitle")
    ]
    assert shown == [(b"still there", 0, Fraction(1, 2)), (b"later", 1, 1)]


@pytest.mark.parametrize(
    ("timecode", "frames", "rate", "expected"),
    [
        ("01:00:00:00", 25, Fraction(25), "01:00:01:00"),
        ("23:59:59:24", 1, Fraction(25), "00:00:00:00"),
        ("00:00:59;29", 1, Fraction(30000, 1001), "00:01:00;02"),
        ("00:09:59;29", 1, Fraction(30000, 1001), "00:10:00;00"),
        ("00:00:00;00", 17982, Fraction(30000, 1001), "00:10:00;00"),
        ("00:00:00;00", 107892, Fraction(30000, 1001), "01:00:00;00"),
        ("00:00:59;59", 1, Fraction(60000, 1001), "00:01:00;04"),
        ("unknown", 1, Fraction(25), "unknown"),
    ],
)
def test_time_codes_of_later_frames(timecode, frames, rate, expected):
    assert advance_timecode(timecode, frames, rate) == expected


def test_interlacing_is_kept(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", options={"flags": "+ildct+ilme", "x264-params": "tff=1"})
    transcode(clip, tmp_path / "out.mkv", FAST)
    assert probe_video(clip).field_order == probe_video(tmp_path / "out.mkv").field_order == 2


@pytest.mark.parametrize(
    ("codec", "audio", "suffix"), [("libvpx-vp9", "libopus", ".webm"), ("libx264", "pcm_s16le", ".mov")]
)
def test_other_audio_codecs_are_copied(tmp_path, codec, audio, suffix):
    clip = make_clip(tmp_path / f"in{suffix}", codec=codec, audio=audio)
    transcode(clip, tmp_path / f"out{suffix}")
    before, after = packets_of(clip, "audio"), packets_of(tmp_path / f"out{suffix}", "audio")
    assert [(bytes(p), p.pts) for p in after] == [(bytes(p), p.pts) for p in before]


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", ".mp4"), ("libx264", ".mkv"), ("libx265", ".mp4"), ("libx265", ".mkv")]
)
def test_colour_tags_and_pixel_aspect_are_kept(tmp_path, codec, suffix):
    def configure(_, stream):
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = 9, 1, 9, 16
        context.sample_aspect_ratio = Fraction(4, 3)

    clip = make_clip(
        tmp_path / f"in{suffix}",
        codec=codec,
        pixel_format="yuv420p10le",
        configure=configure,
        options={"chroma_sample_location": "topleft"},
    )
    transcode(clip, tmp_path / f"out{suffix}", FAST)
    before, after = probe_video(clip), probe_video(tmp_path / f"out{suffix}")
    assert after.color_tags == before.color_tags == (9, 1, 9, 16)
    assert after.sample_aspect_ratio == Fraction(4, 3)
    assert after.color == ColorSpec(matrix="bt2020", full_range=False, chroma_siting="topleft")
    assert (after.codec, after.pixel_format, after.hdr) == (before.codec, "yuv420p10le", "pq")
    if (codec, suffix) == ("libx265", ".mp4"):
        with av.open(str(tmp_path / "out.mp4")) as container:
            assert container.streams.video[0].codec_context.codec_tag == "hvc1"


@pytest.mark.parametrize(
    ("codec", "pixel_format", "suffix"),
    [("v210", "yuv422p10le", ".mov"), ("ffv1", "yuv420p", ".mkv"), ("libx265", "yuv420p", ".mp4")],
)
def test_the_field_order_is_kept_where_the_encoder_knows_no_fields(tmp_path, codec, pixel_format, suffix):
    options = {"field_order": "bb"}
    clip = make_clip(tmp_path / f"in{suffix}", codec=codec, pixel_format=pixel_format, options=options)
    transcode(clip, tmp_path / f"out{suffix}")
    assert probe_video(tmp_path / f"out{suffix}").field_order == probe_video(clip).field_order == 3


def test_hdr_is_not_written_in_eight_bits(tmp_path, caplog):
    info = dataclasses.replace(probe_video(make_clip(tmp_path / "in.mp4")), codec="vp9", pixel_format="yuv420p10le")
    assert choose_encoder(info, EncodeOptions()).name == "libvpx-vp9"
    encoder = choose_encoder(dataclasses.replace(info, hdr="pq"), EncodeOptions())
    assert (encoder.name, encoder.pixel_format) == ("libx264", "yuv420p10le")
    assert "no encoder here writes vp9 yuv420p10le; writing libx264 yuv420p10le" in caplog.messages[-1]


def add_to_sample_entry(path, codec, box):
    """Put a box at the end of the sample entry of an MP4 file whose moov is its last box."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(codec) - 4
    end = entry + int.from_bytes(data[entry : entry + 4], "big")
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", codec):
        at = (data.index(kind, data.index(b"moov")) if kind != codec else entry + 4) - 4
        length = int.from_bytes(data[at : at + 4], "big") + len(box)
        data[at : at + 4] = length.to_bytes(4, "big")
    path.write_bytes(data[:end] + box + data[end:])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (b"dvvC" + bytes([1, 0, 8 << 1, 0]) + bytes(20), r"its Dolby Vision metadata \(profile 8\) is left out"),
        (b"st3d" + bytes(4) + b"\1", "that its picture is stereoscopic is left out"),
    ],
)
def test_what_a_container_says_of_the_picture_and_no_encoder_writes_is_said(tmp_path, caplog, box, message):
    clip = make_clip(tmp_path / "in.mp4")
    transcode(clip, tmp_path / "out.mp4")
    assert not caplog.messages
    add_to_sample_entry(clip, b"avc1", (4 + len(box)).to_bytes(4, "big") + box)
    transcode(clip, tmp_path / "out2.mp4")
    assert re.search(message, caplog.text)
    assert len(packets_of(tmp_path / "out2.mp4", "video")) == FRAMES


def test_dolby_vision_of_profile_5_is_refused(tmp_path):
    clip = make_clip(tmp_path / "in.mp4")
    box = b"dvcC" + bytes([1, 0, 5 << 1, 0]) + bytes(20)
    add_to_sample_entry(clip, b"avc1", (4 + len(box)).to_bytes(4, "big") + box)
    with pytest.raises(UnsupportedError, match=r"is Dolby Vision of profile 5, .* convert it to HDR10 first"):
        transcode(clip, tmp_path / "out.mp4")


@pytest.mark.parametrize("siting", ["left", "center", "topleft", "top"])
def test_the_chroma_siting_is_found(tmp_path, siting):
    clip = make_clip(tmp_path / "in.mp4", options={"chroma_sample_location": siting})
    assert probe_video(clip).chroma_siting == siting


def test_interlaced_top_first_is_no_chroma_siting(tmp_path):
    options = {"flags": "+ildct+ilme", "field_order": "tt"}
    clip = make_clip(tmp_path / "in.mov", codec="prores_ks", pixel_format="yuv422p10le", options=options)
    assert probe_video(clip).chroma_siting is None


def test_side_data_of_a_kind_without_a_name_does_no_harm(tmp_path):
    """FFmpeg gives the EXIF data of a JPEG as side data that PyAV 18 cannot name."""
    exif = Image.Exif()
    exif[0x010E] = "a description"
    with av.open(str(tmp_path / "exif.avi"), "w") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for pts in range(3):
            data = io.BytesIO()
            Image.new("RGB", (64, 48), (90, 80, 70)).save(data, "JPEG", exif=exif)
            packet = av.Packet(data.getvalue())
            packet.pts = packet.dts = pts
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            output.mux(packet)
    transcode(tmp_path / "exif.avi", tmp_path / "out.avi")
    assert len(packets_of(tmp_path / "out.avi", "video")) == 3


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_hdr_mastering_metadata_is_kept(tmp_path, codec):
    key = {"libx264": "x264-params", "libx265": "x265-params"}[codec]
    light = {"libx264": "cll", "libx265": "log-level=error:max-cll"}[codec]
    name = {"libx264": "mastering-display", "libx265": "master-display"}[codec]
    display = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
    clip = make_clip(
        tmp_path / "in.mp4",
        codec=codec,
        pixel_format="yuv420p10le",
        options={key: f"{name}={display}:{light}=1000,400"},
    )
    transcode(clip, tmp_path / "out.mp4", FAST)
    before, after = probe_video(clip), probe_video(tmp_path / "out.mp4")
    assert before.mastering_display == pytest.approx((0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.329, 0.005, 1000))
    assert after.mastering_display == before.mastering_display
    assert after.content_light == before.content_light == (1000, 400)


@pytest.mark.parametrize(
    ("tags", "height", "pixel_format", "expected"),
    [
        ((2, 0), 48, "yuv420p", ColorSpec(matrix="bt601")),
        ((2, 0), 720, "yuv420p", ColorSpec(matrix="bt709")),
        ((1, 2), 48, "yuv420p", ColorSpec(matrix="bt709", full_range=True)),
        ((5, 0), 48, "yuvj420p", ColorSpec(matrix="bt601", full_range=True)),
    ],
)
def test_colour_of_the_samples(tmp_path, tags, height, pixel_format, expected):
    def configure(_, stream):
        stream.codec_context.colorspace, stream.codec_context.color_range = tags

    clip = make_clip(
        tmp_path / "in.mkv",
        pixel_format=pixel_format,
        size=(64, height),
        pts=regular_pts(2),
        configure=configure,
    )
    assert probe_video(clip).color == expected


# Codecs


@pytest.mark.parametrize(
    ("codec", "suffix", "pixel_format"),
    [
        ("libx264", ".mp4", "yuv422p10le"),
        ("libx264", ".mkv", "yuvj420p"),
        ("libx265", ".mp4", "yuv420p10le"),
        ("libsvtav1", ".mp4", "yuv420p10le"),
        ("libvpx-vp9", ".webm", "yuv444p"),
        ("prores_ks", ".mov", "yuv422p10le"),
        ("mjpeg", ".avi", "yuvj422p"),
        ("mpeg4", ".mp4", "yuv420p"),
        ("mpeg2video", ".ts", "yuv420p"),
        ("ffvhuff", ".avi", "yuv420p"),
        ("libx264rgb", ".mkv", "rgb24"),
    ],
)
def test_codec_and_pixel_format_follow_the_source(tmp_path, codec, suffix, pixel_format):
    base = Fraction(1, 25) if codec in ("mpeg4", "mpeg2video", "mjpeg", "ffvhuff") else TIME_BASE
    step = int(Fraction(1, 25) / base)
    clip = make_clip(
        tmp_path / f"in{suffix}",
        codec=codec,
        pixel_format=pixel_format,
        time_base=base,
        pts=[step * (i + 25) for i in range(8)],
        size=(128, 96),
        container_options={"mpegts_copyts": "1"} if suffix == ".ts" else {},
    )
    assert transcode(clip, tmp_path / f"out{suffix}") == 8
    before, after = probe_video(clip), probe_video(tmp_path / f"out{suffix}")
    assert (after.codec, after.pixel_format) == (before.codec, before.pixel_format)
    assert after.profile == before.profile or codec not in ("libx264", "prores_ks")
    source, result = read_all(clip), read_all(tmp_path / f"out{suffix}")
    assert [f.time_s for f in result] == [f.time_s for f in source]
    for a, b in zip(source, result, strict=True):
        scale = 2 ** (a.layout.bit_depth - 8)
        assert np.abs(a.planes[0].astype(float) - b.planes[0]).mean() / scale < 8


def test_full_range_survives_a_change_of_codec(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", pixel_format="yuvj420p")
    transcode(clip, tmp_path / "out.mkv", EncodeOptions(codec="ffv1"))
    assert planes_equal(read_all(clip), read_all(tmp_path / "out.mkv"))
    assert probe_video(tmp_path / "out.mkv").color.full_range


@pytest.mark.parametrize("height", [64, 720])
def test_rgb_that_is_written_as_yuv_keeps_its_colours(tmp_path, height):
    red = np.full((height, 64, 3), (200, 60, 20), np.uint8)
    clip = make_clip(
        tmp_path / "in.mkv",
        codec="libx264rgb",
        pixel_format="rgb24",
        size=(64, height),
        draw=lambda index: av.VideoFrame.from_ndarray(red, "rgb24"),
    )
    transcode(clip, tmp_path / "out.mkv", EncodeOptions(codec="libx264", crf=1))
    assert probe_video(tmp_path / "out.mkv").color.matrix == "bt709"
    with av.open(str(tmp_path / "out.mkv")) as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24", src_colorspace="ITU709")
    np.testing.assert_allclose(shown.mean((0, 1)), (200, 60, 20), atol=3)


@pytest.mark.parametrize(
    ("pixel_format", "profile", "expected"),
    [("yuv422p", "dnxhr_sq", "DNXHR SQ"), ("yuv422p10le", "dnxhr_hqx", "DNXHR HQX"), ("yuv422p", None, "DNXHR HQ")],
)
def test_dnxhd_keeps_its_profile(tmp_path, pixel_format, profile, expected):
    size = (1920, 1080) if profile is None else (256, 128)
    options = {"profile": profile} if profile else {"b": "120M"}
    clip = make_clip(
        tmp_path / "in.mov", codec="dnxhd", pixel_format=pixel_format, size=size, options=options, pts=regular_pts(2)
    )
    transcode(clip, tmp_path / "out.mov")
    info = probe_video(tmp_path / "out.mov")
    assert (info.codec, info.profile, info.pixel_format) == ("dnxhd", expected, pixel_format)


def test_a_codec_without_encoder_falls_back_with_a_warning(tmp_path, caplog):
    clip = make_clip(tmp_path / "in.avi", codec="wmv2", time_base=Fraction(1, 25), pts=regular_pts(4, step=1))
    with caplog.at_level(logging.WARNING):
        transcode(clip, tmp_path / "out.mkv", FAST)
    assert "no encoder here writes wmv2 yuv420p; writing libx264 yuv420p" in caplog.text
    assert probe_video(tmp_path / "out.mkv").codec == "h264"


def test_options_reach_the_encoder(tmp_path):
    info = probe_video(make_clip(tmp_path / "in.mp4"))
    encoder = choose_encoder(info, EncodeOptions(crf=30, preset="fast", encoder_options={"tune": "grain"}))
    assert (encoder.name, encoder.pixel_format) == ("libx264", "yuv420p")
    assert encoder.options == {
        "crf": "30", "preset": "fast", "threads": "6", "tune": "grain", "chroma_sample_location": "left"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        ("out.ts", {"codec": "ffv1"}, UnsupportedError, r"ts cannot hold ffv1 video; name the output.*\.mkv"),
        ("out.xyz", {}, UnsupportedError, "suffix that names no container"),
        ("out.mkv", {"codec": "nosuch"}, UnsupportedError, "no encoder 'nosuch'"),
        ("out.mkv", {"codec": "aac"}, UnsupportedError, "aac encodes audio, not video"),
        ("out.mkv", {"codec": "ffv1", "crf": 20}, UnsupportedError, "ffv1 has no constant quality"),
        ("out.mkv", {"codec": "ffv1", "preset": "fast"}, UnsupportedError, "ffv1 has no presets"),
        ("out.mkv", {"encoder_options": {"nosuch": "1"}}, UnsupportedError, "libx264 has no option nosuch"),
        ("out.mkv", {"preset": "warp"}, MediaError, "libx264 refuses"),
    ],
)
def test_what_cannot_be_encoded_is_said_before_any_work(tmp_path, target, options, error, message):
    clip = make_clip(tmp_path / "in.mp4")
    with VideoReader(clip) as reader, pytest.raises(error, match=message):
        VideoWriter(tmp_path / target, reader, EncodeOptions(**options))
    assert os.listdir(tmp_path) == ["in.mp4"]


# Files


def test_output_appears_at_the_end_and_only_on_success(tmp_path):
    clip = make_clip(tmp_path / "in.mp4")
    with VideoReader(clip) as reader, VideoWriter(tmp_path / "out.mp4", reader) as writer:
        for frame in reader:
            writer.write(frame)
            assert not (tmp_path / "out.mp4").exists()
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]

    def fail() -> None:
        with VideoReader(clip) as reader, VideoWriter(tmp_path / "no.mp4", reader) as writer:
            writer.write(next(iter(reader)))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]


def test_two_writers_of_one_output_do_not_share_a_partial_file(tmp_path, monkeypatch):
    clip = make_clip(tmp_path / "in.mp4")
    with VideoReader(clip) as reader, VideoWriter(tmp_path / "out.mp4", reader, FAST) as writer:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # another process
        transcode(clip, tmp_path / "out.mp4", FAST, end_s=0.2)
        for frame in reader:
            writer.write(frame)
    assert len(read_all(tmp_path / "out.mp4")) == FRAMES
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]


def test_names_may_be_as_long_as_the_file_system_takes(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", pts=regular_pts(2))
    transcode(clip, tmp_path / f"{'w' * 251}.mp4", FAST)
    assert f"{'w' * 251}.mp4" in os.listdir(tmp_path)
    with pytest.raises(MediaError, match=r"cannot be written .*too long"):
        transcode(clip, tmp_path / f"{'w' * 300}.mp4", FAST)


def test_check_output(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", pts=regular_pts(2))
    (tmp_path / "there.mp4").write_bytes(b"x")
    (tmp_path / "link.mp4").hardlink_to(clip)
    assert check_output(tmp_path / "there.mp4", [clip], overwrite=True) == tmp_path / "there.mp4"
    for name, message in [
        ("there.mp4", "exists; pass --overwrite"),
        ("no/out.mp4", "no does not exist; make it first"),
        ("", "is a folder"),
    ]:
        with pytest.raises(MediaError, match=message):
            check_output(tmp_path / name, [clip])
    with pytest.raises(MediaError, match="is the input"):
        check_output(tmp_path / "link.mp4", [clip], overwrite=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.mp4", None, "does not exist"),
        ("empty.mp4", b"", r"is empty \(0 bytes\)"),
        ("text.mp4", b"Not a video at all, only text.\n" * 50, "it holds text"),
        ("text.txt", b"Not a video at all, only text.\n" * 50, "text"),
        ("noise.mp4", bytes(range(256)) * 40, "not a readable video"),
    ],
)
def test_bad_inputs(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=message):
        probe_video(tmp_path / name)


def test_folder_audio_and_still_are_no_videos(tmp_path):
    with pytest.raises(MediaError, match="is a folder"):
        probe_video(tmp_path)
    with av.open(str(tmp_path / "sound.m4a"), "w") as output:
        stream = output.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(MediaError, match=r"no video stream \(audio only\)"):
        probe_video(tmp_path / "sound.m4a")
    make_frame(0).save(tmp_path / "still.png")
    with pytest.raises(MediaError, match="is a still image"):
        probe_video(tmp_path / "still.png")


def test_a_file_that_is_deleted_while_it_is_read(tmp_path):
    clip = make_clip(tmp_path / "in.mp4")
    with VideoReader(clip) as reader:
        frames = iter(reader)
        next(frames)
        clip.unlink()
        with pytest.raises(MediaError, match=r"is gone .*put it back and run the command"):
            list(frames)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_file_cut_short_yields_what_decodes_and_says_so(tmp_path, suffix):
    front = {"movflags": "faststart"} if suffix == ".mp4" else {}
    whole = make_clip(tmp_path / f"whole{suffix}", pts=regular_pts(30), options={"bf": "0"}, container_options=front)
    with VideoReader(whole) as reader:
        assert (len(list(reader)), reader.damage) == (30, None)
    clip = tmp_path / f"cut{suffix}"
    clip.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    with VideoReader(clip) as reader, VideoWriter(tmp_path / f"out{suffix}", reader, FAST) as writer:
        for frame in reader:
            writer.write(frame)
    assert 5 < writer.frames_written < 30
    assert "is damaged: the file ends" in reader.damage
    assert indices(read_all(tmp_path / f"out{suffix}"))[:5] == list(range(5))


def test_a_file_without_its_index_is_said_to_be_cut_short(tmp_path):
    whole = make_clip(tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(MediaError, match="cut short"):
        probe_video(tmp_path / "cut.mp4")


def test_corruption_inside_is_reported(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", pts=regular_pts(30), options={"bf": "0", "g": "5"})
    data = bytearray(clip.read_bytes())
    packets = packets_of(clip, "video")
    for packet in packets[12:14]:
        data[packet.pos + 4 : packet.pos + packet.size] = bytes(packet.size - 4)
    clip.write_bytes(data)
    with VideoReader(clip) as reader:
        frames = list(reader)
    assert reader.damage is not None
    assert "is damaged" in reader.damage
    assert indices(frames)[:12] == list(range(12))


# Real clips


@pytest.mark.parametrize(("name", "frames"), [("street_crowd_1080p.mp4", 105), ("talking_head_1080.mp4", 250)])
def test_real_clips(tmp_path, name, frames):
    if not (MEDIA / name).exists():
        pytest.skip(f"{MEDIA / name} is not there")
    assert probe_video(MEDIA / name).frame_count == frames
    assert transcode(MEDIA / name, tmp_path / name, EncodeOptions(preset="ultrafast", crf=35)) == frames
    assert frame_times(tmp_path / name) == frame_times(MEDIA / name)
    if probe_video(MEDIA / name).audio_streams:
        before, after = packets_of(MEDIA / name, "audio"), packets_of(tmp_path / name, "audio")
        assert [(bytes(p), p.pts, p.dts) for p in after] == [(bytes(p), p.pts, p.dts) for p in before]
