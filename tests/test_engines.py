"""The backends and the engine store: what is built, what is found again, what is refused, how near torch it is."""

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from faceage.cache import cache_root
from faceage.engines import openvino, ort, parity, tensorrt
from faceage.engines.base import BATCH, Axis, Program, Runtime, Spec, TensorSpec, fingerprint
from faceage.engines.examples import example_faces
from faceage.engines.export import export, write_graph
from faceage.engines.registry import BACKENDS, backend_named, choose_runtime
from faceage.engines.store import EngineStore
from faceage.errors import EngineError, ShapeError
from faceage.pipeline.request import all_programs

RTX_FP16 = (BACKENDS["tensorrt"], Spec("portable", "fp16"))
OPENVINO, ORT = BACKENDS["openvino"], BACKENDS["onnxruntime"]

WIDTH = Axis("width", min=4, typical=8, max=64, multiple=2)


@cache
def graphs():
    """A folder for graphs, which this process's tests share."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def exported(program):
    """The program, its graph written."""
    write_graph(program)
    return program


@cache
def blur_program(weight: float = 0.5, width: int | Axis = 10) -> Program:
    def network(folded):
        import torch

        class Blur(torch.nn.Module):
            def forward(self, x, gain):
                return torch.nn.functional.avg_pool2d(x, 2) * weight, x.mean((2, 3)) * gain

        return Blur().eval()

    random = np.random.default_rng(0)
    half = width // 2 if isinstance(width, int) else Axis("half")
    return exported(Program(
        name="blur",
        graph=graphs() / f"blur-{weight}-{width if isinstance(width, int) else width.name}.onnx",
        checkpoints=(),
        network=network,
        examples=lambda: (random.random((2, 3, 8, 10), np.float32), random.random((2, 1), np.float32)),
        inputs=(TensorSpec("x", (BATCH, 3, 8, width)), TensorSpec("gain", (BATCH, 1))),
        outputs=(TensorSpec("y", (BATCH, 3, 4, half)), TensorSpec("mean", (BATCH, 3))),
    ))  # fmt: skip


@cache
def there_and_back_program() -> Program:
    """A convolution, and back by the transposed one with the same weights: a gradient looks like this.

    The weights are stored in half, and what is used is computed from them.
    """
    import torch
    from safetensors.torch import save_file

    stored = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    save_file({"weight": stored}, graphs() / "there-and-back.safetensors")

    def network(folded):
        from torch.nn.functional import conv2d, conv_transpose2d, leaky_relu

        class ThereAndBack(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("weight", stored.float())

            def forward(self, x, gain):
                weight = self.weight * 0.5
                y = leaky_relu(conv2d(x, weight, stride=2, padding=1), 0.2) * gain[0]
                return conv_transpose2d(y, weight, stride=2, padding=1, output_padding=1), y.mean((2, 3))

        return ThereAndBack().eval()

    random = np.random.default_rng(0)
    return exported(Program(
        name="there-and-back",
        graph=graphs() / "there-and-back.onnx",
        checkpoints=(graphs() / "there-and-back.safetensors",),
        network=network,
        examples=lambda: (random.random((3, 8, 16, 16), np.float32), random.random(2, np.float32)),
        inputs=(TensorSpec("x", (BATCH, 8, 16, 16)), TensorSpec("gain", (2,))),
        outputs=(TensorSpec("back", (BATCH, 8, 16, 16)), TensorSpec("mean", (BATCH, 8))),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store that holds the engine of `blur_program()`."""
    store = EngineStore(tmp_path_factory.mktemp("engines"))
    store.load(blur_program())
    return store


@pytest.fixture
def copied(stored, tmp_path):
    """A store of one's own to damage, and the programs that it built."""
    for file in files_of(stored):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    built = []
    return EngineStore(tmp_path, built.append), built


def run_by(backend, device="cpu", precision="fp32"):
    return Runtime(backend=BACKENDS[backend], device=device, precision=precision)


def files_of(store):
    """The files of a store, but the lock."""
    return sorted(file for file in store.root.iterdir() if not file.name.startswith("."))


