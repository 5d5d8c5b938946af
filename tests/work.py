"""Functions for workers in other processes, which import them."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from faceage.errors import MediaError
from faceage.pipeline.workers import Worker


def double(worker: Worker, item: int) -> Iterator[int]:
    """Give the item times what the workers' networks are, which are a number here, twice."""
    assert isinstance(worker.networks, int)
    yield item * worker.networks
    yield item * worker.networks


def show(worker: Worker, item: int) -> Iterator[int]:
    """Give what the networks are, after a while in which others may begin."""
    assert isinstance(worker.networks, int)
    time.sleep(0.3)
    yield worker.networks


def die_once(folder: Path, worker: Worker, item: int) -> Iterator[int]:
    """Kill the process at the first try of odd items."""
    mark = folder / str(item)
    if item % 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    yield item


def die(worker: Worker, item: int) -> Iterator[int]:
    """Kill the process."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield item


def fail(worker: Worker, item: int) -> Iterator[int]:
    """Warn, and raise an error."""
    logging.getLogger("faceage.work").warning("item %d is odd", item)
    yield item
    if item > 2:
        raise MediaError(f"item {item} is too large")


def stumble(worker: Worker, item: int) -> Iterator[int]:
    """Raise an error that is a bug."""
    raise ZeroDivisionError


def sleep(folder: Path, worker: Worker, item: int) -> Iterator[int]:
    """Say which process this is, and take long."""
    (folder / str(os.getpid())).touch()
    time.sleep(60)
    yield item
