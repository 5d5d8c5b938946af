"""`faceage bench engines`: that it measures what it says."""

import json
import math

import pytest
from click.testing import CliRunner

from faceage.bench import engines as bench_engines
from faceage.cli import main
from faceage.engines.registry import BACKENDS
from faceage.pipeline.request import all_programs


def test_every_network_and_batch_is_measured_by_each_backend(networks, tiny_model, monkeypatch):
    monkeypatch.setattr(bench_engines, "MEASURED_S", 0.0)
    monkeypatch.setattr(bench_engines, "MIN_CALLS", 1)
    args = ["bench", "engines", "--model", tiny_model, "--backend", "openvino", "--json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.stderr
    (item,) = [event for line in result.stdout.splitlines() if (event := json.loads(line))["event"] == "item"]
    rows = item["rows"]
    measured = [(row["network"], row["batch"], row["backend"]) for row in rows]
    batches = {"mtcnn-pnet": (1, 8)}  # its frames come one at a time, or a few
    assert measured == [
        (program.name, batch, backend)
        for program in all_programs(tiny_model)
        for batch in batches.get(program.name, (1, 8, 32))
        for backend in ("torch", "openvino")
    ]
    programs = {program.name: program for program in all_programs(tiny_model)}
    for row in rows:
        best = BACKENDS[row["backend"]].best_precision("cpu")
        assert row["precision"] == programs[row["network"]].spec("cpu", best).precision
        assert row["faces_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"], rel=0.05)
        assert (row["compile_s"] is None) == (row["backend"] == "torch" or row["network"] == "mtcnn-pnet")
    times = {name: [row["median_ms"] for row in rows if row["backend"] == name] for name in ("torch", "openvino")}
    speedup = item["speedups"]["openvino"]
    assert speedup["total"] == pytest.approx(sum(times["torch"]) / sum(times["openvino"]), abs=0.01)
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    assert speedup["mean"] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=0.01)
    assert item["speedups"]["torch"] == {"total": 1.0, "mean": 1.0}


def test_a_backend_that_does_not_run_there_is_one_line(tiny_model):
    result = CliRunner().invoke(main, ["bench", "engines", "--model", tiny_model, "--backend", "tensorrt"])
    assert result.exit_code == 4
    assert "backend tensorrt runs on NVIDIA GPUs, not on the CPU" in result.stderr