def inputs(batch=3, width=10):
    random = np.random.default_rng(1)
    return random.random((batch, 3, 8, width), np.float32), random.random((batch, 1), np.float32)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_engine_runs_the_network(stored, backend, exact):
    engine = stored.load(replace(blur_program(width=WIDTH), exact=exact), run_by(backend))
    x, gain = inputs(width=14)
    y, mean = engine(x, gain)
    # OpenVINO leaves what takes pictures of any width to ONNX Runtime, unless half precision is enough for it.
    assert (engine.name, engine.backend) == ("blur", "onnxruntime" if exact and backend == "openvino" else backend)
    np.testing.assert_allclose(y, x.reshape(3, 3, 4, 2, 7, 2).mean((3, 5)) * 0.5, atol=1e-6)
    np.testing.assert_allclose(mean, x.mean((2, 3)) * gain, atol=1e-6)
    assert y.dtype == mean.dtype == np.float32


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_empty_batch_and_wrong_shapes(stored, backend):
    engine = stored.load(blur_program(width=WIDTH), run_by(backend))
    y, mean = engine(*inputs(batch=0))
    assert y.shape == (0, 3, 4, 0)
    assert mean.shape == (0, 3)
    x, gain = inputs(width=14)
    with pytest.raises(ShapeError, match=r"input gain must be \['batch', 1\]"):
        engine(x, gain[:2])
    with pytest.raises(ShapeError, match="input x must be"):
        engine(x[..., :13], gain)
    with pytest.raises(ShapeError, match="takes 2 float32 arrays"):
        engine(x)
    with pytest.raises(ShapeError, match="takes 2 float32 arrays"):
        engine(x.astype(np.float64), gain)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("count", [1, 5, 7, 8, 19])
def test_batches_of_any_size(stored, backend, count):
    x, gain = np.random.default_rng(count).random((count, 8, 16, 16), np.float32), np.float32([0.5, 0])
    want = stored.load(there_and_back_program(), run_by("torch"))(x, gain)
    for got, wanted in zip(stored.load(there_and_back_program(), run_by(backend))(x, gain), want, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_engine_from_several_threads(stored, backend):
    engine = stored.load(there_and_back_program(), run_by(backend))
    x, gain = np.random.default_rng(0).random((19, 8, 16, 16), np.float32), np.float32([0.5, 0])
    want = engine(x, gain)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: engine(x, gain), range(16)):
            np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("change", ["none", "truncated", "flipped"])
def test_what_openvino_compiled_for_batches_is_kept_and_used_while_it_is_whole(tmp_path, monkeypatch, change):
    store = EngineStore(tmp_path)
    x, gain = np.random.default_rng(0).random((9, 8, 16, 16), np.float32), np.float32([0.5, 0])
    want = store.load(there_and_back_program())(x, gain)
    kept = store.path(there_and_back_program(), OPENVINO).with_suffix(".8.cache")
    data = kept.read_bytes()
    if change == "truncated":
        kept.write_bytes(data[:-100])
    elif change == "flipped":
        kept.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    compiled = []
    compile_ = openvino._compile
    monkeypatch.setattr(openvino, "_compile", lambda program, size, *rest: (
        compiled.append(size), compile_(program, size, *rest))[1])  # fmt: skip
    for _ in range(2):
        for got, wanted in zip(store.load(there_and_back_program())(x, gain), want, strict=True):
            np.testing.assert_array_equal(got, wanted)
        assert compiled == ([] if change == "none" else [8])


def test_an_engine_of_openvino_is_for_one_cpu(stored, monkeypatch):
    assert stored.contains(blur_program())
    monkeypatch.setattr(openvino, "cpu", lambda: "another")
    assert not stored.contains(blur_program())


def test_where_nothing_can_be_written_openvino_compiles_batches_each_time(tmp_path, monkeypatch):
    store = EngineStore(tmp_path)
    store.build(there_and_back_program(), OPENVINO, Spec())
    for file in tmp_path.glob("*.cache"):
        file.unlink()

    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr("os.replace", refuse)
    x, gain = np.random.default_rng(0).random((8, 8, 16, 16), np.float32), np.float32([0.5, 0])
    assert store.load(there_and_back_program())(x, gain)[0].any()
    assert {file.suffix for file in files_of(store)} == {".blob", ".json"}


