"""A training script that is killed and started again ends as if it had never been stopped."""

import dataclasses
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import (
    BATCH,
    FILES,
    SMALL_TRUNK,
    TICK_IMAGES,
    draw_nothing,
    module_name,
    shrink_networks,
    shrink_steps,
    small_gan,
)

from faceage.checkpoint import Header, load, read_header, save
from train.data import Sampler
from train.run import Run, draw_curves

IMAGES = 3 * TICK_IMAGES + BATCH
"""Budget of a run: three ticks, and a step that is none."""
ROOT = Path(__file__).parent.parent.parent
SCRIPTS = [
    ".".join(path.relative_to(ROOT / "train").with_suffix("").parts)
    for path in sorted((ROOT / "train").rglob("*.py"))
    if "\ndef main(" in path.read_text()
]


class KilledError(Exception):
    """Stands for a kill at a moment that a test chooses."""


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Small networks and steps on one thread of the CPU, where a sum is the same each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shrink_networks(monkeypatch)
    shrink_steps(monkeypatch)
    draw_nothing(monkeypatch)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parents(tmp_path_factory, teacher):
    """Options that name each script's parents, networks that know nothing; and an identity network of another kind."""
    from faceage.networks.age_cgan import Discriminator, Encoder, Generator
    from faceage.networks.regressors import AgeEstimator, IdentityNet, TrunkDims

    folder = tmp_path_factory.mktemp("parents")
    trunk, ages = TrunkDims(**SMALL_TRUNK, outputs=128), TrunkDims(**SMALL_TRUNK, outputs=101)
    torch.manual_seed(0)
    networks = {
        "identity": ("identity", IdentityNet(trunk), trunk),
        "other": ("identity", IdentityNet(trunk), trunk),
        "generator": ("age-cgan-generator", Generator(small_gan()), small_gan()),
        "encoder": ("age-cgan-encoder", Encoder(small_gan()), small_gan()),
        "reader": ("age-estimator", AgeEstimator(ages), ages),
    }
    files = {"teacher": teacher}
    for name, (arch, net, dims) in networks.items():
        files[name] = folder / f"{name}.safetensors"
        config = {"half": 0} if name == "reader" else {}
        header = Header(arch=arch, dims=dataclasses.asdict(dims), stage="test", images_seen=0, train_config=config)
        save(files[name], net.state_dict(), header)
    torch.save({"D": Discriminator(small_gan()).state_dict()}, folder / "resume.pt")
    people, ages = np.repeat(np.arange(6), 3), np.tile(np.array([20, 40, 70], np.float32), 6)
    pixels = np.random.default_rng(0).integers(0, 256, (18, 64, 64, 3), np.uint8)
    np.savez(folder / "pairs.npz", pixels=pixels, people=people, ages=ages)
    return files | {"gan": folder, "aging": folder, "pairs": folder}


@pytest.fixture
def command(archive, cache, faces, parents):
    """Return the arguments of a script."""

    def arguments(script, out, *more):
        inputs = {
            "identity": ("--teacher", parents["teacher"]),
            "gan": ("--identity", parents["identity"]),
            "encoder": ("--generator", parents["generator"], "--identity", parents["identity"]),
            "aging": [f"--{name}={parents[name]}" for name in ("gan", "encoder", "identity", "reader")],
            "stylegan": ["--size=64", *(f"--{name}={parents[name]}" for name in ("identity", "reader"))],
            "facegan": [f"--{name}={parents[name]}" for name in ("aging", "pairs", "identity", "reader")],
        }.get(script, ())
        common = ("--data", archive, "--cache", cache, "--out", out, "--images", IMAGES)
        return [str(arg) for arg in (*common, *inputs, *more)]  # of an option given twice, the last counts

    return arguments


def invoke(script, arguments):
    return CliRunner().invoke(importlib.import_module(module_name(script)).main, arguments, catch_exceptions=False)


