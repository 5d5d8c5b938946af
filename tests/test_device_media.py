"""Videos to and from a GPU, as far as that can be seen without one: tensors of the CPU, and stand-ins for NVDEC."""

import dataclasses
import logging
from contextlib import contextmanager, nullcontext

import av
import numpy as np
import pytest
import torch
from clips import FRAMES, index_of, make_clip
from frames import as_tensors, noise_frame

from faceage.errors import UnsupportedError
from faceage.kernels import clone_planes, download_planes, upload_planes
from faceage.media import codecs, device, reader
from faceage.media.codecs import Encoder, choose_encoder
from faceage.media.segment import SegmentEncoder, SegmentFormat
from faceage.media.video import EncodeOptions, VideoReader, VideoWriter, probe_video, writable

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
LOSSLESS = EncodeOptions(codec="ffv1")


def arrays_of(frame):
    """Planes of Y, U and V as arrays, whether U and V are interleaved or not."""
    planes = [plane if frame.is_array else np.from_dlpack(plane.contiguous()) for plane in frame.planes]
    shift = frame.layout.shift
    if len(planes) == 2:
        planes[1:] = planes[1][..., 0], planes[1][..., 1]
    return [plane >> shift for plane in planes]


def read_all(path, **options):
    with VideoReader(path, **options) as reader:
        return list(reader)


