"""What can be said of engines on GPUs without one: a stand-in for TensorRT's runtime, missing parts, exports.

Engines for GPUs are built here by the real TensorRT for RTX; its runtime needs a GPU.
"""

import logging
import operator
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from faceage.engines import aotinductor, eager, ort, registry, rtx, tensorrt
from faceage.engines.base import BATCH, Axis, Program, Runtime, Spec, TensorSpec
from faceage.engines.export import export
from faceage.engines.parity import check_parity
from faceage.engines.registry import BACKENDS, choose_runtime
from faceage.engines.rtx import RtxEngine
from faceage.engines.store import EngineStore
from faceage.errors import EngineError, UnfitEngineError
from train.bundle import bundled_programs

PROGRAMS = {program.name: program for program in bundled_programs()}
TENSORRT = BACKENDS["tensorrt"]
CONVERTERS = Path(__file__).parent / "golden" / "torch_tensorrt_converters.txt"
"""What Torch-TensorRT 2.14.0 converts or removes, by its source: it cannot be installed without NVIDIA's libraries."""
ON_GPU = Runtime(backend=TENSORRT, device="cuda", precision="fp16")


def doubling_program(graph, axis=BATCH):
    shape = (BATCH, 3, 4) if axis is BATCH else (BATCH, 3, axis)
    return Program(
        name="doubling", graph=graph, checkpoints=(), network=lambda folded: None, examples=tuple,
        inputs=(TensorSpec("x", shape), TensorSpec("factor", (2,))), outputs=(TensorSpec("y", shape),),
    )  # fmt: skip


class FakeContext:
    """Doubles what lies at the addresses that it was told, and notes them.

    With graphs, the second run of a shape captures them, and later ones replay: on these addresses, whatever was told.
    """

    def __init__(self, log, has_graphs):
        self.log, self.shapes, self.addresses, self.memory = log, {}, {}, None
        self.has_graphs, self.runs, self.captured = has_graphs, 0, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return shape[0] <= 1024

    def get_tensor_shape(self, name):
        return self.shapes["in_x"]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def update_device_memory_size_for_shapes(self):
        return 1000 * self.shapes["in_x"][0]

    def set_device_memory(self, address, size):
        self.memory = address, size

    def execute_async_v3(self, stream):
        key = self.shapes["in_x"], tuple(sorted(self.addresses.items())), self.memory
        self.log.append(key)
        self.runs += 1
        if self.has_graphs and self.runs == 2:
            self.captured = dict(self.addresses)
        count = int(np.prod(self.shapes["in_x"]))
        x, y = (memory_at((self.captured or self.addresses)[name], count) for name in ("in_x", "out_y"))
        y[:] = 2 * x
        return not self.log.fails


class Log(list):
    fails = False
    last_error = "out of memory"


def memory_at(address, count):
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


