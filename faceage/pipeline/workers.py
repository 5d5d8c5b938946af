"""Where the work is done: in this process, in several of this machine, or on a Ray cluster. All do the same.

A function that is mapped is given a `Worker` and an item, and gives any number of results. It is defined at the top of
a module, what it needs beside the item is bound to it by `functools.partial`, and doing an item twice does no harm: an
item whose worker dies is given to another one.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

import cv2

from faceage.errors import EngineError, FaceAgeError
from faceage.pipeline.request import Networks

# multiprocessing and socket are imported where they are needed: a run in one process starts without them.
if TYPE_CHECKING:
    from multiprocessing.connection import Connection

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)

RETRIES = 3
"""How often an item is given to another worker after its own died."""
CONNECT_S = 10
"""How long the head of a Ray cluster may take to answer."""


@dataclass(frozen=True)
class Worker:
    """What does the work."""

    networks: Networks
    threads: int
    """Threads that decoding, and batches of photos, may use at a time."""


Function = Callable[[Worker, T], Iterable[R]]
Load = Callable[[], Networks]
"""A `functools.partial` of `load_networks`: it is sent to where the work is done."""


class Workers(Protocol):
    """Workers; what they give does not depend on how many they are."""

    @property
    def count(self) -> int:
        """How many items are worked on at a time."""

    def map(self, function: Function[T, R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield the results of all items as they come, in any order; those of one item come together.

        Items are taken when they are needed. If the iterator is closed early, work that has begun is given up.

        Raises:
            EngineError: if the workers of one item died again and again.
        """