def test_openvino_s_first_use_may_be_by_two_threads():
    """Its table of types is made on first use, and two threads that made it at once would never end."""
    code = (
        "import sys, threading; from faceage.engines import openvino\n"
        "def use(): openvino._core(); barrier.wait(); sys.modules['openvino'].Type.f32.to_dtype()\n"
        "barrier, threads = threading.Barrier(4), [threading.Thread(target=use, daemon=True) for _ in range(4)]\n"
        "sys.setswitchinterval(1e-6)\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_the_runtimes_tell_nobody_that_they_are_used(stored, tmp_path):
    """OpenVINO and ONNX Runtime send messages of their use, for which they write an identifier into the home folder."""
    stored.load(there_and_back_program(), run_by("openvino"))
    stored.load(there_and_back_program(), run_by("onnxruntime"))
    code = (
        "import sys; from pathlib import Path; from faceage.engines import openvino, ort\n"
        f"ort._onnxruntime().InferenceSession({str(there_and_back_program().graph)!r})\n"
        f"openvino._core().read_model({str(there_and_back_program().graph)!r})\n"
        "print(set(sys.modules) & {'openvino_telemetry', 'openvino.tools.ovc'})"
    )
    # They keep quiet in CI and in unit tests by themselves: here they must not know.
    known = ("CI", "ORT_", "GITHUB", "BUILD", "JENKINS", "PYTEST", "XDG_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(known)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
    assert [str(path) for path in tmp_path.rglob("*")] == []


def test_an_openvino_that_cannot_be_imported_is_one_line(monkeypatch):
    openvino._core.cache_clear()
    openvino.has_bf16.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"OpenVINO cannot be imported .*; run: pip install .* --backend onnxruntime"):
        BACKENDS["openvino"].best_precision("cpu")
    assert BACKENDS["onnxruntime"].best_precision("cpu") == "fp32"


def test_bf16_is_for_cpus_that_have_it_and_networks_that_do_not_measure(stored, programs, monkeypatch):
    monkeypatch.setattr(openvino, "has_bf16", lambda: False)
    assert BACKENDS["openvino"].best_precision("cpu") == "fp32"
    with pytest.raises(EngineError, match="this CPU does not compute in bf16; use --precision fp32"):
        stored.load(there_and_back_program(), run_by("openvino", precision="bf16"))
    monkeypatch.setattr(openvino, "has_bf16", lambda: True)
    assert BACKENDS["openvino"].best_precision("cpu") == "bf16"
    for target, half in (("cpu", "bf16"), ("portable", "fp16")):
        in_half = {name for name, program in programs.items() if program.spec(target, half).precision == half}
        assert in_half == {"age-cgan-generator", "age-cgan-latent", "facegan-128", "facegan-192", "space-older"}
    assert programs["mtcnn-pnet"].spec("sm_75", "fp16").precision == "fp16"  # Turing has no other products


def test_sidecar_records_what_the_engine_is(stored):
    path = stored.path(blur_program(), BACKENDS["openvino"])
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["fingerprint"] == blur_program().fingerprint
    assert record["backend"] == "openvino"
    assert record["file_sha256"] == fingerprint(path)
    assert set(record["versions"]) == {"openvino", "machine"}
    assert record["parity"]["psnr_db"] > 100
    assert (record["target"], record["precision"]) == ("cpu", "fp32")
    assert record["shapes"]["gain"] == [[1, 1], [8, 1], [1024, 1]]
    assert record["build_seconds"] > 0
    assert sorted(file.suffix for file in files_of(stored) if file.stem == path.stem) == [".blob", ".json"]
    assert [file.name for file in stored.root.iterdir() if file.name.startswith(".")] == [".lock"]


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
    path = store.path(blur_program(), BACKENDS["openvino"])
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
    (line,) = [message for message in caplog.messages if message.startswith("rebuilding")]
    reasons = {
        "truncated": "it is damaged: its contents are not those that its sidecar names",
        "flipped": "it is damaged: its contents are not those that its sidecar names",
        "other fingerprint": "its sidecar is another engine's",
    }
    assert line.startswith(f"rebuilding engine {path.name}: {reasons.get(damage, 'it cannot be read (')}")
    assert store.contains(blur_program())


def test_file_that_the_runtime_refuses_is_rebuilt(copied, caplog):
    store, built = copied
    path = store.path(blur_program(), BACKENDS["openvino"])
    path.write_bytes(b"not a model")
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"file_sha256": fingerprint(path)}))
    store.load(blur_program())(*inputs())
    assert built == ["blur"]
    assert "cannot open" in caplog.text