class Stream:
    cuda_stream = 7

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def fake(monkeypatch):
    """TensorRT for RTX's runtime and torch's GPU, both on the CPU; what was executed is in `log`."""
    log = Log()
    state = SimpleNamespace(log=log, validity="VALID", diagnostics=0, strategies=[], context=True, capability=(8, 9))

    class Config:
        def set_execution_context_allocation_strategy(self, strategy):
            assert strategy == "USER_MANAGED"

        def create_runtime_cache(self):
            return SimpleNamespace(
                deserialize=lambda data: state.__dict__.update(cache=data), serialize=lambda: b"kernels"
            )

        def set_runtime_cache(self, cache):
            pass

        def __setattr__(self, name, value):
            state.strategies.append(value)

    class Engine:
        def create_runtime_config(self):
            return Config()

        def create_execution_context(self, config):
            return FakeContext(log, "graphs" in state.strategies) if state.context else None

    class TrtRuntime:
        def __init__(self, log):
            pass

        def get_engine_validity(self, data):
            return state.validity, state.diagnostics

        def deserialize_cuda_engine(self, data):
            return None if data == b"malformed" else Engine()

    trt = SimpleNamespace(
        Runtime=TrtRuntime,
        EngineValidity=SimpleNamespace(INVALID="INVALID"),
        EngineInvalidityDiagnostics=SimpleNamespace(
            __members__={"UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4, "MALFORMED_ENGINE": 32}
        ),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="graphs", DISABLED="no graphs"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
    )
    monkeypatch.setattr(rtx, "rtx", lambda: (trt, log))
    fake_gpu(monkeypatch, state)
    return state


def fake_gpu(monkeypatch, state):
    monkeypatch.setattr(eager, "kind_of", lambda device: device.partition(":")[0])
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def open_doubling(tmp_path, axis=BATCH, data=b"engine"):
    path = tmp_path / "doubling.engine"
    path.write_bytes(data)
    return RtxEngine(doubling_program(tmp_path / "doubling.onnx", axis), path, torch.device("cpu"))


def run(engine, count, width=4):
    x = torch.rand(count, 3, width)
    (y,) = engine(x, torch.ones(2))
    torch.testing.assert_close(y, 2 * x)


def test_batches_are_padded_to_buckets_whose_addresses_never_change(fake, tmp_path):
    engine = open_doubling(tmp_path)
    for count in (2, 50, 2, 1, 3, 4, 64, 33, 2):
        run(engine, count)
    assert [shapes[0] for shapes, *_ in fake.log] == [2, 64, 2, 1, 4, 4, 64, 64, 2]
    # Everything that a captured graph has in it is the same each time that a bucket runs.
    assert len(set(fake.log)) == len({shapes for shapes, *_ in fake.log}) == 4
    assert fake.strategies == ["graphs"]


def test_a_network_for_pictures_of_any_size_captures_no_graphs(fake, tmp_path):
    engine = open_doubling(tmp_path, Axis("width"))
    for width in (4, 6, 6, 4):
        run(engine, 2, width)
    assert [shapes for shapes, *_ in fake.log] == [(2, 3, 4), (2, 3, 6), (2, 3, 6), (2, 3, 4)]
    assert fake.strategies == ["no graphs"]


def test_what_the_gpu_compiled_is_kept_and_read_while_it_is_whole(fake, tmp_path):
    open_doubling(tmp_path)._keep_cache()
    open_doubling(tmp_path)
    assert fake.cache == b"kernels"
    kept = tmp_path / "doubling.cache"
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    del fake.cache
    open_doubling(tmp_path)
    assert not hasattr(fake, "cache")


def test_a_cache_that_cannot_be_written_is_no_error(fake, tmp_path, monkeypatch):
    engine = open_doubling(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "read-only")))
    engine._keep_cache()
    assert [path.name for path in tmp_path.iterdir()] == ["doubling.engine"]


def test_failures_are_one_line_each(fake, tmp_path):
    fake.validity, fake.diagnostics = "INVALID", 2 | 4
    with pytest.raises(
        UnfitEngineError, match=r"cannot run doubling.engine on A GPU \(unsupported cc, old cuda driver\)"
    ):
        open_doubling(tmp_path)
    fake.diagnostics = 32
    with pytest.raises(EngineError, match="malformed engine") as raised:
        open_doubling(tmp_path)
    assert not isinstance(raised.value, UnfitEngineError)  # building it anew mends that
    fake.validity = "VALID"
    with pytest.raises(EngineError, match=r"cannot open doubling\.engine: out of memory"):
        open_doubling(tmp_path, data=b"malformed")
    fake.context = False
    with pytest.raises(EngineError, match=r"no execution context \(out of memory\)"):
        run(open_doubling(tmp_path), 2)
    fake.context, fake.log.fails = True, True
    with pytest.raises(EngineError, match=r"TensorRT failed \(out of memory\); use --device cpu"):
        run(open_doubling(tmp_path), 2)
    with pytest.raises(EngineError, match="2000 faces at once, at most 1024 are possible"):
        run(open_doubling(tmp_path), 2000)


def test_an_engine_for_another_gpu_stays_in_the_store(fake, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    store, rnet = EngineStore(tmp_path), PROGRAMS["mtcnn-rnet"]
    monkeypatch.setattr(tensorrt.TensorRT, "build", lambda self, program, spec, path: path.write_bytes(b"engine"))
    monkeypatch.setattr(
        tensorrt.TensorRT, "emulate", lambda self, program, spec: ort.open_graph(program, program.graph)
    )
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(eager, "kind_of", no_gpu)
        store.build(rnet, TENSORRT, Spec("sm_89", "fp32"))
    files = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    fake.validity, fake.diagnostics = "INVALID", 2
    with pytest.raises(UnfitEngineError, match="unsupported cc"):
        store.load(rnet, ON_GPU)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == files


def test_an_engine_that_was_built_elsewhere_is_found():
    """Its key has nothing of this machine in it but the builder's version, and nothing of the torch that exported."""
    for target in ("portable", "sm_89"):
        assert set(TENSORRT.versions(Spec(target, "fp16"))) == {"tensorrt-rtx"}


def no_gpu(device):
    raise EngineError(f"device {device} is not there")


@pytest.mark.parametrize(
    ("capability", "found"),
    [((7, 5), ["sm_75"]), ((8, 0), None), ((8, 6), ["sm_86", "portable"]), ((8, 9), ["sm_89", "portable"]),
     ((9, 0), None), ((12, 0), ["sm_120", "portable"]), ((12, 1), ["portable"])],
)  # fmt: skip
def test_tensorrt_for_rtx_is_for_the_gpus_that_it_is_documented_for(fake, monkeypatch, capability, found):
    monkeypatch.setattr(tensorrt, "missing", lambda extra, what: None)
    fake.capability = capability
    if found is None:
        with pytest.raises(EngineError, match=r"TensorRT for RTX is not for .* pip install torch-tensorrt"):
            TENSORRT.targets("cuda:0")
        assert TENSORRT.unfit("cuda") is not None
    else:
        assert TENSORRT.targets("cuda:0") == found


@contextmanager
def torch_tensorrt_that(monkeypatch, module):
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "find_spec", lambda name: object())
        patch.setattr(tensorrt, "missing", lambda extra, what: "no TensorRT for RTX" if extra == "tensorrt" else None)
        patch.setitem(sys.modules, "torch_tensorrt", module)
        tensorrt._missing_torch_tensorrt.cache_clear()
        yield
    tensorrt._missing_torch_tensorrt.cache_clear()


