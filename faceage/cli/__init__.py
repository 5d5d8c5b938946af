"""The command line. A command parses its options, makes a configuration, calls the library once, and reports.

Each command has its module here, imported when it is asked for: `faceage --help` imports Click and nothing else.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
from importlib import import_module
from platform import libc_ver

import click

from faceage import __version__
from faceage.errors import FaceAgeError

# Each core has a thread of ours already. NumPy's products and OpenCV's operations, which are small here, would be cut
# into as many more, which wait for one another: products take five times the processor's time. Both libraries read this
# when they are imported.
for _variable in ("OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
    os.environ.setdefault(_variable, "1")


def _keep_memory() -> None:
    """Let the C library keep what large arrays leave, for the next ones, if it is glibc; before there are threads.

    It would have a heap for each thread and give each heap's end back to the kernel, which clears every page when it
    hands it out again: a tenth of a camera photo's processor time.
    """
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # malloc.h
    if libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(arena_max, 1)
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        mallopt(trim_threshold, 512 << 20)


_keep_memory()
# By default all imported modules would be searched for garbage again and again: a tenth of a photo's time.
gc.set_threshold(20_000)

COMMANDS = {
    "video": "Age every face in videos.",
    "scan": "Find out who is in a video, once: a plan to age it by, and a page of its people.",
    "images": "Age every face in photos and folders of photos.",
    "sheet": "Draw a photo's faces at several ages, in one picture.",
    "compile": "Build the engines for a target, ahead of time.",
    "engines": "List, verify and prune the engines that are stored.",
    "models": "List, describe, fetch and import models.",
    "doctor": "Say what works on this machine, and how to mend what does not.",
    "bench": "Measure speed on this machine, against baselines in the same run.",
}
"""Command, which is also its module here, and its line in the help."""


class _LazyGroup(click.Group):
    """Imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return import_module(f"faceage.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an error that the user can act on is one line and an exit code."""
        try:
            return super().invoke(ctx)
        except FaceAgeError as error:
            from faceage.cli.output import exit_code, say_error

            say_error(str(error))
            raise click.exceptions.Exit(exit_code(error)) from error
        except KeyboardInterrupt as interrupt:
            raise click.exceptions.Exit(130) from interrupt


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="faceage")
def main() -> None:
    """Age or rejuvenate every face in videos and photos, and touch nothing else.

    Exit codes: 0 all done; 1 some items failed, the others are done; 2 wrong usage; 3 nothing could be
    processed; 4 environment or engine; 130 interrupted (what was finished stays).
    """


def run() -> None:
    """Run the command line as a process of its own, and end that as soon as nothing is left to be done.

    Python would take apart all modules and networks first, for 60 ms, although the kernel frees them anyway.
    """
    code: object = 1  # of an exception that ends in a traceback

    def leave() -> None:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except (OSError, ValueError, AttributeError):
            return  # Python says what is wrong with them
        if isinstance(code, int):
            os._exit(code)

    atexit.register(leave)  # what is registered first is called last
    try:
        main()
    except SystemExit as end:
        code = end.code
        raise
