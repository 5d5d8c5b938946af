"""Workers: here, in processes, on a Ray cluster. What they give is the same, also when some of them die."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import work
from clips import packets_of

from faceage.errors import EngineError, MediaError
from faceage.media.video import EncodeOptions
from faceage.pipeline.photos import photo_reports
from faceage.pipeline.request import AgeRequest, load_networks
from faceage.pipeline.video import age_video
from faceage.pipeline.workers import Cluster, Here, Processes

SEVEN = functools.partial(int, 7)
"""Loads what stands for the networks where none is needed."""
REQUEST = AgeRequest(age=70, source_age=30)


def test_each_item_is_done_once_whoever_does_it():
    wanted = Counter([7 * item for item in range(5)] * 2)
    assert Counter(Here(7).map(work.double, range(5))) == wanted
    taken = []

    def items():
        for item in range(5):
            taken.append(item)
            yield item

    with Processes([SEVEN], 2) as processes:
        results = processes.map(work.double, items())
        found = [next(results)]
        assert len(taken) <= 3  # they are taken when they are needed
        assert Counter([*found, *results]) == wanted
        assert Counter(processes.map(work.double, range(5))) == wanted  # the processes stay
        assert list(processes.map(work.double, [])) == []


def test_the_work_of_processes_that_die_is_done_again(tmp_path):
    with Processes([SEVEN], 2) as processes:
        assert sorted(processes.map(functools.partial(work.die_once, tmp_path), range(5))) == list(range(5))
        assert sorted(os.listdir(tmp_path)) == ["1", "3"]
        with pytest.raises(EngineError, match="a worker process died 4 times over one piece of work"):
            list(processes.map(work.die, [1]))


def test_processes_share_what_is_loaded(tmp_path):
    """As with a GPU each: as many of one as of the other, also after one died."""
    with Processes([SEVEN, functools.partial(int, 11)], 4) as processes:
        for _ in range(2):
            places = list(processes.map(work.show, range(4)))
            assert sorted(places) == [7, 7, 11, 11]
            list(processes.map(functools.partial(work.die_once, tmp_path), range(4)))


def test_errors_and_warnings_come_from_where_the_work_is_done(caplog):
    with Processes([SEVEN], 2) as processes:
        with pytest.raises(MediaError, match="item 3 is too large"):
            list(processes.map(work.fail, [1, 3]))
        assert "item 3 is odd" in caplog.messages  # said before it failed; item 1 may not have come so far
        with pytest.raises(ZeroDivisionError) as caught:
            list(processes.map(work.stumble, [1]))
        assert "in stumble" in caught.value.__notes__[0]  # where it was raised is not lost


def test_processes_end_with_the_one_that_began_them(tmp_path):
    code = (
        "import functools, sys; from pathlib import Path; import work; from faceage.pipeline.workers import Processes\n"
        "load, sleep = functools.partial(int, 7), functools.partial(work.sleep, Path(sys.argv[1]))\n"
        "list(Processes([load], 2).map(sleep, range(2)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    until = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    children = [int(name) for name in os.listdir(tmp_path)]
    assert len(children) == 2
    parent.kill()
    parent.wait()

    def running(process):
        try:
            return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    while any(map(running, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, children))


@pytest.fixture(scope="module")
def load(networks, tiny_model):
    """What loads `networks`, whose engines are built, elsewhere."""
    return functools.partial(load_networks, model=tiny_model)


def outputs(workers, networks, long_clip, long_plan, face_photo, folder):
    """Age a video of two segments and some photos; return the content of each output."""
    folder.mkdir()
    for target, codec in (("x264.mp4", "libx264"), ("ffv1.mkv", "ffv1")):
        encode = EncodeOptions(codec=codec)
        age_video(networks, long_clip, folder / target, REQUEST, plan=long_plan, encode=encode, workers=workers)
    items = [(face_photo, folder / f"{number}.png") for number in range(3)]
    reports = list(photo_reports(workers, items, REQUEST))
    assert {report.error for report in reports} == {None}
    assert {len(report.aged) for report in reports} == {1}
    return {path.name: content(path) for path in sorted(folder.iterdir())}


def content(path):
    """The bytes of a file; of Matroska, whose header has a random number, those of its packets."""
    if path.suffix != ".mkv":
        return path.read_bytes()
    return [(bytes(p), p.pts, p.dts, p.is_keyframe) for kind in ("video", "audio") for p in packets_of(path, kind)]


@pytest.fixture(scope="module")
def here(networks, long_clip, long_plan, face_photo, tmp_path_factory):
    made = outputs(Here(networks), networks, long_clip, long_plan, face_photo, tmp_path_factory.mktemp("here") / "out")
    assert list(made) == ["0.png", "1.png", "2.png", "ffv1.mkv", "x264.mp4"]
    return made


def test_processes_write_what_one_writes(networks, load, here, long_clip, long_plan, face_photo, tmp_path):
    with Processes([load], 2) as processes:
        assert outputs(processes, networks, long_clip, long_plan, face_photo, tmp_path / "out") == here


def test_nothing_is_kept_without_resume(networks, load, long_clip, long_plan, tmp_path):
    def stop(stage, done, total):
        raise ZeroDivisionError

    options = {"plan": long_plan, "resume": False, "end_s": None}
    with Processes([load], 2) as processes, pytest.raises(ZeroDivisionError):
        age_video(networks, long_clip, tmp_path / "out.mkv", REQUEST, workers=processes, progress=stop, **options)
    assert os.listdir(tmp_path) == []


def test_a_machine_that_does_not_see_the_work_folder_says_so(networks, long_clip, long_plan, tmp_path):
    class Blind:
        count = 2

        def map(self, function, items):
            job = replace(function.args[0], folder=Path("/nowhere"))
            yield from Here(networks).map(functools.partial(function.func, job), items)

    with pytest.raises(MediaError, match="does not see /nowhere; every machine must see the input"):
        age_video(networks, long_clip, tmp_path / "out.mkv", REQUEST, plan=long_plan, workers=Blind())


@pytest.fixture(scope="module")
def two_nodes(tiny_model):
    """A Ray cluster of two nodes on this machine, with a processor each."""
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'faceage[ray]'")
    from ray.cluster_utils import Cluster as RayCluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_health_check_period_ms", "500")  # a lost node shows after some seconds
        patch.setenv("RAY_health_check_failure_threshold", "3")
        cluster = RayCluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False)
            nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
            cluster.wait_for_nodes()
            yield cluster, nodes
        finally:
            cluster.shutdown()


def test_ray_writes_what_one_writes_though_a_worker_and_a_node_are_lost(
    two_nodes, networks, load, here, long_clip, long_plan, face_photo, tmp_path, caplog
):
    cluster, nodes = two_nodes
    with Cluster(load, cluster.address) as ray_workers:
        assert ray_workers.count == 2
        assert outputs(ray_workers, networks, long_clip, long_plan, face_photo, tmp_path / "out") == here
    lost = []

    def lose() -> None:
        """Kill a process that renders a segment, then the node of another one."""
        first = rendering(tmp_path, ())
        os.kill(first, signal.SIGKILL)
        lost.append("worker")
        parent = int(Path(f"/proc/{rendering(tmp_path, [first])}/stat").read_text().rpartition(")")[2].split()[1])
        (node,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid == parent]
        cluster.remove_node(node, allow_graceful=False)
        lost.append("node")

    with Cluster(load, cluster.address) as ray_workers, ThreadPoolExecutor(1) as thread:
        loses = thread.submit(lose)
        target, encode = tmp_path / "x264.mp4", EncodeOptions(codec="libx264")
        age_video(networks, long_clip, target, REQUEST, plan=long_plan, encode=encode, workers=ray_workers)
        loses.result()
        assert lost == ["worker", "node"]
        assert content(target) == here["x264.mp4"]
        assert ray_workers.count == 1
        with pytest.raises(MediaError, match=r"^item 3 is too large$"):
            list(ray_workers.map(work.fail, [3]))
        assert "item 3 is odd" in caplog.messages


def rendering(folder, known):
    """Wait for a process that writes a segment somewhere in a folder, and is not a known one; return its number."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        # `media.files.partial_of` names what is being written after the process.
        for partial in folder.glob("**/*.packets.*.part"):
            process = int(partial.name.rsplit("-", 1)[1].removesuffix(".part"))
            if process not in known and Path(f"/proc/{process}").exists():
                return process
        time.sleep(0.005)
    raise AssertionError("no segment was begun in a minute")


def test_a_cluster_that_is_not_there(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'faceage[ray]'")
    with pytest.raises(EngineError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        Cluster(SEVEN, "127.0.0.1:1")
