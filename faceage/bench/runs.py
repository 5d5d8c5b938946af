"""Runs that are measured: one after the other, and in processes of their own where memory is measured."""

from __future__ import annotations

import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

from faceage.pipeline.request import Networks

Load = Callable[[], Networks]
"""Loads the networks; it is sent to other processes, so it is a `functools.partial` of `load_networks`."""
Notify = Callable[[str], None]
"""Told in one line what is measured now."""


def medians(rows: list[dict]) -> dict:
    """Return the median of each number of several runs; of memory, the largest."""
    numbers = {
        key: round(median(row[key] for row in rows), 3) for key, value in rows[0].items() if not isinstance(value, dict)
    }
    if "peak_rss_mb" in numbers:
        numbers["peak_rss_mb"] = max(row["peak_rss_mb"] for row in rows)
    for key, value in rows[0].items():
        if isinstance(value, dict):
            numbers[key] = {name: round(median(row[key][name] for row in rows), 2) for name in value}
    return numbers


def in_child(function: Callable[..., dict], *args: object) -> dict:
    """Call a function in a new process; add the process's peak memory and its whole time to what it returns."""
    start = perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(_with_peak, function, args).result()
    return result | {"process_seconds": perf_counter() - start}


def _with_peak(function: Callable[..., dict], args: tuple) -> dict:
    return function(*args) | {"peak_rss_mb": round(_peak_rss_mb(), 1)}


def _peak_rss_mb() -> float:
    """Return the most memory this process has had. Linux's getrusage would count the parent before exec too."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