def train(script, arguments):
    result = invoke(script, arguments)
    assert result.exit_code == 0, result.output


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def leaves(state, name=""):
    """Yield (dotted name, value) of everything in nested dictionaries and lists."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        yield name, state
    else:
        for key, value in items:
            yield from leaves(value, f"{name}.{key}" if name else str(key))


def assert_same_run(script, folder, unbroken):
    assert log_of(folder) == log_of(unbroken)
    arch = read_header(unbroken / FILES[script]).arch
    (header, weights), (expected_header, expected) = (load(path / FILES[script], arch) for path in (folder, unbroken))
    assert dataclasses.replace(header, git_commit="") == dataclasses.replace(expected_header, git_commit="")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)
    state, expected = (dict(leaves(torch.load(path / "resume.pt", weights_only=True))) for path in (folder, unbroken))
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert name == "seconds" or np.array_equal(state[name], value), name


def kill_at(patch, moment, count):
    """Make the next session die at its `count`-th moment of a kind."""
    left = [count]

    def survives():
        left[0] -= 1
        return left[0] > 0

    def then_die(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if not survives():
                raise KilledError
            return result

        return call

    def die_before(function):
        def call(*args, **kwargs):
            if not survives():
                raise KilledError
            return function(*args, **kwargs)

        return call

    def half_written(state, path):
        if survives():
            return torch_save(state, path)
        path.write_bytes(b"PK half of a checkpoint")
        raise KilledError

    torch_save = torch.save
    if moment == "step":
        patch.setattr(Sampler, "indices", then_die(Sampler.indices))
    elif moment == "logged":
        patch.setattr(Run, "record", then_die(Run.record))
    elif moment == "exported":
        patch.setattr(Run, "save_state", die_before(Run.save_state))
    elif moment == "saving":
        patch.setattr(torch, "save", half_written)


@pytest.mark.parametrize("script", FILES)
def test_killed_at_any_moment_it_goes_on_as_if_unbroken(command, tmp_path, monkeypatch, script):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "killed"
    train(script, command(script, unbroken, "--cache", tmp_path / "empty"))
    assert [line["images"] for line in log_of(unbroken)] == [24, 48, 72, 80]
    draw_curves(log_of(unbroken), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    # Each session starts where the one before left its last checkpoint: at 0, 0, 0, 24, 24 and 48 images. What is done
    # at these moments is the same code for all scripts, so one script goes through all of them.
    deaths = [("step", 2, 0), ("logged", 1, 0), ("exported", 2, 24), ("saving", 1, 24), ("step", 5, 48)]
    deaths = deaths if script == "gan" else [deaths[2], deaths[4]]
    for moment, count, saved in deaths:
        with monkeypatch.context() as patch:
            kill_at(patch, moment, count)
            with pytest.raises(KilledError):
                train(script, command(script, folder))
        state = folder / "resume.pt"
        assert (torch.load(state, weights_only=True)["images_seen"] if state.exists() else 0) == saved
    train(script, command(script, folder))
    assert_same_run(script, folder, unbroken)
    assert not list(folder.glob("*.part"))


def test_a_real_kill_at_a_random_moment(command, tmp_path, validation_file):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "killed"
    images = ("--images", 8 * TICK_IMAGES)
    train("gan", command("gan", unbroken, *images))
    tiny = [sys.executable, str(Path(__file__).parent / "tiny.py"), str(validation_file), "gan"]
    process = subprocess.Popen(tiny + command("gan", folder, *images), cwd=ROOT, stderr=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    ticks = random.SystemRandom().randint(1, 4)
    deadline = time.monotonic() + 60
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= ticks):
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.001)
    time.sleep(random.SystemRandom().uniform(0, 0.1))
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train("gan", command("gan", folder, *images))
    assert_same_run("gan", folder, unbroken)


@pytest.mark.parametrize("script", FILES)
def test_a_budget_in_minutes_ends_a_run(command, tmp_path, script):
    arguments = command(script, tmp_path / "run", "--minutes", 0.005)
    at = arguments.index("--images")
    start = time.monotonic()
    train(script, arguments[:at] + arguments[at + 2 :])
    assert time.monotonic() - start < 10
    state = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert state["seconds"] >= 0.3
    assert log_of(tmp_path / "run")[-1]["images"] == state["images_seen"] > 0


@pytest.mark.parametrize(
    ("script", "before", "now", "message"),
    [
        ("encoder", (), ("--identity", "other"), "its parent identity was"),
        ("gan", (), ("--identity", "other"), "its parent identity was"),
        ("identity", (), ("--teacher", "other"), "its parent teacher was"),
        ("age_estimator", (), ("--size", "32"), "dims.size_px was 64, is 32"),
        ("age_estimator", ("--half", "1"), ("--half", "0"), "half was 1, is 0"),
        ("age_estimator", ("--half", "1"), (), "half was 1, is None"),
    ],
)
def test_another_parent_or_setting_is_refused(command, parents, tmp_path, script, before, now, message):
    now = [str(parents.get(option, option)) for option in now]
    train(script, command(script, tmp_path / "run", "--images", BATCH, *before))
    files = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    result = invoke(script, command(script, tmp_path / "run", *now))
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"Error: {tmp_path / 'run'} holds a run that was started otherwise: ")
    assert message in error
    assert error.endswith("Start it as before, or name another --out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == files


def test_other_faces_are_refused(command, tmp_path, monkeypatch, validation_file):
    train("judge", command("judge", tmp_path / "run", "--images", BATCH))
    fewer = tmp_path / "validation.txt"
    fewer.write_text("".join(validation_file.read_text().splitlines(keepends=True)[1:]))
    monkeypatch.setattr("train.data.VALIDATION_FILE", fewer)
    result = invoke("judge", command("judge", tmp_path / "run"))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the run was trained on other faces (")


def test_a_parent_more_is_refused_too(command, tmp_path):
    arguments = command("gan", tmp_path / "gan")
    at = arguments.index("--identity")
    train("gan", [*arguments[:at], *arguments[at + 2 :], "--images", str(TICK_IMAGES)])
    assert read_header(tmp_path / "gan" / FILES["gan"]).parents == {}
    result = invoke("gan", arguments)
    assert result.exit_code == 1
    assert "its parent identity was not given, is " in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help(script):
    result = invoke(script, ["--help"])
    assert result.exit_code == 0
    assert "Options:" in result.output
