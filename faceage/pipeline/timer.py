"""How long each stage takes, on the host and on a GPU, and a trace of it for Chrome's viewer."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from faceage.errors import MediaError
from faceage.media.files import write_atomically

if TYPE_CHECKING:
    import torch


class Span(NamedTuple):
    """A stage at work, once."""

    stage: str
    process: int
    thread: str
    """The thread's name, or the GPU's."""
    start_s: float
    """On the clock of `perf_counter`, which the processes of a machine share."""
    seconds: float


class StageTimer:
    """Seconds spent in each stage, summed over threads.

    On a GPU events mark in the thread's stream where a stage's work begins and ends, and are read when they have
    passed: nothing waits for them.

    Args:
        device: a GPU whose time is counted too, under "STAGE on DEVICE"; None: no GPU is at work.
        traces: keep every span for a trace.
    """

    def __init__(self, device: str | None = None, *, traces: bool = False) -> None:
        self._seconds: dict[str, float] = {}
        self._spans: list[Span] = []
        self.traces = traces
        self._lock = threading.Lock()
        self._gpu = _GPUClock(device) if device is not None and device.startswith("cuda") else None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside the `with` block toward a stage."""
        start = perf_counter()
        begin = self._gpu.mark() if self._gpu else None
        try:
            yield
        finally:
            with self._lock:
                self._count(Span(stage, os.getpid(), threading.current_thread().name, start, perf_counter() - start))
                if self._gpu and begin:
                    self._gpu.pending.append((stage, begin, self._gpu.mark()))
                    for span in self._gpu.passed():
                        self._count(span)

    def _count(self, span: Span) -> None:
        self._seconds[span.stage] = self._seconds.get(span.stage, 0.0) + span.seconds
        if self.traces:
            self._spans.append(span)

    def measured(self) -> tuple[dict[str, float], list[Span]]:
        """Return the seconds of each stage so far, and the spans of a trace; the GPU's last event is waited for."""
        with self._lock:
            if self._gpu:
                for span in self._gpu.passed(wait=True):
                    self._count(span)
            return dict(self._seconds), list(self._spans)

    def add(self, seconds: Mapping[str, float], spans: Sequence[Span] = ()) -> None:
        """Count what another timer measured."""
        with self._lock:
            for stage, value in seconds.items():
                self._seconds[stage] = self._seconds.get(stage, 0.0) + value
            self._spans += spans

    def ms_per(self, count: int) -> dict[str, float]:
        """Return milliseconds per frame (or photo) of each stage."""
        return {stage: round(1e3 * value / max(count, 1), 2) for stage, value in self.measured()[0].items()}

    def write_trace(self, path: Path) -> None:
        """Write the spans as a trace that chrome://tracing and Perfetto show.

        Raises:
            MediaError: if the file cannot be written.
        """
        spans = self.measured()[1]
        threads = {key: number for number, key in enumerate(dict.fromkeys((s.process, s.thread) for s in spans))}
        events: list[dict] = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": number, "args": {"name": name}}
            for (process, name), number in threads.items()
        ]
        origin = min((span.start_s for span in spans), default=0.0)
        events += [
            {
                **{"ph": "X", "name": span.stage, "pid": span.process, "tid": threads[span.process, span.thread]},
                **{"ts": round(1e6 * (span.start_s - origin), 1), "dur": round(1e6 * span.seconds, 1)},
            }
            for span in spans
        ]
        try:
            with write_atomically(path) as file:
                file.write(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
        except OSError as error:
            raise MediaError(f"the trace {path} cannot be written ({error.strerror}); name another file") from error


class _GPUClock:
    """Events in the streams of a GPU, and their times on the host's clock."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = device
        self._name = str(torch.cuda.current_stream(device).device)
        self._origin = self.mark()
        self._origin.synchronize()
        self._origin_s = perf_counter()
        self.pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        """Stage, begin and end of what may not have passed yet."""

    def mark(self) -> torch.cuda.Event:
        """Return an event after what the calling thread asked of the GPU so far."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, *, wait: bool = False) -> Iterator[Span]:
        """Take and yield the spans that have passed, or all of them."""
        while self.pending and (wait or self.pending[0][2].query()):
            stage, begin, end = self.pending.popleft()
            if wait:
                end.synchronize()
            start_s = self._origin_s + self._origin.elapsed_time(begin) / 1e3
            yield Span(f"{stage} on {self._name}", os.getpid(), self._name, start_s, begin.elapsed_time(end) / 1e3)
