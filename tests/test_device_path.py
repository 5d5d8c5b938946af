"""The path of a GPU on tensors of the CPU: the same code, the same result, and no wait for the device on the way."""

import dataclasses
import sys
import threading
from contextlib import contextmanager, nullcontext
from importlib import import_module

import numpy as np
import pytest
import torch
import triton.runtime.interpreter
from frames import as_tensors
from PIL import Image
from streams import GPU, RaceError
from test_device_media import GPUContainer, Surface
from test_pipeline import LOSSLESS, decoded, moving_face, write_clip

from faceage import detect
from faceage.agers.facegan import FaceGAN
from faceage.agers.space import SpaceAger
from faceage.detect import DetectConfig, Detector
from faceage.engines import eager
from faceage.engines.base import Runtime
from faceage.engines.registry import BACKENDS
from faceage.geometry import face_mask
from faceage.kernels import maps, streams, strided, transfer
from faceage.media import codecs, device, planes, reader, segment
from faceage.media.planes import writable
from faceage.media.reader import VideoReader
from faceage.pipeline import timer
from faceage.pipeline.photos import age_frames, age_photos
from faceage.pipeline.request import AgeRequest, load_networks
from faceage.pipeline.video import age_video
from faceage.track import TrackConfig
from faceage.types import RGB, Change, Frame

# Of these names the package has the functions.
apply_change, area_means, gather, thumbnail = (
    import_module(f"faceage.kernels.{name}") for name in ("apply_change", "area_means", "gather", "thumbnail")
)
WAITS = (
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__",
    "nonzero", "unique", "masked_select", "equal", "allclose",
)  # fmt: skip
"""What of a tensor waits for its device; reading by a mask does too."""
INTERPRETER = triton.runtime.interpreter.__file__
"""Triton's, which stands in for a GPU and reads the arguments of kernels."""
FEW_BYTES = 50_000
"""What crosses the bus for a frame of one face at most: where faces may be. All else is far less: outlines of faces,
thumbnails for cuts, and what kernels are told."""
MAX_DIFFERENT = 2e-4
"""Share of the samples that may differ, by one code: changes that lie half-way between two codes."""


class OnDevice:
    """An engine that gives tensors for tensors, as those on a GPU do."""

    def __init__(self, engine):
        self._engine = engine
        self.calls_with_tensors = 0

    def __call__(self, *arrays):
        if isinstance(arrays[0], np.ndarray):
            return self._engine(*arrays)
        self.calls_with_tensors += 1
        return tuple(torch.from_numpy(np.array(out)) for out in self._engine(*(np.from_dlpack(a) for a in arrays)))


def moved_to_device(networks):
    """The same networks on engines of a device."""
    detector = networks.detector
    parts = [OnDevice(engine) for engine in (detector._pnet, detector._rnet, detector._onet)]
    return dataclasses.replace(
        networks,
        device="cpu",
        detector=Detector(*parts, detector.config),
        age_reader=OnDevice(networks.age_reader),
        identity=OnDevice(networks.identity),
    )


@pytest.fixture
def on_device(facegan):
    """FaceGAN's networks there: an optimized latent would enlarge what rounding differs."""
    ager = FaceGAN(unet=lambda size_px: OnDevice(facegan.ager._unet(size_px)), view=facegan.ager.views[0])
    return dataclasses.replace(moved_to_device(facegan), ager=ager)


class Waits(list):
    """Names of what waited."""

    largest_bytes = 0


def sent_to_device(monkeypatch, *modules):
    """Bytes of each array that functions of modules bring to a device, but for constants, which go there once."""
    sent, send = [], transfer.to_device

    def to_device(array, where):
        if sys._getframe(1).f_code.co_name != "_constant":
            sent.append(array.nbytes)
        return send(array, where)

    for module in modules:
        monkeypatch.setattr(module, "to_device", to_device)
    return sent


@contextmanager
def no_waiting():
    """Whatever waits for a tensor's device raises, but in the one place from which values go to the host.

    Yields the waits there, by their names, and the bytes of each.
    """
    waited = Waits()

    def guarded(name, original):
        def call(self, *args, **kwargs):
            caller = sys._getframe(1).f_code
            if caller.co_filename == INTERPRETER:
                return original(self, *args, **kwargs)
            if caller.co_filename != transfer.__file__ or caller.co_name != "to_host":
                raise AssertionError(f"{name} of a tensor in {caller.co_filename}:{caller.co_name}")
            waited.append(name)
            waited.largest_bytes = max(waited.largest_bytes, self.numel() * self.element_size())
            return original(self, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, guarded(name, getattr(torch.Tensor, name)))
        read, read_by_mask = torch.Tensor.__getitem__, guarded("a mask", torch.Tensor.__getitem__)

        def getitem(self, at):
            masks = [i for i in (at if isinstance(at, tuple) else (at,)) if getattr(i, "dtype", None) == torch.bool]
            return (read_by_mask if masks else read)(self, at)

        patch.setattr(torch.Tensor, "__getitem__", getitem)
        yield waited


