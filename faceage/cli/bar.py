"""The progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Frames or photos a second."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.1f}/s")


def make_bar() -> Progress:
    """Return a bar on stderr: what is being done, how far it is, how fast, and how long it still takes."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def make_clock() -> Progress:
    """Return lines on stderr with the time that has passed, which stay: for what has no known length."""
    return Progress(TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=Console(stderr=True))
