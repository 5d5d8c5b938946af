"""Runs that are killed at random moments, and gone on with: the result is the one of a run that nobody killed.

Two kills unless FACEAGE_CHAOS says how many; `make chaos` makes it 25. With it, the folder has 3,000 photos instead of
40, and is killed three times instead of once.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from clips import make_clip, packets_of, regular_pts
from PIL import Image

FRAMES = 240
IS_LONG = "FACEAGE_CHAOS" in os.environ
KILLS = int(os.environ.get("FACEAGE_CHAOS", "2"))
PHOTOS = 3000 if IS_LONG else 40
PHOTO_KILLS = 3 if IS_LONG else 1
DAMAGED = 20
"""One photo of so many is damaged."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory, face_picture):
    def draw(index):
        picture = np.ascontiguousarray(np.roll(face_picture, index % 40, axis=1))
        return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")

    path = tmp_path_factory.mktemp("chaos") / "in.mp4"
    return make_clip(path, pts=regular_pts(FRAMES), size=(256, 256), draw=draw, audio="aac", options={"g": "50"})


@pytest.fixture(scope="module")
def command(networks, tiny_model, clip):
    """The command of a run in segments of 96 frames, with engines that are built."""
    # The length of a segment is no option; a short clip would be one segment.
    program = (
        "import faceage.pipeline.scan as scan; scan.scan.__kwdefaults__['segment_frames'] = 96; "
        "from faceage.cli import run; run()"
    )
    options = ["--model", tiny_model, "--age", "70", "--codec", "ffv1", "--json"]

    def start(target):
        words = [sys.executable, "-c", program, "video", str(clip), "-o", str(target), *options]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def wait_for(process, event):
    """Read the process's events until one is as wanted; return the rest of its output too, if there is none."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if event in line:
            return True, lines
    return False, lines


def test_runs_that_are_killed_are_gone_on_with(command, clip, tmp_path):
    calm = command(tmp_path / "calm.mkv")
    started, _ = wait_for(calm, '"start"')
    assert started
    begin = time.monotonic()
    rest, _ = calm.communicate()
    length = time.monotonic() - begin
    assert calm.returncode == 0, rest
    with av.open(str(tmp_path / "calm.mkv")) as container:
        wanted = [frame.to_ndarray() for frame in container.decode(video=0)]
    assert len(wanted) == FRAMES

    chance = random.Random(13)
    target = tmp_path / "out.mkv"
    killed = 0
    while killed < KILLS:
        process = command(target)
        wait_for(process, '"start"')
        begin = time.monotonic()
        try:
            process.communicate(timeout=chance.uniform(0, length))
            length = time.monotonic() - begin  # the machine has become faster
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        last = command(target)
        rest, _ = last.communicate()
        assert last.returncode == 0 or "exists; pass --overwrite" in rest, rest
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["calm.mkv", "out.mkv"]
        with av.open(str(target)) as container:
            found = [frame.to_ndarray() for frame in container.decode(video=0)]
        assert len(found) == FRAMES
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        sound = packets_of(target, "audio")
        assert [bytes(p) for p in sound] == [bytes(p) for p in packets_of(clip, "audio")]
        target.unlink()


def test_sigterm_is_an_interruption_that_loses_nothing(command, tmp_path):
    target = tmp_path / "out.mkv"
    process = command(target)
    rendering, lines = wait_for(process, '"render"')
    assert rendering, lines
    process.terminate()
    rest, _ = process.communicate()
    assert process.returncode == 130, rest
    assert "the same command goes on where this one ended" in rest
    assert [path.name for path in tmp_path.iterdir()] == ["out.mkv.faceage-work"]
    last = command(target)
    rest, _ = last.communicate()
    assert last.returncode == 0, rest
    assert '"scan"' not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["out.mkv"]


def test_a_second_interruption_ends_the_run_at_once(command, tmp_path):
    target = tmp_path / "out.mkv"
    process = command(target)
    rendering, lines = wait_for(process, '"render"')
    assert rendering, lines
    process.send_signal(signal.SIGINT)
    # On CPUs with large registers (AMX) two signals at once can overflow the stack that a library set aside for them.
    time.sleep(0.03)
    process.send_signal(signal.SIGHUP)
    rest, _ = process.communicate()
    assert process.returncode in (130, -signal.SIGHUP), rest  # the latter: the run had ended in order by then
    assert "Traceback" not in rest
    # The first interruption may have been said when the second one came.
    assert rest.count("faceage: error:") in (1, 2), rest
    last = command(target)
    rest, _ = last.communicate()
    assert last.returncode == 0, rest
    assert [path.name for path in tmp_path.iterdir()] == ["out.mkv"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory, face_picture):
    """A folder of photos that differ; one of `DAMAGED` is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(PHOTOS):
        path = folder / f"{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        if number % DAMAGED == 7:
            path.write_bytes(b"\xff\xd8\xff damaged %d" % number)
        else:
            Image.fromarray(np.roll(face_picture, number % 20, axis=1)).save(path, quality=60 + number % 30)
    return folder