def test_a_new_version_of_the_backend_is_a_reason_to_rebuild(copied, caplog, monkeypatch):
    store, built = copied
    monkeypatch.setattr(openvino, "version", lambda: "99.0")
    store.load(blur_program())
    assert built == ["blur"]
    (line,) = [message for message in caplog.messages if message.startswith("rebuilding")]
    assert "it was built with other versions (openvino 20" in line
    assert line.endswith(" -> 99.0)")


@pytest.mark.parametrize(("precision", "limit"), [("fp32", "MAX_ABS_ERROR"), ("fp16", "MIN_PSNR_DB")])
def test_engine_too_far_from_its_graph_is_not_stored(tmp_path, monkeypatch, precision, limit):
    monkeypatch.setattr(parity, limit, -1 if precision == "fp32" else 1000)
    store = EngineStore(tmp_path)
    with pytest.raises(EngineError, match=r"differs from onnxruntime .* and is not stored; use --"):
        store.build(there_and_back_program(), *((OPENVINO, Spec()) if precision == "fp32" else RTX_FP16))
    assert files_of(store) == []


def test_two_builders_wait_for_one_another(tmp_path):
    started, built = threading.Event(), []

    @contextmanager
    def slow_build(name):
        built.append(name)
        started.set()
        waiting.join(0.5)  # the second one stays behind the lock all the while
        assert waiting.is_alive()
        yield

    second = EngineStore(tmp_path, built.append)
    waiting = threading.Thread(target=lambda: started.wait() and second.load(blur_program()))
    waiting.start()
    EngineStore(tmp_path, slow_build).load(blur_program())
    waiting.join(30)
    assert built == ["blur"]
    assert {file.suffix for file in files_of(second)} == {".blob", ".json", ".cache"}


def test_a_builder_that_was_killed_is_in_nobodys_way(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from faceage.engines.store import EngineStore\n"
        "with EngineStore(Path(sys.argv[1]))._locked() as folder:\n"
        "    (folder / 'half.blob').touch(); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        os.kill(holder.pid, signal.SIGKILL)
    store = EngineStore(tmp_path)
    assert (tmp_path / ".drafts" / "half.blob").exists()
    store.load(blur_program())
    assert not (tmp_path / ".drafts").exists()


def test_refusals_say_what_to_do(stored, tmp_path):
    with pytest.raises(EngineError, match=r"unknown backend .*openvino, onnxruntime, tensorrt, aotinductor, torch"):
        backend_named("tvm")
    with pytest.raises(EngineError, match="runs on the CPU"):
        stored.load(blur_program(), run_by("onnxruntime", "cuda"))
    with pytest.raises(EngineError, match='unknown device "meta"'):
        stored.load(blur_program(), run_by("torch", "meta"))
    with pytest.raises(EngineError, match='unknown device "gpu"'):
        stored.load(blur_program(), run_by("torch", "gpu"))
    with pytest.raises(EngineError, match="cuda:99 is not there"):
        stored.load(blur_program(), run_by("torch", "cuda:99"))
    with pytest.raises(EngineError, match=r'unknown target "sm_99"; use one of: cpu, cuda, portable, sm_75'):
        Spec("sm_99")
    with pytest.raises(EngineError, match="unknown precision"):
        Spec("cpu", "int8")
    with pytest.raises(EngineError, match=r"torch is the reference, in fp32 only"):
        stored.load(blur_program(), run_by("torch", precision="fp16"))
    with pytest.raises(EngineError, match="builds for cpu in fp32, not for cpu in fp16"):
        stored.load(blur_program(), run_by("onnxruntime", precision="fp16"))
    with pytest.raises(EngineError, match="bf16 is for the CPU, not for sm_86; use --precision fp16"):
        Spec("sm_86", "bf16")
    with pytest.raises(EngineError, match="aotinductor builds nothing in bf16; use --backend openvino"):
        stored.build(blur_program(), BACKENDS["aotinductor"], Spec("cpu", "bf16"))
    with pytest.raises(EngineError, match="openvino builds for cpu in fp32 or bf16, not for cpu in fp16"):
        stored.load(blur_program(), run_by("openvino", precision="fp16"))
    with pytest.raises(EngineError, match="aotinductor builds for cpu or cuda, not for sm_86"):
        stored.build(blur_program(), BACKENDS["aotinductor"], Spec("sm_86"))
    with pytest.raises(EngineError, match="tensorrt runs on NVIDIA GPUs, not on the CPU"):
        stored.load(blur_program(), run_by("tensorrt"))
    with pytest.raises(EngineError, match="no fp32 matrix products for sm_75; use --precision fp16"):
        stored.build(blur_program(), BACKENDS["tensorrt"], Spec("sm_75"))
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="set FACEAGE_CACHE"):
        EngineStore(tmp_path / "file" / "engines").load(blur_program())


