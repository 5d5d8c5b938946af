"""The work folder of a run: what a run that ends early leaves for the next one to go on with.

It holds a manifest of all that the result depends on, the plan, and the finished segments. A run finds out at its start
whether the manifest is its own; if not, it begins anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from faceage import __version__
from faceage.errors import MediaError
from faceage.media.files import write_atomically

if TYPE_CHECKING:
    from faceage.pipeline.plan import Plan

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MAX_NAME = 64
"""Characters of an output's name that stand in the names of its lock and its work folder."""
_LIBRARIES = ("numpy", "opencv-python-headless", "openvino", "onnxruntime", "torch")


def versions() -> dict[str, str]:
    """Return the versions of what computes and encodes pictures."""
    # Folders of photos are locked by this module too, and need neither these nor plans.
    from importlib.metadata import PackageNotFoundError, version

    import av

    found = {"faceage": __version__, "av": av.__version__}
    found |= {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _short(name: str) -> str:
    """Return a name that is short enough to be lengthened."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def work_folder(target: Path, base: Path | None) -> Path:
    """Return the work folder of an output: beside it, or in `base`."""
    return (base or target.parent) / f"{_short(target.name)}.faceage-work"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other runs from writing an output for as long as the block lasts; what dead ones left is removed.

    Raises:
        MediaError: if another run writes it.
    """
    with locked_by(target.with_name(f".{_short(target.name)}.lock"), target):
        _remove_partials(target)
        yield


@contextmanager
def locked_by(path: Path, target: Path) -> Iterator[None]:
    """Hold a lock file for as long as the block lasts. The operating system frees the lock of a process that dies.

    Args:
        path: the lock file, which is made and removed.
        target: what it keeps other runs from.

    Raises:
        MediaError: if another run holds it.
    """
    handle = _lock(path, target)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, target: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise MediaError(
                f"{target} cannot be created ({error.strerror}); name a folder that can be written"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            process = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise MediaError(
                f"the output {target} is being written by another run (process {process}); wait for it, or name another"
            ) from error
        with suppress(FileNotFoundError):  # the run that had it took it away in between
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)


def _remove_partials(target: Path) -> None:
    """Delete the partial outputs of dead processes, and name them."""
    pattern = re.compile(rf"\.{re.escape(target.stem[:32])}\.(\d+)\.part{re.escape(target.suffix)}")
    for path in sorted(target.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if found and not is_alive(int(found[1])):
            log.warning("%s was left by a run that was killed; it is deleted", path)
            path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Return whether there is a process of a number on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def check_space(sizes: Mapping[Path, float]) -> None:
    """Look ahead whether disks have room: warn if it looks short, and refuse if there is not a tenth of it.

    Args:
        sizes: folder that is there -> bytes that are to be written into it, as far as is known.

    Raises:
        MediaError: if there is far too little.
    """
    needed: Counter[int] = Counter()
    places: dict[int, Path] = {}
    for folder, size in sizes.items():
        device = folder.stat().st_dev
        places.setdefault(device, folder)
        needed[device] += int(size)
    for device, folder in places.items():
        free = shutil.disk_usage(folder).free
        if free >= needed[device]:
            continue
        found = f"{folder} has {_gigabytes(free)} free, and about {_gigabytes(needed[device])} are to be written there"
        if free < needed[device] / 10:
            raise MediaError(f"{found}; free space, or name another folder")
        log.warning("%s, if outputs are as large as their sources", found)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def segment_path(folder: Path, number: int) -> Path:
    """Return the name of a segment's files in a work folder, for `media.segment`."""
    return folder / f"{number:06d}"


class WorkFolder:
    """What is kept of one output while it is made.

    Args:
        path: the folder; it is made.
        manifest: all that the result depends on, of JSON types. What another manifest's run left is deleted.
        fresh: delete what any run left.

    Raises:
        MediaError: if it cannot be written.
    """

    def __init__(self, path: Path, manifest: dict, *, fresh: bool = False) -> None:
        self.path = path
        wanted = json.loads(json.dumps({"format_version": FORMAT_VERSION, **manifest}))
        try:
            path.mkdir(parents=True, exist_ok=True)
            found = self._manifest()
            if found != wanted or fresh:
                if found is not None and not fresh:
                    others = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
                    log.warning("%s is of a run with another %s; starting over", path, ", ".join(others))
                self._clear()
                with write_atomically(path / "manifest.json") as file:
                    file.write(json.dumps(wanted, indent=1).encode())
        except OSError as error:
            raise full(path, error) from error

    def _manifest(self) -> dict | None:
        try:
            found = json.loads((self.path / "manifest.json").read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _clear(self) -> None:
        """Delete what a run wrote, and nothing else."""
        for path in self.path.iterdir():
            if re.fullmatch(r"((manifest|plan)\.(json|npz)|\d{6}\.(packets|npz))(\..*-\d+\.part)?", path.name):
                path.unlink()

    def size(self) -> int:
        """Return how many bytes it holds."""
        return sum(path.stat().st_size for path in self.path.iterdir())

    def plan(self) -> Plan | None:
        """Return the plan, if it was finished."""
        from faceage.pipeline.plan import load_plan

        return load_plan(self.path) if (self.path / "plan.json").exists() else None

    def save(self, plan: Plan) -> None:
        """Keep the plan."""
        from faceage.pipeline.plan import save_plan

        try:
            save_plan(plan, self.path)
        except OSError as error:
            raise full(self.path, error) from error

    def remove(self) -> None:
        """Delete the folder: the output is complete."""
        self._clear()
        with suppress(OSError):  # something else lies in it
            self.path.rmdir()


def full(path: Path, error: OSError) -> MediaError:
    """Return what to say when something cannot be kept."""
    return MediaError(
        f"{path} cannot be written ({error.strerror or error}); free space there, or name another folder with --work, "
        "and run the same command again: it goes on where this one ended"
    )
