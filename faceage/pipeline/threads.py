"""Stages that overlap: a source that reads ahead and a sink that writes behind, both bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Generic, Self, TypeVar

from faceage.pipeline.timer import StageTimer

T = TypeVar("T")
R = TypeVar("R")
_POLL_S = 0.1
"""How often a blocked thread looks whether the other side has gone."""


def timed(items: Iterable[T], stage: str, timer: StageTimer) -> Iterator[T]:
    """Iterate, counting the time that the source takes toward a stage."""
    iterator = iter(items)
    while True:
        with timer(stage):
            item = next(iterator, None)
        if item is None:
            return
        yield item
        del item


def read_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate over `items` in a thread, at most `depth` ahead of the consumer; errors come out where they would."""
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                queue.put(entry, timeout=_POLL_S)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not put((item, None)):
                    return
                del item  # or it would live on while the next one is read
        except BaseException as raised:  # noqa: BLE001  carried to the consumer
            error = raised
        put((None, error or StopIteration()))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
            del item
    finally:
        stop.set()
        thread.join()


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Call `function` on each item, `workers` at a time in threads and one more waiting; yield the results in order."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class WriteBehind(Generic[T]):
    """Calls `write` for each item in a thread, at most `depth` behind. Leaving the `with` block waits for the rest."""

    def __init__(self, write: Callable[[T], None], depth: int) -> None:
        self._write = write
        self._queue: Queue[T | None] = Queue(depth)
        self._error: BaseException | None = None
        self._abandon = False
        self._thread = threading.Thread(target=self._work, name="write-behind", daemon=True)

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if self._error is None and not self._abandon:
                try:
                    self._write(item)
                except BaseException as error:  # noqa: BLE001  carried to the producer
                    self._error = error
            del item

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Hand over one item; raises what an earlier one raised."""
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon = kind is not None
        if self._abandon:
            while True:
                try:
                    self._queue.get_nowait()
                except Empty:
                    break
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error
