"""Times of stages, and traces of them; a GPU's events by a stand-in."""

import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from faceage.errors import MediaError
from faceage.pipeline.timer import Span, StageTimer


def test_stages_of_several_threads_add_up():
    timer = StageTimer()

    def work():
        with timer("decode"):
            threading.Event().wait(0.02)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    timer.add({"decode": 1.0, "encode": 0.5})
    seconds, spans = timer.measured()
    assert 1.04 <= seconds["decode"] < 1.5
    assert seconds["encode"] == 0.5
    assert timer.ms_per(10)["encode"] == 50
    assert spans == [], "no trace was asked for"


def test_a_trace_shows_every_span(tmp_path):
    timer = StageTimer(traces=True)
    with timer("decode"), timer("encode"):
        pass
    timer.add({"age": 0.25}, [Span("age", 17, "worker", 12.0, 0.25)])
    timer.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = {e["name"]: e for e in events if e["ph"] == "X"}
    assert spans.keys() == {"decode", "encode", "age"}
    assert names[spans["age"]["pid"], spans["age"]["tid"]] == "worker"
    assert spans["age"]["dur"] == 250_000
    assert spans["encode"]["pid"] == os.getpid()
    assert names[os.getpid(), spans["encode"]["tid"]] == "MainThread"
    assert spans["decode"]["ts"] <= spans["encode"]["ts"]
    assert min(e["ts"] for e in spans.values()) == 0
    with pytest.raises(MediaError, match=r"no/trace\.json cannot be written \(No such file"):
        timer.write_trace(tmp_path / "no" / "trace.json")


class GPU:
    """A GPU that does a second of work a stage, and is behind by as much as it is told."""

    def __init__(self, monkeypatch):
        gpu = self
        self.now = 0.0  # ms that were asked for
        self.done = 0.0  # ms that have passed
        self.waits = 0

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream.device == "cuda:1"
                self.at = gpu.now

            def query(self):
                return self.at <= gpu.done

            def synchronize(self):
                gpu.waits += 1
                gpu.done = max(gpu.done, self.at)

            def elapsed_time(self, later):
                assert self.query()
                assert later.query()
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(device=device))


def test_events_of_a_gpu_are_read_when_they_have_passed(monkeypatch):
    gpu = GPU(monkeypatch)
    timer = StageTimer("cuda:1", traces=True)
    assert gpu.waits == 1, "once, to compare the clocks"
    for _ in range(5):
        with timer("blend"):
            gpu.now += 1000
        gpu.done = gpu.now - 1500
    assert gpu.waits == 1, "no stage waits for the GPU"
    seconds, spans = timer.measured()
    assert seconds["blend on cuda:1"] == pytest.approx(5.0)
    assert seconds["blend"] < 1, "the host only asks"
    on_gpu = [span for span in spans if span.thread == "cuda:1"]
    assert [span.seconds for span in on_gpu] == pytest.approx([1.0] * 5)
    starts = [span.start_s - on_gpu[0].start_s for span in on_gpu]
    assert starts == pytest.approx([0, 1, 2, 3, 4])


def test_a_cpu_has_no_events():
    timer = StageTimer("cpu")
    with timer("blend"):
        pass
    assert timer.measured()[0].keys() == {"blend"}
