"""The engine store: what is built, what is found again, what is refused."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from faceage.cache import cache_root
from faceage.engines import ort
from faceage.engines.base import BATCH, Axis, Program, TensorSpec, fingerprint
from faceage.engines.store import EngineStore
from faceage.errors import EngineError, ShapeError

WIDTH = Axis("width", min=4, typical=8, max=64, multiple=2)


def blur_program(weight: float = 0.5, parity_floor_db: float = 60.0) -> Program:
    def build():
        import torch

        class Blur(torch.nn.Module):
            def forward(self, x, gain):
                return torch.nn.functional.avg_pool2d(x, 2) * weight, x.mean((2, 3)) * gain

        return Blur().eval(), (torch.rand(2, 3, 8, 10), torch.rand(2, 1))

    return Program(
        name="blur",
        fingerprint=fingerprint(f"blur {weight}"),
        build=build,
        inputs=(TensorSpec("x", (BATCH, 3, 8, WIDTH)), TensorSpec("gain", (BATCH, 1))),
        outputs=(TensorSpec("y", (BATCH, 3, 4, Axis("half"))), TensorSpec("mean", (BATCH, 3))),
        parity_floor_db=parity_floor_db,
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store that holds the engine of `blur_program()`."""
    store = EngineStore(tmp_path_factory.mktemp("engines"))
    store.load(blur_program())
    return store


@pytest.fixture
def copied(stored, tmp_path):
    """A store of one's own to damage, and the programs that it built."""
    for file in stored.root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    built = []
    return EngineStore(tmp_path, built.append), built


def inputs(batch=3, width=14):
    random = np.random.default_rng(1)
    return random.random((batch, 3, 8, width), np.float32), random.random((batch, 1), np.float32)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_engine_runs_the_network(stored, backend):
    engine = stored.load(blur_program(), backend)
    x, gain = inputs()
    y, mean = engine(x, gain)
    assert (engine.name, engine.backend) == ("blur", backend)
    np.testing.assert_allclose(y, x.reshape(3, 3, 4, 2, 7, 2).mean((3, 5)) * 0.5, atol=1e-6)
    np.testing.assert_allclose(mean, x.mean((2, 3)) * gain, atol=1e-6)
    assert y.dtype == mean.dtype == np.float32


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_empty_batch_and_wrong_shapes(stored, backend):
    engine = stored.load(blur_program(), backend)
    y, mean = engine(*inputs(batch=0))
    assert y.shape == (0, 3, 4, 0)
    assert mean.shape == (0, 3)
    x, gain = inputs()
    with pytest.raises(ShapeError, match=r"input gain must be \['batch', 1\]"):
        engine(x, gain[:2])
    with pytest.raises(ShapeError, match="input x must be"):
        engine(x[..., :13], gain)
    with pytest.raises(ShapeError, match="takes 2 float32 arrays"):
        engine(x)
    with pytest.raises(ShapeError, match="takes 2 float32 arrays"):
        engine(x.astype(np.float64), gain)


def test_engine_from_several_threads(stored):
    engine = stored.load(blur_program())
    x, gain = inputs(batch=16)
    want = engine(x, gain)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: engine(x, gain), range(16)):
            np.testing.assert_array_equal(got[0], want[0])


def test_sidecar_records_what_the_engine_is(stored):
    path = stored.path(blur_program(), "onnxruntime")
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["fingerprint"] == blur_program().fingerprint
    assert record["backend"] == "onnxruntime"
    assert record["file_sha256"] == fingerprint(path)
    assert set(record["versions"]) == {"onnxruntime", "torch", "opset"}
    assert record["parity"]["psnr_db"] > 100
    assert sorted(file.suffix for file in stored.root.iterdir()) == [".json", ".onnx"]


def test_stored_engine_is_not_rebuilt_and_other_weights_are_another_file(copied):
    store, built = copied
    assert store.contains(blur_program())
    store.load(blur_program())
    assert built == []
    other = blur_program(weight=0.25)
    assert not store.contains(other)
    y, _ = store.load(other)(*inputs())
    assert built == ["blur"]
    assert store.contains(other)
    assert store.contains(blur_program())
    np.testing.assert_allclose(y.mean(), inputs()[0].mean() / 4, rtol=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no sidecar", "not json", "other fingerprint", "no engine"])
def test_damaged_engine_is_rebuilt_with_a_warning(copied, caplog, damage):
    store, built = copied
    path = store.path(blur_program(), "onnxruntime")
    sidecar = path.with_suffix(".json")
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:100])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "no sidecar":
        sidecar.unlink()
    elif damage == "not json":
        sidecar.write_text("{")
    elif damage == "other fingerprint":
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"fingerprint": "0"}))
    else:
        path.unlink()
    assert not store.contains(blur_program())
    with caplog.at_level(logging.WARNING):
        store.load(blur_program())
    assert built == ["blur"]
    assert "rebuilding engine" in caplog.text
    assert store.contains(blur_program())


def test_file_that_the_runtime_refuses_is_rebuilt(copied, caplog):
    store, built = copied
    path = store.path(blur_program(), "onnxruntime")
    path.write_bytes(b"not a model")
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"file_sha256": fingerprint(path)}))
    store.load(blur_program())(*inputs())
    assert built == ["blur"]
    assert "cannot open" in caplog.text


def test_engine_below_the_parity_floor_is_not_stored(tmp_path):
    with pytest.raises(EngineError, match="differs from torch"):
        EngineStore(tmp_path).load(blur_program(parity_floor_db=1000))
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_build_meanwhile(tmp_path):
    # The second store builds and stores while the first is about to; the first then replaces its files.
    second = EngineStore(tmp_path)
    first = EngineStore(tmp_path, lambda name: second.load(blur_program()))
    engine = first.load(blur_program())
    again = second.load(blur_program())
    np.testing.assert_array_equal(engine(*inputs())[0], again(*inputs())[0])
    assert first.contains(blur_program())
    assert len(list(tmp_path.iterdir())) == 2


def test_refusals_say_what_to_do(stored, tmp_path):
    with pytest.raises(EngineError, match=r"unknown backend .*onnxruntime, torch"):
        stored.load(blur_program(), "openvino")
    with pytest.raises(EngineError, match="runs on the CPU"):
        stored.load(blur_program(), "onnxruntime", "cuda")
    with pytest.raises(EngineError, match='unknown device "meta"'):
        stored.load(blur_program(), "torch", "meta")
    with pytest.raises(EngineError, match='unknown device "gpu"'):
        stored.load(blur_program(), "torch", "gpu")
    with pytest.raises(EngineError, match="cuda:99 is not there"):
        stored.load(blur_program(), "torch", "cuda:99")
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="set FACEAGE_CACHE"):
        EngineStore(tmp_path / "file" / "engines").load(blur_program())


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path / "a"))
    assert cache_root() == tmp_path / "a"
    assert EngineStore().root == tmp_path / "a" / "engines"
    monkeypatch.delenv("FACEAGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_root() == tmp_path / "b" / "faceage"


def test_versions_are_in_the_key(stored, monkeypatch):
    path = stored.path(blur_program(), "onnxruntime")
    monkeypatch.setattr(ort, "version", lambda name: "0.0")
    assert stored.path(blur_program(), "onnxruntime") != path
    assert not stored.contains(blur_program())


def test_fingerprint_separates_its_parts(tmp_path):
    (tmp_path / "f").write_bytes(b"ab")
    assert fingerprint("ab") == fingerprint(b"ab") == fingerprint(tmp_path / "f")
    assert fingerprint("a", "b") != fingerprint("ab")