@dataclass(frozen=True)
class Here:
    """This process. Results come one by one, in the order of the items."""

    networks: Networks
    count: int = 1

    def map(self, function: Function[T, R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield the results of each item; see `Workers.map`."""
        worker = Worker(self.networks, os.cpu_count() or 1)
        for item in items:
            yield from function(worker, item)


class _Records(logging.Handler):
    """Keeps what the package logs, to be logged again where it is seen."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))


@contextmanager
def _recorded() -> Iterator[list[tuple[int, str]]]:
    handler, logger = _Records(), logging.getLogger("faceage")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)


@lru_cache(maxsize=1)
def _loaded(load: bytes) -> Networks:
    """Load the networks once a process; `load` is pickled, so that it is known again."""
    return pickle.loads(load)()


class _Answer(NamedTuple):
    """What came of an item."""

    results: list[Any]
    records: list[tuple[int, str]]
    """What was logged: level and message."""
    error: Exception | None


def _work(load: bytes, threads: int, function: Function[T, R], item: T) -> _Answer:
    """Do one item in a worker process."""
    with _recorded() as records:
        try:
            return _Answer(list(function(Worker(_loaded(load), threads), item)), records, None)
        except FaceAgeError as error:
            return _Answer([], records, error)
        except Exception as error:  # noqa: BLE001  carried to the parent process
            error.add_note(traceback.format_exc())
            return _Answer([], records, error)


def _taken(answer: _Answer) -> list[Any]:
    """Return an item's results here: what was logged is logged again, an error is raised."""
    for level, message in answer.records:
        log.log(level, "%s", message)
    if answer.error is not None:
        raise answer.error
    return answer.results


def _given_up(deaths: int) -> EngineError:
    return EngineError(
        f"a worker process died {deaths} times over one piece of work, killed or out of memory; "
        "give it more memory, or use fewer workers (--jobs)"
    )


def _serve(connection: Connection, load: bytes, threads: int) -> None:
    """Do what comes through the connection, until it is closed or the parent process is gone."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent process decides what an interruption ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(threads)
    while True:
        try:
            function, item = connection.recv()
        except EOFError:
            return
        connection.send(_work(load, threads, function, item))


def _end_with_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Process:
    """A worker process. `place` is the number of what it loads."""

    def __init__(self, place: int, load: bytes, threads: int) -> None:
        import multiprocessing

        self.place = place
        context = multiprocessing.get_context("spawn")  # a copy of this process would have its locks, not its threads
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, load, threads), daemon=True)
        self._process.start()
        other.close()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()


class Processes:
    """Processes of this machine. Use it as a context manager: they stay until it ends.

    Args:
        loads: load the networks, one of them once in each process, each in as many: one a GPU.
        count: how many.
    """

    def __init__(self, loads: Sequence[Load], count: int) -> None:
        self.count = count
        self._loads = [pickle.dumps(load) for load in loads]
        self._threads = max(1, (os.cpu_count() or 1) // count)
        self._idle: list[_Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            self._idle.pop().kill()

    def _new(self, busy: Iterable[_Process]) -> _Process:
        """Return a process that loads what the fewest have loaded; none is idle."""
        taken = Counter(process.place for process in busy)
        place = min(range(len(self._loads)), key=taken.__getitem__)
        return _Process(place, self._loads[place], self._threads)

    def map(self, function: Function[T, R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield the results of each item; see `Workers.map`."""
        from multiprocessing.connection import Connection, wait

        source = iter(items)
        again: deque[tuple[T, int]] = deque()
        busy: dict[Connection, tuple[_Process, T, int]] = {}
        try:
            while True:
                while len(busy) < self.count:
                    if again:
                        item, deaths = again.popleft()
                    else:
                        try:
                            item, deaths = next(source), 0
                        except StopIteration:
                            break
                    process = self._idle.pop() if self._idle else self._new(process for process, *_ in busy.values())
                    busy[process.connection] = process, item, deaths
                    with suppress(BrokenPipeError):  # it died idle, which shows below
                        process.connection.send((function, item))
                if not busy:
                    return
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    process, item, deaths = busy.pop(ready)
                    try:
                        answer = ready.recv()
                    except (EOFError, OSError) as gone:
                        process.kill()
                        if deaths == RETRIES:
                            raise _given_up(deaths + 1) from gone
                        log.info("a worker process died; its work is done again")
                        again.append((item, deaths + 1))
                        continue
                    self._idle.append(process)
                    yield from _taken(answer)
        finally:
            for process, _, _ in busy.values():
                process.kill()


class Cluster:
    """A Ray cluster, or this machine as one. Use it as a context manager around all that is done there.

    Every machine must see the inputs, the outputs and the work folder under the same names.

    Args:
        load: loads the networks, once in each of Ray's workers.
        address: of the cluster ("auto", "HOST:PORT", "ray://HOST:PORT"); "local" begins one on this machine.
        gpus: share of a GPU that each piece of work gets.

    Raises:
        EngineError: if Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, load: Load, address: str, gpus: float = 0) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # faceage calls nobody
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise EngineError("Ray is not installed; run: pip install 'faceage[ray]'") from error
        self._ray, self._gpus, self._load = ray, gpus, pickle.dumps(load)
        self._begun_here = not ray.is_initialized()
        if self._begun_here:
            options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            host, _, port = address.removeprefix("ray://").rpartition(":")
            try:
                if host:  # Ray itself waits for minutes for a cluster that is not there
                    import socket

                    socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise EngineError(
                    f"no Ray cluster at {address} ({reason}); start one with `ray start --head`, or use --ray local"
                ) from error

    @property
    def count(self) -> int:
        """The processors that the cluster has now, or what its GPUs have room for."""
        resources = self._ray.cluster_resources()
        if self._gpus:
            return max(1, int(resources.get("GPU", 0) / self._gpus))
        return max(1, int(resources.get("CPU", 1)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun_here:
            self._ray.shutdown()

    def map(self, function: Function[T, R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield the results of each item; see `Workers.map`. Ray chooses the machine, and another one if it is lost."""
        ray = self._ray
        task = ray.remote(_work).options(num_cpus=1, num_gpus=self._gpus, max_retries=RETRIES)
        shared = [ray.put(self._load), 1, ray.put(function)]
        source, pending = iter(items), list[Any]()
        try:
            while True:
                # One more than are worked on, so that no worker waits for this process.
                for item in source:
                    pending.append(task.remote(*shared, item))
                    if len(pending) > self.count:
                        break
                if not pending:
                    return
                (ready,), pending = ray.wait(pending, num_returns=1)
                try:
                    answer = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                    raise _given_up(RETRIES + 1) from error
                yield from _taken(answer)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