@pytest.fixture(scope="module")
def age_photos(networks, tiny_model):
    """Begin a run on a folder that prints to a file; if it ends by itself, its peak of memory in kB comes last."""
    program = (
        "import atexit; from pathlib import Path; from faceage.cli import main; status = Path('/proc/self/status'); "
        "atexit.register(lambda: print(status.read_text().partition('VmHWM:')[2].split()[0])); main()"
    )
    options = ["--model", tiny_model, "--age", "70", "--json"]

    def start(folder, target):
        words = [sys.executable, "-c", program, "images", str(folder), "-o", str(target), *options]
        with target.with_suffix(".log").open("w") as log:  # nobody reads a pipe while outputs are counted
            return subprocess.Popen(words, stdout=log, stderr=subprocess.DEVNULL)

    return start


def test_a_folder_that_is_killed_is_gone_on_with(age_photos, photos, tmp_path):
    target = tmp_path / "out"
    names = {str(path.relative_to(photos)) for path in photos.rglob("*.jpg")}
    damaged = {name for name in names if int(name[2:7]) % DAMAGED == 7}
    written = {}

    def look():
        """Return the outputs; none that was there has been written again."""
        found = {str(path.relative_to(target)): path.stat() for path in target.rglob("*.jpg")}
        states = {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}
        assert written.items() <= states.items()
        return states

    chance = random.Random(13)
    for number in range(PHOTO_KILLS):
        goal = len(written) + chance.uniform(0.1, 1.6 / PHOTO_KILLS) * (PHOTOS - len(written)) / 2
        process = age_photos(photos, target)
        while process.poll() is None and len(list(target.rglob("*.jpg"))) < goal:
            time.sleep(0.05)
        process.kill()
        process.wait()
        written = look()
        assert 0 < len(written) < len(names) - len(damaged), number
    assert age_photos(photos, target).wait() == 1
    written = look()
    assert written.keys() == names - damaged
    events = target.with_suffix(".log").read_text()
    items = [event for line in events.splitlines()[:-1] if (event := json.loads(line))["event"] == "item"]
    assert {os.path.relpath(item["source"], photos) for item in items if item["error"]} == damaged
    assert not list(target.rglob("*.partial"))
    if not IS_LONG:
        return
    few = tmp_path / "few"
    for name in sorted(names, key=lambda name: name[2:])[:300]:
        (few / name).parent.mkdir(parents=True, exist_ok=True)
        (few / name).hardlink_to(photos / name)
    peaks = []
    for folder in (few, photos):
        target = tmp_path / f"peak-{folder.name}"
        assert age_photos(folder, target).wait() == 1
        peaks.append(int(target.with_suffix(".log").read_text().splitlines()[-1]) / 1024)
    print(f"peak RSS: {peaks[0]:.0f} MB for 300 photos, {peaks[1]:.0f} MB for {PHOTOS}")  # noqa: T201
    assert peaks[1] < 1.05 * peaks[0]
