"""Speed of each network by each backend, in one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np

from faceage.engines.base import Axis, Engine, Program, Runtime
from faceage.engines.store import EngineStore
from faceage.pipeline.request import all_programs
from faceage.types import FloatArray

BATCHES = (1, 8, 32)
MEASURED_S = 0.5
"""A call is repeated for at least this long, and at least `MIN_CALLS` times."""
MIN_CALLS = 5
TYPICAL_PX = {"height": 180, "width": 320}
"""Size of the pictures that P-Net is measured on: a level of its pyramid."""


def bench_engines(model: str, runtimes: list[Runtime], store: EngineStore, *, notify: Callable[[str], None]) -> dict:
    """Measure each network of a model by each backend; the first is the baseline of the speedups.

    Calls of the backends alternate, so that a machine that gets slower or faster does so for all.

    Args:
        model: its name.
        runtimes: one a backend, all on the same device.
        store: has the engines, or gets them.
        notify: told what runs.

    Returns:
        "rows": a network, a batch size and a backend each, with "median_ms", "faces_per_s" and "compile_s";
        "speedups": by backend over the first one: "total", the ratio of the summed medians, and "mean", the geometric
        mean of the ratios.
    """
    rows: list[dict] = []
    device = runtimes[0].device
    for program in all_programs(model):
        notify(program.name)
        engines = {runtime.backend.name: store.load(program, runtime) for runtime in runtimes}
        seconds = [_compile_seconds(store, program, runtime) for runtime in runtimes]
        for batch in _batches(program):
            times = _alternate(engines, _inputs(program, batch))
            for runtime, compile_s in zip(runtimes, seconds, strict=True):
                milliseconds = 1e3 * median(times[runtime.backend.name])
                rows.append({
                    "network": program.name, "batch": batch, "backend": runtime.backend.name,
                    "precision": program.spec("cpu" if device == "cpu" else "cuda", runtime.precision).precision,
                    "median_ms": round(milliseconds, 3), "faces_per_s": round(1e3 * batch / milliseconds, 1),
                    "compile_s": compile_s,
                })  # fmt: skip
    names = [runtime.backend.name for runtime in runtimes]
    by_backend = {name: [row["median_ms"] for row in rows if row["backend"] == name] for name in names}
    base = by_backend[names[0]]
    speedups = {
        name: {
            "total": round(sum(base) / sum(times), 2),
            "mean": round(math.exp(np.mean([math.log(b / t) for b, t in zip(base, times, strict=True)])), 2),
        }
        for name, times in by_backend.items()
    }
    return {"device": device, "baseline": names[0], "speedups": speedups, "rows": rows}


def _compile_seconds(store: EngineStore, program: Program, runtime: Runtime) -> float | None:
    """Return how long the engine that was loaded took to build; None where nothing is built."""
    backend = runtime.backend
    for target in backend.targets(runtime.device):
        spec = program.spec(target, runtime.precision)
        if backend.suffix(program, target) is not None and store.contains(program, backend, spec):
            return store.build(program, backend, spec)[0]["build_seconds"]
    return None


def _batches(program: Program) -> list[int]:
    """Return the batch sizes that a network takes."""
    most = min(axis.max for spec in program.inputs for axis in spec.shape if isinstance(axis, Axis))
    return [batch for batch in BATCHES if batch <= most]


def _inputs(program: Program, batch: int) -> tuple[FloatArray, ...]:
    """Return inputs of a batch size, random: the time does not depend on what they show."""
    random = np.random.default_rng(0)
    sizes = {"batch": batch, **TYPICAL_PX}
    shapes = [[axis if isinstance(axis, int) else sizes[axis.name] for axis in spec.shape] for spec in program.inputs]
    return tuple(random.uniform(-1, 1, shape).astype(np.float32) for shape in shapes)


def _alternate(engines: dict[str, Engine], inputs: tuple[FloatArray, ...]) -> dict[str, list[float]]:
    """Return the seconds of calls, the engines by turns; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine(*inputs)
    while min(map(sum, times.values())) < MEASURED_S or len(next(iter(times.values()))) < MIN_CALLS:
        for name, engine in engines.items():
            start = perf_counter()
            engine(*inputs)
            times[name].append(perf_counter() - start)
    return times
