"""The plain installation: the wheel in an environment of its own, without torch. `make lean` runs it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from importlib.util import find_spec
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


def libraries_of(*files):
    """The shared libraries that files are linked with, and those of the C and C++ run time, which any machine has."""
    listed = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout.split()
    packages = subprocess.run(["dpkg", "-L", "libc6", "libgcc-s1", "libstdc++6"], capture_output=True, text=True)
    words = [word for word in listed + packages.stdout.split() if ".so" in word and word[-1] != ":"]
    return {Path(word) for word in words if Path(word).is_file()}


@pytest.fixture
def fresh_machine(tmp_path):
    """Returns a function that runs a command where the root folder holds Python and the source, and nothing else."""
    if os.environ.get("FACEAGE_LEAN") != "1":
        pytest.skip("it installs 0.7 GB of packages; run: make lean")
    tools = {name: shutil.which(name) for name in ("unshare", "mount", "chroot", "sh", "dpkg", "ldd")}
    if os.geteuid() or not all(tools.values()):
        pytest.skip(f"a root folder of its own takes root on Debian or Ubuntu; {tools}")
    root = tmp_path / "root"
    stdlib = Path(sysconfig.get_path("stdlib"))
    python = Path(sys.base_prefix, "bin", stdlib.name)
    left_out = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", "test", "config-*")
    copies = {stdlib: stdlib.relative_to("/"), ROOT / "kernels": "src/kernels", ROOT / "faceage": "src/faceage"}
    for source, place in copies.items():
        shutil.copytree(source, root / place, ignore=left_out, ignore_dangling_symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "src")
    for file in {python, *libraries_of(python, *stdlib.glob("lib-dynload/*.so"))}:
        target = root / file.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)  # what a link leads to
    pip = find_spec("pip")  # imported, it would keep setuptools from torch
    shutil.copytree(Path(pip.origin).parent, root / "pip" / "pip", ignore=left_out)
    for name in ("proc", "dev", "sys", "tmp"):
        (root / name).mkdir()
    # There is no network in it either: what pip would fetch lies there.
    fetch = [sys.executable, "-m", "pip", "-q", "download", "-d", root / "wheels", "--only-binary", ":all:"]
    subprocess.run([*fetch, ROOT, "setuptools>=77"], check=True)
    mounts = "".join(
        f"{tools['mount']} {what} {root}/{name} && "
        for name, what in {"proc": "-t proc proc", "dev": "--bind /dev", "sys": "--bind /sys"}.items()
    )

    def run(*args, env=(), expected=0):
        command = [tools["unshare"], "-mn", tools["sh"], "-c", f'{mounts} exec {tools["chroot"]} {root} "$@"', "sh"]
        variables = {"PATH": "/env/bin", "HOME": "/tmp", **dict(env)}
        done = subprocess.run([*command, *map(str, args)], env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(python, "-m", "venv", "--without-pip", "/env")
    from_here = ["install", "-q", "--no-index", "--find-links", "/wheels"]
    run("/env/bin/python", "-m", "pip", *from_here, "/src", env={"PYTHONPATH": "/pip"})
    run.root = root
    return run


def test_a_machine_with_python_and_nothing_else(fresh_machine, face_photo, face_clip):
    for file in (face_photo, face_clip):
        shutil.copy(file, fresh_machine.root / "tmp")
    fresh_machine("faceage", "images", f"/tmp/{face_photo.name}", "-o", "/tmp/aged", "--age", 70)
    fresh_machine("faceage", "video", f"/tmp/{face_clip.name}", "-o", "/tmp/out.mp4", "--age", 70)
    assert "faceage[torch]" in fresh_machine("faceage", "doctor")
    folder = fresh_machine.root / "tmp"
    assert (folder / "aged" / face_photo.name).read_bytes() != face_photo.read_bytes()
    assert (folder / "out.mp4").stat().st_size > 10_000
    # What needs more says in one line what.
    photo = ("images", f"/tmp/{face_photo.name}", "-o", "/tmp/other", "--age", 70)
    for command, extra in {
        ("compile", "--target", "sm_89"): "tensorrt",
        (*photo, "--backend", "torch"): "torch",
        (*photo, "--backend", "aotinductor"): "torch",
        (*photo, "--device", "cuda"): "torch",
        (*photo, "--ray", "local"): "ray",
        ("bench", "latent"): "torch",
        ("models", "fetch", "facenet"): "torch",
    }.items():
        said = fresh_machine("faceage", *command, expected=4)
        assert re.fullmatch(rf"faceage: error: .*run: pip install 'faceage\[{extra}\]'\n", said), said
