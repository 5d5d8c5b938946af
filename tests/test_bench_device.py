"""The measurements of the GPU path: that they run and measure what they say, on tensors of the CPU."""

import functools
import os
import types

import numpy as np
import pytest
import torch
from clips import frame_times

from faceage.bench import device as baselines
from faceage.bench import kernels
from faceage.bench.device import decode_alone, eager, encode_alone, whole_frames
from faceage.bench.kernels import bench_kernels
from faceage.bench.video import ON_DEVICE, _compare, _on_device
from faceage.engines.registry import DEFAULT_RUNTIME
from faceage.kernels.implementation import choose_implementation
from faceage.media.video import EncodeOptions, VideoReader
from faceage.pipeline.request import AgeRequest, load_networks
from faceage.types import Frame

FFV1 = EncodeOptions(codec="ffv1", overwrite=True)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "MIN_CALLS", 3)
    monkeypatch.setattr(kernels, "CROP_PX", 32)
    monkeypatch.setattr(kernels, "FACE_PX", 400)
    return functools.partial(bench_kernels, sizes=((96, 64),), faces=(1, 2), measured_s=0.001, notify=lambda _: None)


def test_every_operation_is_measured_against_its_reference(small):
    result = small()
    rows = result["rows"]
    assert [(row["operation"], row["faces"]) for row in rows[::2]] == [
        ("pyramid", 0), ("gather", 1), ("apply_change", 1), ("gather", 2), ("apply_change", 2),
    ]  # fmt: skip
    for reference, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (reference["implementation"], ours["implementation"]) == ("reference", "cpu")
        assert 0 < ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"]
        assert ours["factor"] == pytest.approx(reference["p50_ms"] / ours["p50_ms"], rel=0.02)
        assert ours["share_of_copy"] == pytest.approx(ours["gb_per_s"] / result["copy_gb_per_s"], rel=0.1, abs=0.01)


def test_compiled_references_give_what_they_give_uncompiled(monkeypatch):
    """As on a GPU, but by dynamo alone: what it cannot trace runs as it is."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "trace_numpy", True)
    frame = kernels._noise(48, 36)
    operations = kernels._operations(48, 36, (1,))
    for operation in operations:
        planes = [tuple(torch.from_numpy(plane.copy()) for plane in frame.planes) for _ in range(2)]
        frames = [Frame(planes=p, pixel_format="nv12", color=frame.color) for p in planes]
        results = [kernels._reference(operation, "cpu")(frames[0]), operation.call(frames[1], "ref")]
        for a, b in zip(*(r if isinstance(r, list) else [r] for r in results), strict=True):
            if a is not None:
                torch.testing.assert_close(a, b)
        for a, b in zip(*planes, strict=True):
            assert torch.equal(a, b)


@pytest.fixture
def load(tiny_facegan, facegan):
    """Loads `facegan` elsewhere; its engines are built."""
    return functools.partial(load_networks, model=tiny_facegan, runtime=DEFAULT_RUNTIME)


def test_decoder_and_encoder_alone(face_clip, tmp_path):
    assert decode_alone(face_clip, "cpu")["frames"] == 50
    run = encode_alone(face_clip, tmp_path / "out.mkv", FFV1, "cpu")
    assert run["frames"] == 50
    assert run["fps"] == pytest.approx(50 / run["seconds"])
    assert len(frame_times(tmp_path / "out.mkv")) == 50


def test_the_eager_run_uses_the_references(load, face_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("FACEAGE_KERNELS", "")
    networks = baselines._eager_networks(load)
    assert networks.device == "cpu", "frames are tensors there"
    assert networks.fingerprints["backend"] == "torch"
    seen = []

    def age(networks, *args, track, **options):
        seen.append((track.detect_every, os.environ["FACEAGE_KERNELS"]))
        return types.SimpleNamespace(frames=10, seconds=2.0)

    monkeypatch.setattr(baselines, "age_video", age)
    assert eager(load, face_clip, tmp_path / "out.mkv", AgeRequest(age=70), FFV1)["fps"] == 5
    assert seen == [(1, "ref")]
    on_gpu = types.SimpleNamespace(is_array=False, device="cuda:0")
    assert choose_implementation(on_gpu, "auto") == "ref"
    assert choose_implementation(kernels._noise(4, 4), "auto") == "cpu"


def test_whole_frames_change_the_face(load, face_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "WHOLE_FRAME_WIDTHS", (4, 8, 8, 8, 8))
    run = whole_frames(load, face_clip, tmp_path / "out.mkv", FFV1, "cpu", crop_px=64)
    assert run["frames"] == 50
    with VideoReader(face_clip) as before, VideoReader(tmp_path / "out.mkv") as after:
        for a, b in zip(before, after, strict=True):
            apart = np.abs(a.planes[0].astype(int) - b.planes[0])
            assert apart[60:180, 60:180].mean() > 3
            assert apart[-20:, :20].mean() < 2, "one conversion to RGB and back, and truncation"


def test_shares_of_what_decoder_and_encoder_allow():
    fps = {"transcode": 150, "faceage": 100, "decode": 400, "encode": 125, "eager": 4, "whole_frames": 2}
    result = _compare({name: [{"fps": value}] for name, value in fps.items()} | {"against": []})
    assert result["share_of_decode_and_encode"] == 0.8
    assert result["factor_over_eager"] == 25
    assert result["factor_over_whole_frames"] == 50
    runs = _on_device("load", "clip", "target", "request", "encode", "cuda:0")
    assert tuple(runs) == ON_DEVICE
    assert [run[0].__name__ for run in runs.values()] == ["decode_alone", "encode_alone", "eager", "whole_frames"]