def assert_same(frames, others):
    assert len(frames) == len(others)
    for a, b in zip(frames, others, strict=True):
        assert a.time_s == b.time_s
        for one, other in zip(arrays_of(a), arrays_of(b), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pixel_format", ["nv12", "p010le", "yuv420p", "yuv422p10le", "gray16", "rgb48"])
def test_planes_are_in_one_piece_of_memory(pixel_format):
    frame = noise_frame(pixel_format, 98, 34, padding=3)
    uploaded = upload_planes(frame.planes, "cpu")
    for planes in (uploaded, clone_planes(uploaded), download_planes(dataclasses.replace(frame, planes=uploaded))):
        end = None
        for plane, array in zip(planes, frame.planes, strict=True):
            np.testing.assert_array_equal(np.from_dlpack(plane), array)
            pitch = plane.stride(0) * plane.element_size()
            assert pitch % 256 == 0
            assert end in (None, plane.data_ptr()), "each plane begins where the one before ends"
            end = plane.data_ptr() + plane.shape[0] * pitch
    assert len({planes[0].data_ptr() for planes in (uploaded, clone_planes(uploaded))}) == 2


@pytest.mark.parametrize(
    ("pixel_format", "size", "on_device"),
    [
        ("yuv420p", (64, 48), "nv12"),
        ("yuv420p", (37, 21), "yuv420p"),
        ("yuvj420p", (64, 48), "nv12"),
        ("yuv420p10le", (64, 48), "p010le"),
        ("yuv422p", (64, 48), "yuv422p"),
        ("yuv444p10le", (64, 48), "yuv444p10le"),
        ("gray", (64, 48), "gray"),
        ("gbrp", (64, 48), "rgb24"),
    ],
)
def test_frames_that_the_cpu_decoded_come_to_the_device_as_they_are(tmp_path, pixel_format, size, on_device):
    codec = {"gbrp": "libx264rgb", "yuvj420p": "mjpeg"}.get(pixel_format, "ffv1")
    kept = "rgb24" if pixel_format == "gbrp" else pixel_format
    clip = make_clip(tmp_path / "in.mkv", codec=codec, pixel_format=kept, size=size)
    arrays, tensors = read_all(clip), read_all(clip, device="cpu")
    assert {frame.pixel_format for frame in tensors} == {on_device}
    assert tensors[0].color == arrays[0].color
    assert_same(tensors, arrays)
    changed = [writable(frame) for frame in tensors]
    for frame in changed:
        frame.planes[0][:10] = 7 << frame.layout.shift
    with VideoReader(clip, device="cpu") as reader, VideoWriter(tmp_path / "out.mkv", reader, LOSSLESS) as writer:
        for frame in changed:
            writer.write(frame)
    for before, after in zip(arrays, read_all(tmp_path / "out.mkv"), strict=True):
        np.testing.assert_array_equal(after.planes[0][:10], 7)
        np.testing.assert_array_equal(after.planes[0][10:], before.planes[0][10:])
        for a, b in zip(after.planes[1:], before.planes[1:], strict=True):
            np.testing.assert_array_equal(a, b)


class Surface:
    """A frame as NVDEC leaves it on the GPU, with samples that lie on the host."""

    def __init__(self, native):
        is_deep = native.format.components[0].bits > 8
        self._native = native
        self.samples = native.reformat(format="p010le" if is_deep else "nv12")
        self.sw_format = self.samples.format
        self.format = av.VideoFormat("cuda", native.width, native.height)
        self.planes = [SurfacePlane(plane) for plane in self.samples.planes]
        self.width, self.height, self.pts, self.time_base = native.width, native.height, native.pts, native.time_base
        self.duration, self.is_corrupt = native.duration, native.is_corrupt


class SurfacePlane:
    """A plane that, like PyAV's of a GPU, takes no stream."""

    def __init__(self, plane):
        self.plane = plane

    def __dlpack__(self, *, stream=None):
        if stream is not None:
            raise NotImplementedError("CUDA stream synchronization is not supported.")
        return self.plane.__dlpack__()


class GPUStream:
    def __init__(self, stream, wrap):
        self._stream, self._wrap = stream, wrap
        self.codec_context = GPUContext()

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def decode(self, packet):
        return [self._wrap(frame) for frame in self._stream.decode(packet)]


class GPUContext:
    is_hwaccel = True
    thread_count = 0


class GPUContainer:
    """A container whose video is decoded by a stand-in for NVDEC."""

    def __init__(self, path, wrap):
        self._container = av.open(str(path))
        self.streams = [GPUStream(s, wrap) if s.type == "video" else s for s in self._container.streams]

    def __getattr__(self, name):
        return getattr(self._container, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()

    def demux(self, stream):
        return self._container.demux(stream._stream)

    def decode(self, stream):
        for packet in self.demux(stream):
            yield from stream.decode(packet)

    def seek(self, target, stream):
        self._container.seek(target, stream=stream._stream)


@pytest.fixture
def nvdec(monkeypatch):
    """Lets readers of "cuda:0" get what a GPU would decode, but on the host."""

    def install(wrap=Surface):
        device._say_decoded_on_host.cache_clear()
        monkeypatch.setattr(device, "_open_on_gpu", lambda info, name: GPUContainer(info.path, wrap))
        monkeypatch.setattr(device, "upload_planes", lambda planes, name: upload_planes(planes, "cpu"))

    return install


@pytest.mark.parametrize(("pixel_format", "on_device"), [("yuv420p", "nv12"), ("yuv420p10le", "p010le")])
def test_frames_that_a_gpu_decoded_are_copied_out_of_its_pool(tmp_path, nvdec, pixel_format, on_device):
    clip = make_clip(tmp_path / "in.mp4", codec="libx265", pixel_format=pixel_format)
    surfaces = []

    def wrap(native):
        surfaces.append(Surface(native))
        return surfaces[-1]

    nvdec(wrap)
    frames = read_all(clip, device="cuda:0")
    assert {frame.pixel_format for frame in frames} == {on_device}
    assert all(frame.native is None for frame in frames), "or the decoder's few surfaces would be held"
    assert_same(frames, read_all(clip))
    with VideoReader(clip, device="cuda:0") as reader:
        assert_same(list(reader.read(frames[9].pts)), frames[9:])
    surfaces[-1].samples.make_writable()
    for surface in surfaces:
        np.from_dlpack(surface.samples.planes[0]).copy()
        for plane in surface.samples.planes:
            memoryview(plane)[:] = bytes(plane.buffer_size)  # NVDEC uses a surface again
    assert index_of(arrays_of(frames[5])[0], 10 if on_device == "p010le" else 8) == 5


def test_a_stream_that_changes_its_size_is_refused(tmp_path, nvdec):
    clip = make_clip(tmp_path / "in.mp4")

    def wrap(native):
        surface = Surface(native)
        surface.sw_format = av.VideoFormat("p010le", native.width, native.height)
        return surface

    nvdec(wrap)
    with pytest.raises(UnsupportedError, match="changes from 64x48 yuv420p to 64x48 p010le on the way"):
        read_all(clip, device="cuda:0")


@pytest.mark.parametrize(
    ("pixel_format", "name"), [("yuv420p", "libx264"), ("yuv420p", "ffv1"), ("yuv420p10le", "ffv1")]
)
def test_an_encoder_on_the_device_gets_the_tensors(tmp_path, nvdec, monkeypatch, caplog, pixel_format, name):
    """From NVDEC's stand-in through the writer into a real encoder; ffv1 gets from PyAV the format that it knows."""
    source = "libx264" if pixel_format == "yuv420p" else "libx265"
    clip = make_clip(tmp_path / "in.mp4", codec=source, pixel_format=pixel_format)
    nvdec()
    monkeypatch.setattr(codecs, "_NVENC", {source: name})
    monkeypatch.setattr(codecs, "encoder_missing", lambda *_: None)
    monkeypatch.setattr(codecs, "hardware", lambda _: nullcontext())
    if name == "ffv1":
        monkeypatch.setattr(codecs, "device_format", lambda info: info.pixel_format)
    given = []
    make = av.VideoFrame.from_dlpack

    class Recorded:
        @staticmethod
        def from_dlpack(planes, **options):
            given.append([plane.data_ptr() for plane in planes])
            return make(planes, **options)

    monkeypatch.setattr(device, "VideoFrame", Recorded)
    options = EncodeOptions(crf=0) if name == "libx264" else EncodeOptions()
    with (
        caplog.at_level(logging.INFO),
        VideoReader(clip, device="cuda:0") as reader,
        VideoWriter(tmp_path / "out.mkv", reader, options) as writer,
    ):
        assert writer.encoder.on_device
        read = []
        for number, frame in enumerate(reader):
            frame = writable(frame)
            read.append([plane.data_ptr() for plane in frame.planes])
            if number == 8:
                writer.cut()
            writer.write(frame)
    assert f"encoded on cuda:0 by {name}" in caplog.text
    assert given == read
    assert len(given) == FRAMES
    assert_same(read_all(tmp_path / "out.mkv"), read_all(clip))


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p10le", "gray"])
def test_planar_tensors_go_into_an_encoder_by_dlpack(tmp_path, pixel_format):
    clip = make_clip(tmp_path / "in.mkv", codec="ffv1", pixel_format=pixel_format)
    frames = read_all(clip)
    encoder = Encoder(name="ffv1", pixel_format=pixel_format, options={}, on_device=True)
    form = SegmentFormat(encoder=encoder, info=probe_video(clip), container="matroska", extradata=None, shift=0)
    stream = codecs.add_encoder(av.open(tmp_path / "none.mkv", "w"), encoder, form.info)
    form = dataclasses.replace(form, extradata=stream.codec_context.extradata)
    segment = SegmentEncoder(form, stream)
    packets = [packet for frame in frames for packet in segment.encode(as_tensors(frame))] + segment.finish()
    decoder = av.CodecContext.create("ffv1", "r")
    decoder.extradata, decoder.width, decoder.height = form.extradata, 64, 48
    natives = [native for packet in packets for native in decoder.decode(packet)] + decoder.decode(None)
    for native, frame in zip(natives, frames, strict=True):
        for plane, array in zip(native.planes, frame.planes, strict=True):
            np.testing.assert_array_equal(np.from_dlpack(plane), array)


def decode_reasons(caplog, clip):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            frames = read_all(clip, device="cuda:0")
    assert_same(frames, read_all(clip))
    lines = [record.message for record in caplog.records if "decoded on the CPU and copied to cuda:0" in record.message]
    assert len(lines) == 1, "once a file"
    return lines[0].partition("cuda:0: ")[2]


def test_ffmpeg_gets_the_context_of_torch(monkeypatch):
    """Its own way, the primary context, is refused once torch is at work; there was no GPU to see that."""
    current = []

    @contextmanager
    def use(name):
        current.append(name)
        yield
        current.remove(name)

    def zeros(*_, device):
        assert current == [device]

    with device.hardware("cuda:1") as accelerator:
        without = dict(accelerator.options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", use)
    monkeypatch.setattr(torch, "zeros", zeros)
    with device.hardware("cuda:1") as accelerator:
        assert current == ["cuda:1"]
        assert (accelerator.device_id, accelerator.is_hw_owned) == (1, True)
        assert accelerator.options == {"primary_ctx": "0", "current_ctx": "1"}
    assert current == []
    assert without in ({"primary_ctx": "1"}, accelerator.options)


@without_gpu
def test_without_a_driver_the_cpu_decodes(tmp_path, nvdec, monkeypatch, caplog):
    really_open = device._open_on_gpu
    nvdec()
    monkeypatch.setattr(device, "_open_on_gpu", really_open)
    reason = decode_reasons(caplog, make_clip(tmp_path / "in.mp4"))
    assert reason == "FFmpeg cannot use the GPU: [Errno 1] Operation not permitted; see `faceage doctor`"


def test_without_the_driver_s_decoder_the_cpu_decodes(tmp_path, nvdec, caplog):
    nvdec(lambda native: native)  # FFmpeg falls back when it finds no libnvcuvid
    reason = decode_reasons(caplog, make_clip(tmp_path / "in.mp4"))
    assert reason == "NVDEC refused it: libnvcuvid.so.1 is missing, or this GPU does not decode such video"


def test_a_codec_that_no_gpu_decodes(tmp_path, nvdec, monkeypatch, caplog):
    nvdec()
    monkeypatch.setattr(GPUContext, "is_hwaccel", False)
    clip = make_clip(tmp_path / "in.mkv", codec="ffv1")
    assert decode_reasons(caplog, clip) == "FFmpeg has no decoder of ffv1 for a GPU"


@pytest.mark.parametrize(
    ("pixel_format", "size"), [("yuv422p", (64, 48)), ("yuv444p10le", (64, 48)), ("yuv420p", (37, 21))]
)
def test_formats_that_a_gpu_does_not_decode(tmp_path, nvdec, caplog, pixel_format, size):
    nvdec()
    clip = make_clip(tmp_path / "in.mkv", codec="ffv1", pixel_format=pixel_format, size=size)
    want = f"a GPU decodes 4:2:0 with even sides, not {pixel_format} {size[0]}x{size[1]}"
    assert decode_reasons(caplog, clip) == want


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"field_order": 2}, "it is interlaced, and which frames are, only the CPU's decoder says"),
        ({"closed_captions": True}, "its closed captions come with frames of the CPU's decoder only"),
    ],
)
def test_what_only_frames_of_the_cpu_carry_is_kept(tmp_path, nvdec, caplog, monkeypatch, changes, reason):
    nvdec()
    clip = make_clip(tmp_path / "in.mp4")
    info = dataclasses.replace(probe_video(clip), **changes)
    assert not probe_video(clip).closed_captions
    monkeypatch.setattr(reader, "probe_video", lambda path: info)
    assert decode_reasons(caplog, clip) == reason