def test_a_store_that_cannot_be_changed_is_one_line(tmp_path):
    # Permissions do not bind root, who may run the tests; what is of the wrong kind cannot be removed by anybody.
    (tmp_path / "blur-0.blob").mkdir()
    with pytest.raises(EngineError, match=r"blur-0.blob cannot be removed \(.*\); make its folder writable"):
        EngineStore(tmp_path).prune([])
    (tmp_path / "blur-0.blob").rmdir()
    (tmp_path / ".drafts").touch()
    with pytest.raises(EngineError, match="set FACEAGE_CACHE to a folder that can be written"):
        EngineStore(tmp_path).prune([])


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path / "a"))
    assert cache_root() == tmp_path / "a"
    assert EngineStore().root == tmp_path / "a" / "engines"
    monkeypatch.delenv("FACEAGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_root() == tmp_path / "b" / "faceage"


def test_versions_are_in_the_key(stored, monkeypatch):
    path = stored.path(blur_program(), BACKENDS["openvino"])
    monkeypatch.setattr(openvino, "version", lambda: "0.0")
    assert stored.path(blur_program(), BACKENDS["openvino"]) != path
    assert not stored.contains(blur_program())


def test_fingerprint_separates_its_parts(tmp_path):
    (tmp_path / "f").write_bytes(b"ab")
    assert fingerprint("ab") == fingerprint(b"ab") == fingerprint(tmp_path / "f")
    assert fingerprint("a", "b") != fingerprint("ab")


@pytest.fixture(scope="session")
def programs(tiny_model, tiny_facegan):
    """All networks of the tiny models, and of the bundled space model, by name."""
    models = (tiny_model, tiny_facegan, "space")
    return {program.name: program for model in models for program in all_programs(model)}


NETWORKS = [
    "age-cgan-encoder", "age-cgan-generator", "age-cgan-latent", "identity", "age-estimator",
    "facegan-128", "facegan-192", "space-coordinates", "space-hair",
    "space-older", "mtcnn-pnet", "mtcnn-rnet", "mtcnn-onet",
]  # fmt: skip


def test_the_matrix_names_every_network(programs):
    assert sorted(programs) == sorted(NETWORKS)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("backend", "device", "precision"),
    [
        ("openvino", "cpu", "fp32"), ("openvino", "cpu", "bf16"), ("torch", "cpu", "fp32"),
        ("aotinductor", "cpu", "fp32"),
        *(pytest.param(*case, marks=pytest.mark.gpu) for case in [
            ("torch", "cuda", "fp32"),
            ("aotinductor", "cuda", "fp32"), ("aotinductor", "cuda", "fp16"),
            ("tensorrt", "cuda", "fp32"), ("tensorrt", "cuda", "fp16"),
        ]),
    ],
)  # fmt: skip
def test_every_backend_agrees_with_the_graph(programs, network, backend, device, precision):
    """Max abs 1e-3 in fp32, 45 dB in fp16 and bf16, on real faces: `check_parity` refuses what does not."""
    if backend == "aotinductor" and device == "cpu" and network != "mtcnn-rnet":
        pytest.skip("AOTInductor compiles for ten seconds a network on a CPU; there one is enough")
    require_gpu(backend, device)
    if precision == "bf16" and not openvino.has_bf16():
        pytest.skip("this CPU does not compute in bf16")
    program = programs[network]
    engine = EngineStore().load(program, run_by(backend, device, precision))
    precision = program.spec("cpu" if device == "cpu" else "cuda", precision).precision
    found = parity.check_parity(program, engine, ort.open_graph(program, program.graph), precision)
    assert found["max_abs_error"] > 0 or engine.backend == "onnxruntime"  # they are two


