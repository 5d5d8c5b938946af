"""`faceage compile` and `faceage engines`: engines for GPUs are really built here, without one."""

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from faceage import extras
from faceage.cli import main
from faceage.engines import aotinductor, export, tensorrt
from faceage.engines.base import TARGETS, Spec
from faceage.engines.export import export_for
from faceage.engines.registry import BACKENDS
from faceage.engines.store import EngineStore
from faceage.errors import EngineError
from faceage.pipeline.request import all_programs

TENSORRT = BACKENDS["tensorrt"]
EXTRAS = ("torch", "torchvision", "facenet_pytorch", "onnx", "onnxscript", "onnx_ir", "tensorrt_rtx")


def faceage(*args):
    """Run a command in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def compile_(*args):
    """Run `faceage compile --json`; return the exit code and the items."""
    result = faceage("compile", "--json", *args)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, [event for event in events if event["event"] == "item"]


@pytest.fixture(scope="module")
def compiled(tiny_model):
    """What compiling all networks for a GPU gave: exit code and items."""
    return compile_("--target", "sm_86", "--precision", "fp16", "--model", tiny_model)


@pytest.fixture(scope="module")
def smallest(tiny_model):
    """R-Net's program."""
    return next(program for program in all_programs(tiny_model) if program.name == "mtcnn-rnet")


def test_every_network_is_built_for_a_gpu_that_is_not_here(compiled, tiny_model):
    code, items = compiled
    assert code == 0, items
    assert [item["program"] for item in items] == [program.name for program in all_programs(tiny_model)]
    for item in items:
        measures = item["program"] not in ("age-cgan-generator", "age-cgan-latent")
        precision = "fp32" if measures else "fp16"
        assert (item["backend"], item["target"], item["precision"]) == ("tensorrt", "sm_86", precision)
        assert item["built"]
        assert item["bytes"] > 1000
        if item["parity"] is None:
            assert "there was no such GPU" in item["parity_missing_because"]
            assert item["graph_parity"]["psnr_db"] >= 45


def test_engines_are_listed_verified_and_rebuilt(compiled, tiny_model):
    store = EngineStore()
    count = len(store.stored())
    listed = faceage("engines", "list")
    assert listed.stdout.count("sm_86") == len(compiled[1])
    assert listed.stdout.splitlines()[-1] == f"{count} engines in {store.root}"
    files = {engine["file"] for engine in json.loads(faceage("engines", "list", "--json").stdout)["engines"]}
    assert files >= {item["engine"] for item in compiled[1]}
    assert faceage("engines", "verify").exit_code == 0

    victim = store.root / next(item["engine"] for item in compiled[1] if item["program"] == "mtcnn-rnet")
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    verified = faceage("engines", "verify")
    assert verified.exit_code == 1
    assert f"{victim.name}: it is damaged" in verified.stdout
    assert "faceage compile --target sm_86" in verified.stdout
    assert f"{count - 1} of {count} engines are as they were built" in verified.stdout
    assert json.loads(faceage("engines", "verify", "--json").stdout)["damaged"][0]["file"] == victim.name

    again = faceage("compile", "--target", "sm_86", "--precision", "fp16", "--model", tiny_model)
    assert again.exit_code == 0
    assert f"rebuilding engine {victim.name}: it is damaged" in again.stderr
    assert again.stderr.count("building engines (once): ") == 1
    assert again.stdout.count("in the store already") == len(compiled[1]) - 1
    assert faceage("engines", "verify").exit_code == 0


def test_prune_removes_what_no_model_needs(smallest, tmp_path, monkeypatch):
    monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path))
    store = EngineStore()
    store.build(smallest, TENSORRT, Spec("portable", "fp16"))
    kept = store.path(smallest, TENSORRT, Spec("portable", "fp16"))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.1")
        store.build(smallest, TENSORRT, Spec("portable", "fp16"))
    (store.root / "other-0123.engine").write_bytes(b"whose?")
    kept.with_suffix(".cache").touch()
    pruned = faceage("engines", "prune")
    assert pruned.exit_code == 0
    assert "removed other-0123.engine" in pruned.stdout
    assert pruned.stdout.endswith("3 files removed\n")
    assert {file.name for file in store.root.iterdir()} == {
        ".lock", kept.name, kept.with_suffix(".json").name, kept.with_suffix(".cache").name,
    }  # fmt: skip


