"""The plain installation: the wheel in an environment of its own, without torch. `make lean` runs it."""

import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from faceage.extras import EXTRAS

ROOT = Path(__file__).parent.parent
LIMIT_MB = 700
FIRST_PHOTO_S, LATER_PHOTO_S = 2.0, 0.5


def test_the_extras_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
    needed = " ".join(project["dependencies"])
    assert not [name for name in ("torch", "facenet", "onnxscript", "onnx>", "ray") if name in needed]


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    """The environment with the wheel, and what it takes on disk, in MB."""
    if os.environ.get("FACEAGE_LEAN") != "1":
        pytest.skip("it installs 0.7 GB of packages; run: make lean")
    folder = tmp_path_factory.mktemp("lean")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    # Without pip, which is no part of an installation and not needed in it.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    # Whatever would have to be compiled is an error.
    subprocess.run([*pip, "--python", python, "install", "--only-binary", ":all:", wheel], check=True)
    size = subprocess.run(["du", "-sm", folder / "venv"], check=True, capture_output=True, text=True)
    return folder / "venv" / "bin" / "faceage", int(size.stdout.split()[0])


def test_a_photo_and_a_video_are_aged_from_the_wheel(lean, tmp_path, face_photo, face_clip):
    faceage, megabytes = lean
    print(f"\ninstalled: {megabytes} MB")  # noqa: T201
    # Nothing of this checkout is found: another folder, no variables of Python's, a cache of its own. And no compiler.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"FACEAGE_CACHE": str(tmp_path / "cache"), "PATH": str(faceage.parent)}
    assert not any(shutil.which(name, path=env["PATH"]) for name in ("cc", "gcc", "g++", "clang"))

    def run(*args):
        start = time.perf_counter()
        done = subprocess.run([faceage, *map(str, args)], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - start

    first = run("images", face_photo, "-o", "a", "--age", 70)
    later = min(run("images", face_photo, "-o", f"b{i}", "--age", 70) for i in range(3))
    video = run("video", face_clip, "-o", "out.mp4", "--age", 70)
    run("doctor")
    print(f"first photo {first:.2f} s, later ones {later:.2f} s, a clip of 50 frames {video:.2f} s")  # noqa: T201
    assert (tmp_path / "a" / face_photo.name).read_bytes() != face_photo.read_bytes()
    assert (tmp_path / "out.mp4").stat().st_size > 10_000
    absent = "import sys, importlib.util as u; sys.exit(any(map(u.find_spec, sys.argv[1:])))"
    modules = ("torch", "torchvision", "facenet_pytorch", "onnx", "onnxscript")
    assert subprocess.run([faceage.with_name("python"), "-c", absent, *modules], check=False).returncode == 0
    assert megabytes <= LIMIT_MB
    if os.environ.get("FACEAGE_LEAN_TIMES") == "1":  # they hold on a machine that does nothing else
        assert first <= FIRST_PHOTO_S
        assert later <= LATER_PHOTO_S