def test_a_torch_tensorrt_that_cannot_be_imported_is_missing(fake, monkeypatch):
    with torch_tensorrt_that(monkeypatch, None):
        reason = TENSORRT.missing("cuda")
        assert reason.startswith("backend tensorrt cannot import torch_tensorrt (ModuleNotFoundError: ")
        assert reason.endswith("run: pip install --force-reinstall torch-tensorrt")


def test_a_torch_tensorrt_that_raises_is_one_line(fake, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise AssertionError("engine building failed")

    module = SimpleNamespace(
        Input=lambda **_: None, dynamo=SimpleNamespace(compile=fail), save=fail, load=fail, __spec__=None
    )
    monkeypatch.setattr("faceage.engines.export.export_for", lambda program, spec: None)
    with torch_tensorrt_that(monkeypatch, module):
        assert TENSORRT.missing("cuda") is None
        spec = Spec("cuda", "fp32")
        assert TENSORRT.versions(spec)["torch-tensorrt"] in ("unknown", *(f"torch-tensorrt{s}" for s in ("", "-rtx")))
        with pytest.raises(
            EngineError, match=r"cannot build it \(AssertionError: engine building failed\); use --back"
        ):
            TENSORRT.build(PROGRAMS["mtcnn-rnet"], spec, tmp_path / "a.pt2")
        with pytest.raises(EngineError, match=r"Torch-TensorRT cannot open .*a.pt2 \(AssertionError: engine building"):
            TENSORRT.load(PROGRAMS["mtcnn-rnet"], tmp_path / "a.pt2", replace(ON_GPU, device="cpu"))


def test_the_backends_of_a_gpu_are_tried_in_order_and_each_says_what_mends_it(fake, monkeypatch, caplog):
    """A GPU with nothing but pip packages: no TensorRT, no CUDA toolkit."""
    from torch.utils import cpp_extension

    monkeypatch.setattr(registry, "has_gpu", lambda: True)
    monkeypatch.setattr(registry, "kind_of", eager.kind_of)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(aotinductor.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(
        tensorrt, "missing",
        lambda extra, what: f"{what} needs it; run: pip install 'faceage[{extra}]'" if extra == "tensorrt" else None,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        runtime = choose_runtime()
    assert (runtime.backend.name, runtime.device, runtime.precision) == ("torch", "cuda", "fp32")
    assert not runtime.fallbacks
    first, second = (line for line in caplog.messages if line.startswith("backend"))
    assert first == "backend tensorrt for target portable needs it; run: pip install 'faceage[tensorrt]'"
    assert second.startswith(
        "backend aotinductor needs the CUDA toolkit, found neither nvcc nor CUDA_HOME; install one"
    )
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    assert choose_runtime().backend.name == "aotinductor"
    fake.capability = (9, 0)
    assert choose_runtime(device="cuda:0").backend.name == "aotinductor"
    fake.capability = (8, 9)
    monkeypatch.setattr(tensorrt, "missing", lambda extra, what: None)
    runtime = choose_runtime()
    assert [backend.name for backend in (runtime.backend, *runtime.fallbacks)] == ["tensorrt", "aotinductor", "torch"]
    assert not choose_runtime(backend="tensorrt").fallbacks


def test_a_network_that_a_backend_cannot_build_is_run_by_the_next_one(monkeypatch, tmp_path, caplog):
    """As where TensorRT for RTX refuses the driver and no compiler works; what was named is not replaced."""
    rnet, store = PROGRAMS["mtcnn-rnet"], EngineStore(tmp_path)

    def fail(self, program, *_):
        raise EngineError(f"{program.name}: {self.name} fails; mend it")

    monkeypatch.setattr(type(BACKENDS["openvino"]), "build", fail)
    monkeypatch.setattr(type(BACKENDS["aotinductor"]), "build", fail)
    runtime = Runtime(backend=BACKENDS["openvino"], fallbacks=(BACKENDS["aotinductor"], BACKENDS["torch"]))
    with caplog.at_level(logging.WARNING):
        assert store.load(rnet, runtime).backend == "torch"
    assert caplog.messages == [
        "mtcnn-rnet: openvino fails; mend it; mtcnn-rnet is run by aotinductor",
        "mtcnn-rnet: aotinductor fails; mend it; mtcnn-rnet is run by torch",
    ]
    with pytest.raises(EngineError, match="openvino fails; mend it"):
        store.load(rnet, replace(runtime, fallbacks=()))


def test_without_torch_a_gpu_is_left_alone_and_that_is_said(monkeypatch, caplog):
    driver = SimpleNamespace(
        cuInit=lambda flags: 0, cuDeviceGetCount=lambda count: setattr(count._obj, "value", 1) or 0
    )
    monkeypatch.setattr(eager.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(
        eager, "missing", lambda extra, what: f"{what} needs torch; run: pip install 'faceage[{extra}]'"
    )
    with caplog.at_level(logging.WARNING):
        assert choose_runtime().device == "cpu"
    assert caplog.messages == ["a GPU is there; using it needs torch; run: pip install 'faceage[torch]'"]


def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(EngineError, match=r"cannot compile it for cpu \(OSError: CUDA_HOME .*\); use --backend torch"):
        BACKENDS["aotinductor"].build(PROGRAMS["mtcnn-rnet"], Spec(), tmp_path / "a.pt2")


def test_an_input_with_other_strides_is_the_same_input():
    seen = []
    engine = eager.TorchEngine(doubling_program("none"), lambda x, factor: seen.append(x) or 2 * x, torch.device("cpu"))
    swapped = np.arange(24, dtype=np.float32).reshape(2, 4, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(engine(swapped, np.ones(2, np.float32))[0], 2 * swapped)
    engine(torch.from_numpy(swapped), torch.ones(2))
    assert all(x.is_contiguous() for x in seen)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_network_is_exported_as_if_on_a_gpu(name):
    """Nothing in it makes a tensor on the CPU but numbers: fake tensors of a GPU, which need none.

    In fp16, which is made of the export in fp32. Torch-TensorRT has converters for all that is in it.
    """
    from torch._subclasses import FakeTensorMode

    program = PROGRAMS[name]
    network = program.network(True).requires_grad_(False)
    with FakeTensorMode() as mode:

        def on_gpu(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        for module in network.modules():
            for values in (module._parameters, module._buffers):
                for key, value in values.items():
                    if value is not None:
                        moved = on_gpu(value)
                        values[key] = moved if values is module._buffers else torch.nn.Parameter(moved, False)
        inputs = tuple(on_gpu(torch.from_numpy(array)) for array in program.examples())
        assert mode is not None
        exported = export(program, network, inputs, "fp16")
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "call_function"]
    assert {value.device.type for value in values if isinstance(value, torch.Tensor) and value.ndim} == {"cuda"}
    if name not in {"age-cgan-encoder", "identity", "facegan-192", "mtcnn-rnet", "mtcnn-onet"}:
        with mode:  # these five are made of the same layers as others
            decomposed = exported.run_decompositions()
        used = {node.target for node in decomposed.graph.nodes if node.op == "call_function"}
        names = {f"operator.{op.__name__}" if op in vars(operator).values() else str(op) for op in used}
        known = set(CONVERTERS.read_text().split())
        assert not {name for name in names if name not in known and name.rsplit(".", 1)[0] not in known}


IN_HALF = [name for name, program in PROGRAMS.items() if program.spec("portable", "fp16").precision == "fp16"]
"""What draws; the others are built in fp32 in any case."""


@pytest.mark.parametrize(
    ("target", "precision", "names"),
    [(target, "fp16", PROGRAMS) for target in ("portable", "sm_75", "sm_86", "sm_89", "sm_120")]
    + [("portable", "fp32", IN_HALF)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensorrt_for_rtx_builds_the_bundled_networks(target, precision, names, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    for name in names:
        TENSORRT.build(PROGRAMS[name], PROGRAMS[name].spec(target, precision), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


def test_what_an_engine_is_built_from_is_compared_in_half_precision_indeed():
    """ONNX Runtime leaves out casts around what it computes in fp32: without rounding it would prove nothing."""
    program = PROGRAMS["age-cgan-generator"]
    found = check_parity(
        program, TENSORRT.emulate(program, Spec("sm_89", "fp16")), ort.open_graph(program, program.graph), "fp16"
    )
    assert 45 < found["psnr_db"] < 90