def require_gpu(backend, device):
    """Skip without a GPU that the backend runs on, or fail if there has to be one."""
    if device == "cpu":
        return
    try:
        BACKENDS[backend].targets(device)
    except EngineError as error:
        (pytest.fail if os.environ.get("FACEAGE_REQUIRE_GPU") == "1" else pytest.skip)(str(error))


def test_a_gpu_skip_can_be_made_a_failure(monkeypatch):
    monkeypatch.setattr(tensorrt.eager, "kind_of", _no_device)
    with pytest.raises(pytest.skip.Exception, match="not there"):
        require_gpu("tensorrt", "cuda")
    monkeypatch.setenv("FACEAGE_REQUIRE_GPU", "1")
    with pytest.raises(pytest.fail.Exception, match="not there"):
        require_gpu("tensorrt", "cuda")


def _no_device(device):
    raise EngineError(f"device {device} is not there")


def test_the_best_of_what_is_here():
    assert choose_runtime(device="cpu").backend is OPENVINO
    with pytest.raises(EngineError, match="cuda:99 is not there"):
        choose_runtime(device="cuda:99")
    assert BACKENDS["onnxruntime"].best_precision("cpu") == BACKENDS["torch"].best_precision("cuda") == "fp32"
    assert BACKENDS["tensorrt"].best_precision("cuda:1") == "fp16"


def test_engines_on_tensors_give_tensors(stored):
    import torch

    engine = stored.load(blur_program(), run_by("torch"))
    arrays = inputs()
    for got, want in zip(engine(*map(torch.from_numpy, arrays)), engine(*arrays), strict=True):
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got.numpy(), want)
    empty = engine(*map(torch.from_numpy, inputs(batch=0)))
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 3, 4, 5), (0, 3)]


def test_half_precision_is_for_products_alone(programs):
    import torch

    program = programs["age-cgan-generator"]
    examples = tuple(map(torch.from_numpy, program.examples()))
    exported = export(program, program.network(True), examples, "fp16")
    halves = {
        str(node.target).split(".")[1]
        for node in exported.graph.nodes
        if node.op == "call_function" and getattr(node.meta["val"], "dtype", None) == torch.float16
    }
    assert {"to", "linear"} < halves <= {"to", "linear", "conv2d", "conv_transpose2d"}
    outputs = exported.module()(*examples)
    assert outputs.dtype == torch.float32


def test_example_faces_are_real_and_differ():
    faces = example_faces(5, 64)
    assert faces.shape == (5, 3, 64, 64)
    assert faces.dtype == np.float32
    assert -1 <= faces.min() < -0.5
    assert 0.5 < faces.max() <= 1
    assert len({face.tobytes() for face in faces}) == 5
    assert example_faces(2, 30, 42).shape == (2, 3, 30, 42)
    red, _, blue = faces[0][:, 20:44, 20:44].mean((1, 2))
    assert red > blue  # it is RGB, and skin
