"""How fast a video is aged by one and by several processes, and how far more workers would go."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from faceage.bench.runs import Load, Notify, in_child, medians
from faceage.bench.video import loop_clip, scan_into
from faceage.errors import UnsupportedError
from faceage.media.probe import probe_video
from faceage.media.video import EncodeOptions
from faceage.pipeline.plan import SEGMENT_FRAMES, load_plan
from faceage.pipeline.request import AgeRequest
from faceage.pipeline.video import age_video
from faceage.pipeline.workers import Here, Processes

JOBS = (1, 2)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
SEGMENTS = 4
"""Segments that the measured video has at least."""
HOUR_S = 3600.0
"""Length of the video that is simulated: the measured segments over and over."""


def bench_scale(
    load: Load,
    clip: Path,
    request: AgeRequest,
    encode: EncodeOptions,
    *,
    jobs: Sequence[int] = JOBS,
    repeats: int = 2,
    notify: Notify,
) -> dict:
    """Measure rendering by one process and by several, from a plan; and simulate it by up to 64 workers.

    The simulation gives each worker the next segment when it has finished one, takes the times of the segments as they
    were measured with one process, and has as many cores for each worker as that one had. Where the clip is shorter
    than `SEGMENTS` segments, it is measured several times in a row.

    Args:
        load: its engines are built already.
        clip: the video.
        request: whom to age.
        encode: of the output.
        jobs: numbers of processes; 1 is among them.
        repeats: runs of each.
        notify: told what runs.

    Raises:
        UnsupportedError: if the clip does not say how many frames it has.
    """
    info = probe_video(clip)
    if not info.frame_count:
        raise UnsupportedError(f"{clip} does not say how many frames it has; use an MP4 clip")
    encode = replace(encode, overwrite=True)
    with tempfile.TemporaryDirectory(prefix="faceage-bench-") as name:
        folder = Path(name)
        loops = -(-SEGMENTS * SEGMENT_FRAMES // info.frame_count)
        longer = clip if loops == 1 else loop_clip(clip, folder / f"longer{clip.suffix}", loops)
        notify(f"scanning {loops} times the clip" if loops > 1 else "scanning the clip")
        scanned = in_child(scan_into, load, longer, folder / "plan")
        runs: dict[int, list[dict]] = {count: [] for count in jobs}
        segments: list[list[float]] = []
        for number in range(1, repeats + 1):
            for count in jobs:
                notify(f"--jobs {count}, {number} of {repeats}")
                run = in_child(
                    _age, load, count, longer, folder / f"out{clip.suffix}", request, encode, folder / "plan"
                )
                if count == 1:
                    segments.append(run["segment_seconds"])
                del run["segment_seconds"]
                runs[count].append(run)
    measured = {count: medians(rows) for count, rows in runs.items()}
    times = np.median(segments, 0)
    copies = max(1, round(HOUR_S / scanned["duration_s"]))
    return {
        "frames": measured[1]["frames"],
        "scan_seconds": round(scanned["seconds"], 3),
        "segment_seconds": [round(float(seconds), 3) for seconds in times],
        "jobs": [
            {"jobs": count, **row, "speedup": round(row["fps"] / measured[1]["fps"], 2)}
            for count, row in measured.items()
        ],
        "simulated": simulate(list(times) * copies, measured[1]["assemble_seconds"] * copies),
    }


def simulate(segments: Sequence[float], assemble_seconds: float) -> list[dict]:
    """Return how long workers take over segments, each the next one when it is free.

    Args:
        segments: seconds of each, in order.
        assemble_seconds: what follows in one process.

    Returns:
        By number of workers: "workers", "seconds" with and "render_seconds" without the assembly, "speedup" of the
        rendering over one worker, and "ideal", which is the number of workers.
    """
    total = float(sum(segments))
    rows = []
    for workers in WORKERS:
        free = [0.0] * workers
        for seconds in segments:
            heapq.heappush(free, heapq.heappop(free) + seconds)
        render = max(free)
        rows.append({
            "workers": workers,
            "render_seconds": round(render, 2),
            "seconds": round(render + assemble_seconds, 2),
            "speedup": round(total / render, 2),
            "ideal": workers,
        })  # fmt: skip
    return rows


def _age(
    load: Load, jobs: int, clip: Path, target: Path, request: AgeRequest, encode: EncodeOptions, folder: Path
) -> dict:
    networks, plan = load(), load_plan(folder)
    ends: list[float] = []
    start = perf_counter()

    def progress(stage: str, done: int, total: int | None) -> None:
        # With one process segments come in order; their ends are seen to within a few frames.
        while len(ends) < plan.segment_count and done >= plan.boundaries[len(ends) + 1]:
            ends.append(perf_counter() - start)

    with Processes([load], jobs) if jobs > 1 else nullcontext(Here(networks)) as workers:
        report = age_video(
            networks, clip, target, request, plan=plan, encode=encode, workers=workers, progress=progress
        )
    return {
        "frames": report.frames,
        "seconds": report.seconds,
        "fps": report.frames / report.seconds,
        "assemble_seconds": report.seconds - ends[-1],
        "segment_seconds": [float(seconds) for seconds in np.diff(ends, prepend=0.0)],
    }