HDR = {"mastering_display": (0.3,) * 10}


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {}, "[Errno 1] Operation not permitted"),
        ({"pixel_format": "yuv422p"}, {}, "NVENC takes 4:2:0 with even sides, not yuv422p 64x48"),
        ({"field_order": 2}, {}, "NVENC writes no interlaced video"),
        (HDR, {}, "h264_nvenc cannot carry the HDR mastering metadata"),
        ({"closed_captions": True}, {}, "h264_nvenc would get the frames without their closed captions"),
        ({"codec": "prores", "pixel_format": "yuv422p10le"}, {}, "prores_ks runs on the CPU"),
        ({}, {"codec": "libx264"}, "libx264 was asked for"),
        ({}, {"codec": "ffv1"}, "ffv1 runs on the CPU"),
        (
            {},
            {"preset": "slow"},
            "the preset and the options are for libx264; with --codec h264_nvenc they are for NVENC",
        ),
    ],
)
@without_gpu
def test_what_keeps_nvenc_from_encoding_is_said(tmp_path, caplog, changes, options, reason):
    info = dataclasses.replace(probe_video(make_clip(tmp_path / "in.mp4")), **changes)
    on_host = choose_encoder(info, EncodeOptions(**options))
    with caplog.at_level(logging.INFO):
        assert choose_encoder(info, EncodeOptions(**options), device="cuda:0") == on_host
    line = f"{info.path}: frames are copied to the host and encoded by {on_host.name}: {reason}"
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == [line]


def test_nvenc_encodes_h264_hevc_and_av1(tmp_path, monkeypatch):
    monkeypatch.setattr(codecs, "encoder_missing", lambda *_: None)
    info = probe_video(make_clip(tmp_path / "in.mp4"))
    for codec, pixel_format, want in [
        ("h264", "yuv420p", ("h264_nvenc", "nv12")),
        ("hevc", "yuv420p10le", ("hevc_nvenc", "p010le")),
        ("av1", "yuv420p", ("av1_nvenc", "nv12")),
    ]:
        there = dataclasses.replace(info, codec=codec, pixel_format=pixel_format)
        for options in (EncodeOptions(), EncodeOptions(codec=want[0], preset="p7"), EncodeOptions(crf=23)):
            encoder = choose_encoder(there, options, device="cuda")
            assert (encoder.name, encoder.pixel_format, encoder.on_device) == (*want, True)
            assert encoder.options["cq"] == ("23" if options.crf else codecs.DEFAULTS[want[0]]["cq"])