def test_an_unknown_target_lists_the_known_ones():
    result = faceage("compile", "--target", "sm_99")
    assert result.exit_code == 2
    assert all(f"'{target}'" in result.stderr for target in TARGETS)


def test_what_cannot_be_built_is_one_line_and_exit_code_4(tiny_model, monkeypatch):
    def error(*args):
        result = faceage("compile", "--model", tiny_model, *args)
        assert result.exit_code == 4
        (line,) = result.stderr.splitlines()
        return line.removeprefix("faceage: error: ")

    assert error("--target", "sm_75", "--precision", "fp32").endswith("for sm_75; use --precision fp16")
    assert error("--target", "sm_86", "--backend", "onnxruntime").startswith("backend onnxruntime builds for cpu in")
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "tensorrt_rtx" else object())
    assert error("--target", "portable").endswith("run: pip install 'faceage[tensorrt]'")
    monkeypatch.setattr(tensorrt.eager, "kind_of", lambda device: device)
    monkeypatch.setattr(tensorrt, "_missing_torch_tensorrt", lambda: "no; run: pip install torch-tensorrt")
    assert error("--target", "cuda", "--backend", "tensorrt").endswith("run: pip install torch-tensorrt")
    monkeypatch.setattr(aotinductor.shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in error("--target", "cpu", "--backend", "aotinductor")


def test_without_a_gpu_cuda_is_an_error(tiny_model):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = faceage("compile", "--target", "cuda", "--model", tiny_model)
    assert result.exit_code == 4
    assert "device cuda is not there: torch sees 0 CUDA devices" in result.stderr


def test_a_failed_engine_does_not_stop_the_others(tiny_model, monkeypatch):
    def refuse(self, program, backend, spec):
        if program.name != "mtcnn-onet":
            raise EngineError(f"{program.name}: no")
        return {"program": "mtcnn-onet", "backend": backend.name, "target": "cpu", "precision": "fp32", "bytes": 1,
                "build_seconds": 0.1}, True  # fmt: skip

    monkeypatch.setattr(EngineStore, "build", refuse)
    code, items = compile_("--target", "cpu", "--model", tiny_model)
    assert code == 1
    assert sum("error" in item for item in items) == len(items) - 1


def test_the_first_run_on_a_cpu_needs_no_torch(face_photo, tmp_path):
    """From the command line to the aged photo, with nothing compiled yet."""
    args = ["images", str(face_photo), "-o", str(tmp_path / "out"), "--age", "70", "--device", "cpu"]
    code = (
        "import sys; from faceage.cli import main\n"
        f"for name in {EXTRAS!r}: sys.modules[name] = None\n"  # importing it fails
        f"main({args!r})"
    )
    env = os.environ | {"FACEAGE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / face_photo.name).exists()


def test_torch_tensorrt_is_called_as_its_documentation_says(smallest, tmp_path, monkeypatch):
    """The calls that cannot be run here, on a stand-in that has the documented arguments."""
    calls = {}

    class Input:
        def __init__(self, *, min_shape, opt_shape, max_shape, name):
            self.shapes = min_shape, opt_shape, max_shape

    class Dynamo:
        @staticmethod
        def compile(exported, *, arg_inputs, require_full_compilation, min_block_size, disable_tf32, immutable_weights):
            calls["shapes"] = [tensor.shapes for tensor in arg_inputs]
            return "module"

    class TorchTensorRT:
        dynamo = Dynamo

        @staticmethod
        def save(module, path, *, output_format, arg_inputs, retrace):
            calls["saved"] = module, output_format
            Path(path).touch()

    TorchTensorRT.Input = Input
    exported = export_for(smallest, Spec("cpu", "fp16"))  # before: it imports modules by this function
    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: TorchTensorRT)
    monkeypatch.setattr(export, "export_for", lambda program, spec: exported)
    path = tmp_path / f"rnet{tensorrt.TORCH_SUFFIX}"
    TENSORRT.build(smallest, Spec("cuda", "fp16"), path)
    assert calls == {"shapes": [((1, 3, 24, 24), (8, 3, 24, 24), (1024, 3, 24, 24))],
                     "saved": ("module", "exported_program")}  # fmt: skip
    assert path.exists()
    assert find_spec("torch_tensorrt") is None or TENSORRT.missing("cuda") is None
