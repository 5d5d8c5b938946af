"""Runs that are killed at random moments, and gone on with: the result is the one of a run that nobody killed.

Two kills unless FACEAGE_CHAOS says how many; `make chaos` makes it 25.
"""

import os
import random
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from clips import make_clip, packets_of, regular_pts

FRAMES = 240
KILLS = int(os.environ.get("FACEAGE_CHAOS", "2"))


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
        "from faceage.cli import main; main()"
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