def test_the_guard_raises_outside_the_one_place():
    with no_waiting() as waited:
        transfer.to_host(torch.ones(2))
        assert waited == ["cpu", "numpy"]
        for wait in (torch.Tensor.item, bool, float, np.asarray, torch.Tensor.nonzero, lambda x: x[x > 0]):
            with pytest.raises(AssertionError, match="of a tensor in"):
                wait(torch.ones(()))


def assert_alike(tensors, arrays):
    for a, b in zip(tensors, arrays, strict=True):
        apart = np.abs(a.astype(int) - b)
        assert apart.max() <= 1
        assert (apart > 0).mean() <= MAX_DIFFERENT


def expected_waits(frames):
    """How often a video is waited for that shows one face."""
    windows = -(-frames // TrackConfig().detect_every)
    # A GPU has sent these by the time that they are needed: thumbnails for cuts, and in each window age and appearance.
    asked_ahead = frames + windows
    followed = frames - 1  # by O-Net
    searches = len({*range(0, frames, TrackConfig().detect_every), frames - 1})
    refined = 2  # a face that is new
    # A search takes P-, R- and O-Net, and O-Net twice more for the landmarks. At key frames of a change nothing waits,
    # but for the two embeddings of each person's first one, of which the report has the cosine.
    return asked_ahead + followed + 5 * searches + refined + 1


def age_arrays_and_tensors(facegan, on_device, clip, folder):
    """The video aged of arrays and of tensors: every frame of the source, and of both."""
    request = AgeRequest(age=70, source_age=30)
    first = age_video(facegan, clip, folder / "arrays.mkv", request, encode=LOSSLESS)
    with no_waiting() as waited:
        second = age_video(on_device, clip, folder / "tensors.mkv", request, encode=LOSSLESS)
    assert waited.count("cpu") == expected_waits(first.frames)
    assert first.frames_with_faces == second.frames_with_faces == first.frames
    return [decoded(path) for path in (clip, folder / "arrays.mkv", folder / "tensors.mkv")]


@pytest.mark.parametrize("rotation", [0, 90])
def test_a_video_of_tensors_is_the_video_of_arrays(facegan, on_device, tmp_path, monkeypatch, rotation):
    pictures = [np.ascontiguousarray(np.rot90(p, -rotation // 90)) for p in moving_face(16)]
    clip = write_clip(tmp_path / "in.mkv", pictures)
    read = VideoReader._frame
    with monkeypatch.context() as patch:
        patch.setattr(VideoReader, "_frame", lambda *args: dataclasses.replace(read(*args), rotation=rotation))
        source, arrays, tensors = age_arrays_and_tensors(facegan, on_device, clip, tmp_path)
    assert on_device.detector._onet.calls_with_tensors >= 16
    assert on_device.identity.calls_with_tensors
    assert any((a != b).any() for a, b in zip(source[8], arrays[8], strict=True))
    for a, b in zip(tensors, arrays, strict=True):
        assert_alike(a, b)


def test_a_video_from_nvdec_to_nvenc_is_the_video_of_arrays(facegan, on_device, tmp_path, monkeypatch):
    """Both by stand-ins, with DLPack in and out: what is decoded "there" goes there into a real encoder.

    Decoding, tracking, searching for faces and encoding have streams of their own: nothing is read before it is there.
    """
    clip = write_clip(tmp_path / "in.mkv", moving_face(14))
    given = []
    with monkeypatch.context() as patch:
        gpu = GPU(patch)
        gpu.place(patch, device, detect, maps, planes, reader)

        def encode(frame):
            given.append(frame)
            native = device.device_frame(frame)
            for plane in frame.planes:
                gpu.check(plane)
            return native

        patch.setattr(device, "_open_on_gpu", lambda info, name: GPUContainer(info.path, Surface))
        patch.setattr(codecs, "_NVENC", {"libx264": "ffv1"})
        patch.setattr(codecs, "device_format", lambda info: info.pixel_format)  # which ffv1 knows
        patch.setattr(codecs, "encoder_missing", lambda *_: None)
        patch.setattr(codecs, "hardware", lambda _: nullcontext())
        patch.setattr(segment, "device_frame", encode)
        patch.setattr(timer, "_GPUClock", lambda device: None)
        with no_waiting():
            networks = dataclasses.replace(on_device, device="cuda:0")
            age_video(networks, clip, tmp_path / "tensors.mkv", AgeRequest(age=70, source_age=30))
    assert [frame.pixel_format for frame in given] == ["nv12"] * 14
    assert all(isinstance(plane, torch.Tensor) for frame in given for plane in frame.planes)
    assert gpu.default in gpu.used
    assert len(gpu.used) >= 3, "that of decoding, the main thread's, and those of the threads that search for faces"
    assert gpu.default not in gpu.recorded, "decoded frames are kept until who computes has read them"
    age_video(facegan, clip, tmp_path / "arrays.mkv", AgeRequest(age=70, source_age=30), encode=LOSSLESS)
    source, arrays, tensors = [decoded(path) for path in (clip, tmp_path / "arrays.mkv", tmp_path / "tensors.mkv")]
    assert any((a != b).any() for a, b in zip(source[8], arrays[8], strict=True))
    for a, b in zip(tensors, arrays, strict=True):
        assert_alike(a, b)


@pytest.mark.parametrize("forgotten", [None, "await_samples", "samples_changed"])
def test_a_stream_that_does_not_wait_is_seen(monkeypatch, forgotten):
    """The check of the test above can fail."""
    gpu = GPU(monkeypatch)
    gpu.place(monkeypatch, planes)
    for module in (apply_change, gather):
        if forgotten and hasattr(module, forgotten):
            monkeypatch.setattr(module, forgotten, lambda _: None)
    matrix = np.eye(2, 3, dtype=np.float32)
    with streams.decoding("cuda:0"):
        frame = planes.writable(as_tensors(Frame(planes=(moving_face(1)[0],), pixel_format="rgb24", color=RGB)))
    with nullcontext() if forgotten is None else pytest.raises(RaceError, match="another stream writes"):
        with streams.computing("cuda:0"):
            apply_change.apply_change(frame, Change(delta=torch.ones(3, 64, 64) / 4), matrix)
        monkeypatch.setattr(streams, "_own", threading.local())  # another thread's
        with streams.computing("cuda:0"):
            gather.gather_crops([frame], np.zeros(1, np.int64), matrix[None], 32)


def test_what_all_streams_read_is_waited_for_where_it_is_made(monkeypatch):
    settled = []
    monkeypatch.setattr(maps, "settle", lambda tensor: settled.append(tensor) or tensor)
    maps._constant.cache_clear()
    made = [maps.constant(face_mask, 48, like=torch.zeros(1)) for _ in range(2)]
    assert settled == made[:1]
    assert made[0] is made[1]


@pytest.mark.parametrize(
    ("wish", "views"),
    [({"age": 75, "source_age": 30}, 2), ({"age": 25, "source_age": 60}, 1)],
    ids=["older", "younger"],
)
def test_the_default_model_draws_on_the_device(tiny_model, tmp_path, monkeypatch, wish, views):
    """Face with FaceGAN's share, and hair of older ones; on key frames and between them.

    By torch's engines, which take arrays and tensors. No picture, no map and no change crosses the bus.
    """
    space, drawn = load_networks(model="space", runtime=Runtime(backend=BACKENDS["torch"])), []
    draw = SpaceAger.draw

    def watched(self, look, before, after, share):
        changes = draw(self, look, before, after, share)
        drawn.append((share, [change for change in changes if change is not None]))
        return changes

    monkeypatch.setattr(SpaceAger, "draw", watched)
    clip = write_clip(tmp_path / "in.mkv", moving_face(14))
    for networks, name in ((space, "arrays"), (dataclasses.replace(space, device="cpu"), "tensors")):
        drawn.clear()
        if name == "tensors":
            space.ager._canonical_beside(torch.zeros(1))
            sent = sent_to_device(monkeypatch, transfer, maps, eager)
        with no_waiting() if name == "tensors" else nullcontext([]) as waited:
            age_video(networks, clip, tmp_path / f"{name}.mkv", AgeRequest(**wish), encode=LOSSLESS)
        kinds = {type(change.delta) for share, changes in drawn[1:] for change in changes}  # the first: for the report
        assert kinds == {np.ndarray if name == "arrays" else torch.Tensor}
        assert {len(changes) for share, changes in drawn if 0 < share < 1} == {views}
    assert waited.count("cpu") == expected_waits(14)
    assert waited.largest_bytes <= FEW_BYTES
    assert 0 < max(sent) < 1000
    source, arrays, tensors = [decoded(path) for path in (clip, tmp_path / "arrays.mkv", tmp_path / "tensors.mkv")]
    assert any((a != b).any() for a, b in zip(source[8], arrays[8], strict=True))
    for a, b in zip(tensors, arrays, strict=True):
        assert_alike(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests with a GPU run the kernels there")
def test_a_video_by_the_kernels_is_the_video_of_arrays(facegan, on_device, tmp_path, monkeypatch):
    from faceage.kernels import apply_change_triton, area_means_triton, gather_triton

    # The interpreter takes as long for small blocks as for large ones.
    monkeypatch.setattr(apply_change_triton, "BLOCK", 2**16)
    monkeypatch.setattr(area_means_triton, "TILE", 2**13)
    monkeypatch.setattr(gather_triton, "BLOCK", 2**14)
    interpreter = triton.runtime.interpreter.InterpretedFunction
    launch, lock = interpreter.run, threading.Lock()

    def launch_alone(self, *args, **options):
        with lock:  # the interpreter changes Triton's own modules while it runs
            return launch(self, *args, **options)

    monkeypatch.setattr(interpreter, "run", launch_alone)
    for module in (apply_change, area_means, gather, thumbnail):
        choose = module.choose_implementation
        monkeypatch.setattr(
            module, "choose_implementation", lambda f, i, choose=choose: "triton" if not f.is_array else choose(f, i)
        )
    sent = sent_to_device(monkeypatch, transfer, maps, strided, apply_change)
    few = DetectConfig(min_face_px=47)  # few pictures in the pyramid, and the CPU shrinks none
    facegan, on_device = (
        dataclasses.replace(n, detector=Detector(n.detector._pnet, n.detector._rnet, n.detector._onet, few))
        for n in (facegan, on_device)
    )
    clip = write_clip(tmp_path / "in.mkv", moving_face(2))
    source, arrays, tensors = age_arrays_and_tensors(facegan, on_device, clip, tmp_path)
    assert 0 < max(sent) < 10_000  # what rectangles R- and O-Net see
    assert any((a != b).any() for a, b in zip(source[1], arrays[1], strict=True))
    for a, b in zip(tensors, arrays, strict=True):
        assert_alike(a, b)


def test_photos_of_tensors_are_those_of_arrays(facegan, on_device):
    photos = [Frame(planes=(picture,), pixel_format="rgb24", color=RGB) for picture in moving_face(3)[::2]]
    request = AgeRequest(age=70)
    arrays, tensors = ([writable(frame) for frame in frames] for frames in (photos, [as_tensors(p) for p in photos]))
    done = [age_frames(facegan, arrays, request)]
    with no_waiting():
        done.append(age_frames(on_device, tensors, request))
    for one, other in zip(*done, strict=True):
        assert len(one.faces) == len(other.faces) == 1
        np.testing.assert_allclose(one.faces.landmarks, other.faces.landmarks, atol=1e-2)
    assert on_device.age_reader.calls_with_tensors == 1
    for frame, other, photo in zip(arrays, tensors, photos, strict=True):
        assert (frame.planes[0] != photo.planes[0]).any()
        assert_alike([np.from_dlpack(plane) for plane in other.planes], frame.planes)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photos_go_to_the_device_and_come_back(facegan, on_device, face_picture, tmp_path, suffix):
    Image.fromarray(face_picture).save(tmp_path / f"in.{suffix}")
    written = []
    for networks in (facegan, on_device):
        items = [(tmp_path / f"in.{suffix}", tmp_path / f"{len(written)}.{suffix}")]
        (report,) = age_photos(networks, items, AgeRequest(age=70))
        assert len(report.aged) == 1
        written.append(np.asarray(Image.open(items[0][1])).astype(int))
    assert on_device.detector._onet.calls_with_tensors
    assert np.abs(written[0] - face_picture).mean() > 0.2
    apart = np.abs(written[0] - written[1])
    assert apart.max() <= (1 if suffix == "png" else 8)  # a code of a sample is up to 8 after JPEG's transform
    assert (apart > 0).mean() < 0.02
