"""What a run says: lines and a progress bar for people, JSON lines for programs, a report for the record."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import click

from faceage.errors import CheckpointError, EngineError, FaceAgeError, MediaError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EXIT_SOME_FAILED, EXIT_NOTHING_DONE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED = 1, 3, 4, 130
_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GOES_ON = "the same command goes on where this one ended"
PROGRESS_EVENT_S = 1.0
"""At least this long between two progress events of --json."""


def exit_code(error: FaceAgeError) -> int:
    """Return the exit code of an error that ended a run."""
    is_environment = isinstance(error, EngineError | CheckpointError)
    return EXIT_ENVIRONMENT if is_environment else EXIT_NOTHING_DONE


def say_error(message: str) -> None:
    """Print an error as one line on stderr."""
    click.echo(f"faceage: error: {' '.join(message.split())}", err=True)


def _check_report(path: Path) -> None:
    """Refuse, before anything is done, a report that could not be written or would replace a picture or a video."""
    if path.suffix.lower() not in (".json", ".html"):
        raise click.BadParameter(
            f"the report {path} is JSON or a page; name a file that ends in .json or .html", param_hint="--report"
        )
    for file in [path] if path.suffix.lower() == ".json" else [path, path.with_suffix(".json")]:
        real = file.resolve()  # what a link leads to is what would be replaced
        if real.suffix.lower() not in (".json", ".html"):
            raise click.BadParameter(f"the report {file} leads to {real}; name another file", param_hint="--report")
        if not (os.path.isdir(real.parent) and os.access(real if os.path.exists(real) else real.parent, os.W_OK)):
            raise click.BadParameter(
                f"the report {file} cannot be written; name a file in a folder that is there and can be written",
                param_hint="--report",
            )


class Output:
    """The output of one command; use it as a context manager around the work.

    It turns errors that the user can act on into one line and an exit code, and writes the report in any case.
    """

    def __init__(
        self, command: str, options: dict, *, as_json: bool = False, report: Path | None = None, verbosity: int = 0
    ) -> None:
        """Say what is asked for.

        Args:
            command: the command's name.
            options: its resolved options, for the report.
            as_json: print events on stdout, and nothing else there.
            report: file that gets the whole record, ends in .json; or in .html: a page, with the record beside it.
            verbosity: -1 only errors, 0, 1 also what was chosen and how long it took.

        Raises:
            click.BadParameter: if the report cannot be written, or ends in anything else.
        """
        if report is not None:
            _check_report(report)
        self.as_json, self.verbosity = as_json, verbosity
        self.is_interactive = sys.stderr.isatty() and not as_json and verbosity >= 0
        self._report = report
        self._record: dict = {"command": command, "options": options}
        self._items: IO[str] | None = None
        """Of a folder of any size nothing is kept in memory."""
        self._done = self._failed = self._kept = 0
        self._lock = threading.RLock()  # photos are reported from worker threads
        self._started = monotonic()
        self._next_progress: dict[str, float] = {}
        self._logged: set[str] = set()
        self._handler = _Handler(self._log)
        self._signals: dict[int, Any] = {}
        self._is_interrupted = False
        self.can_go_on = False
        """Whether the same command goes on where this one is interrupted."""
        self._bar: Progress | None = None
        self._clock: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._report is not None:
            import tempfile  # here: a run without a report starts without it

            self._items = tempfile.TemporaryFile("w+")
        if threading.current_thread() is threading.main_thread():
            self._signals = {number: signal.signal(number, self._interrupt) for number in _INTERRUPTIONS}
        logger = logging.getLogger("faceage")
        self._level = logger.level
        logger.setLevel({-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}[self.verbosity])
        logger.addHandler(self._handler)
        try:
            self.event("start", command=self._record["command"], options=self._record["options"])
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(error)
        finally:
            self._release()

    def _end(self, error: BaseException | None) -> None:
        """Say how the run ended and write the report.

        Raises:
            click.exceptions.Exit: with the code, if that is not 0.
        """
        self.end_progress()
        if self._is_interrupted or isinstance(error, KeyboardInterrupt):
            # Whatever the error is: a library that is being imported makes one of its own of an interruption.
            code = EXIT_INTERRUPTED
            say_error("interrupted; what was finished stays" + (f", and {GOES_ON}" if self.can_go_on else ""))
        elif error is None:
            code = 0 if not self._failed else EXIT_SOME_FAILED if self._done or self._kept else EXIT_NOTHING_DONE
        elif isinstance(error, FaceAgeError):
            code = exit_code(error)
            if code == EXIT_NOTHING_DONE and (self._done or self._kept):
                code = EXIT_SOME_FAILED
            self._record["error"] = str(error)
            self.event("error", message=str(error))
            say_error(str(error))
        else:
            return
        seconds = round(monotonic() - self._started, 3)
        self._record |= {"seconds": seconds, "done": self._done, "failed": self._failed, "exit_code": code}
        if not self._write_report():
            code = code or EXIT_SOME_FAILED
        self.event("done", seconds=seconds, done=self._done, failed=self._failed, exit_code=code)
        if code:
            raise click.exceptions.Exit(code) from error

    def _release(self) -> None:
        """Give back what a run holds of the process, however it ended."""
        logger = logging.getLogger("faceage")
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        if self._items is not None:
            self._items.close()
        for number, handler in self._signals.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: object) -> None:
        """End the run so that nothing half done is left; the second time, at once."""
        if self._is_interrupted:
            show_cursor = "\x1b[?25h" if self.is_interactive else ""
            os.write(2, f"{show_cursor}faceage: error: stopped at once; the next run cleans up\n".encode())
            os._exit(EXIT_INTERRUPTED)
        self._is_interrupted = True
        raise KeyboardInterrupt

    def event(self, kind: str, **fields: object) -> None:
        """Print one JSON event, if JSON is asked for."""
        if self.as_json:
            with self._lock:
                self._print(json.dumps({"event": kind, **fields}, default=str))

    def line(self, text: str) -> None:
        """Print a result on stdout."""
        if not self.as_json and self.verbosity >= 0:
            with self._lock:
                self._print(text)

    def _print(self, text: str) -> None:
        """Print a line on stdout.

        Raises:
            MediaError: if the disk that it goes to is full.
        """
        try:
            click.echo(text)
        except BrokenPipeError:
            raise  # nobody wants to read on, which Click knows
        except OSError as error:
            self.as_json, self.verbosity = False, -1
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or what is left is tried again when Python ends
            raise MediaError(
                f"standard output cannot be written ({error.strerror}); free space where it goes to, and run the "
                "command again"
            ) from error

    def note(self, text: str) -> None:
        """Print something worth knowing on stderr."""
        self.event("note", message=text)
        if self.verbosity >= 0:
            self._say(f"faceage: {text}")

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.event("warning", message=text)
        self._record.setdefault("warnings", []).append(text)
        if self.verbosity >= 0:
            self._say(f"faceage: warning: {text}")

    def detail(self, text: str) -> None:
        """Print on stderr what only -v shows."""
        if self.verbosity > 0:
            self._say(f"faceage: {text}")

    @contextmanager
    def building(self, engine: str) -> Iterator[None]:
        """Say that an engine is being built, once, and how long that takes."""
        self.event("engine", name=engine)
        start = monotonic()
        text = f"building engines (once): {engine}"
        if self.is_interactive and self._bar is None:
            with self._timed(f"faceage: {text}"):
                yield
        else:
            if self.verbosity >= 0:
                self._say(f"faceage: {text} ...")
            yield
        self.event("engine", name=engine, seconds=round(monotonic() - start, 2))

    @contextmanager
    def _timed(self, text: str) -> Iterator[None]:
        """Show a line with the time that has passed; several threads may show one each."""
        from faceage.cli.bar import make_clock

        with self._lock:
            if self._clock is None:
                self._clock = make_clock()
                self._clock.start()
            clock = self._clock
            line = clock.add_task(text, total=None)
        try:
            yield
        finally:
            with self._lock:
                clock.stop_task(line)
                if all(task.stop_time is not None for task in clock.tasks):
                    clock.stop()
                    self._clock = None

    def item(self, record: dict, *, say: bool = True) -> None:
        """Count a file: a record with an "error" as failed, one with "damage" as done and failed, any other as done.

        Args:
            record: goes into the report.
            say: print its error.
        """
        with self._lock:
            if self._items is not None:
                self._items.write(json.dumps(record, default=str) + "\n")
            self._done += not record.get("error")
            self._failed += bool(record.get("error") or record.get("damage"))
            self.event("item", **record)
            if record.get("error") and say:
                self._bar_or_stderr(say_error, str(record["error"]))

    def keep(self, count: int) -> None:
        """Count files that an earlier run has done: if others fail, it is not true that nothing is done."""
        self._kept += count

    def result(self, name: str, value: object) -> None:
        """Put something beside the items into the report."""
        self._record[name] = value

    def progress(self, source: str, stage: str, done: int, total: int | None) -> None:
        """Move the bar of a file's pass, or print an event now and then."""
        now = monotonic()
        first = self._next_progress.setdefault(stage, now)
        if self.as_json and (now >= first or done == total):
            self._next_progress[stage] = now + PROGRESS_EVENT_S
            self.event("progress", source=source, stage=stage, done=done, total=total)
        elif self.is_interactive:
            with self._lock:
                if self._clock is not None:
                    return  # engines are built beside, which is shown
                self._advance(f"{Path(source).name} {stage}", done, total)

    def end_progress(self) -> None:
        """Take the bar away: a file is finished."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
            self._bar = None
            self._tasks.clear()
            self._next_progress.clear()

    def _advance(self, title: str, done: int, total: int | None) -> None:
        if self._bar is None:
            from faceage.cli.bar import make_bar

            self._bar = make_bar()
            self._bar.start()
        if title not in self._tasks:
            for task in self._tasks.values():
                self._bar.remove_task(task)
            self._tasks = {title: self._bar.add_task(title, total=total)}
        self._bar.update(self._tasks[title], completed=done, total=total)

    def _say(self, text: str) -> None:
        self._bar_or_stderr(lambda line: click.echo(line, err=True), text)

    def _bar_or_stderr(self, say: Callable[[str], None], text: str) -> None:
        """Print above the bar, or the lines of the clock, if there are such: it would be drawn over otherwise."""
        with self._lock:
            shown = self._bar or self._clock
            if shown is None:
                say(text)
            else:
                shown.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _log(self, level: int, message: str) -> None:
        """Show what the library logs, once: a video is opened several times."""
        if message not in self._logged:
            self._logged.add(message)
            (self.warn if level >= logging.WARNING else self.detail)(message)

    def _write_report(self) -> bool:
        """Write the report, if one is asked for, and return whether that worked."""
        if self._report is None or self._items is None:
            return True
        from faceage.cli.environment import machine, versions

        record = {"versions": versions(), "machine": machine(), **self._record}
        path = self._report.with_suffix(".json") if self._report.suffix.lower() == ".html" else self._report
        try:
            with path.open("w") as file:
                self._write_json(file, record)
            if path != self._report:
                from faceage.pipeline.report_page import report_page

                path = self._report
                with path.open("w") as file:
                    file.writelines(report_page(record, self._read_items()))
        except OSError as error:
            say_error(f"the report {path} cannot be written ({error.strerror}); name another file")
            return False
        return True

    def _write_json(self, file: IO[str], record: dict) -> None:
        head, end = json.dumps(record, indent=2, default=str).rsplit("\n", 1)
        file.write(f'{head},\n  "items": [')
        for number, item in enumerate(self._read_items()):
            file.write(("," if number else "") + "\n" + textwrap.indent(json.dumps(item, indent=2), "    "))
        file.write(f"\n  ]\n{end}\n")

    def _read_items(self) -> Iterator[dict]:
        assert self._items is not None
        self._items.seek(0)
        for line in self._items:
            yield json.loads(line)


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[int, str], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.levelno, record.getMessage())
