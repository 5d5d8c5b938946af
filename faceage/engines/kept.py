"""What a runtime compiled for this machine, kept beside an engine for the next process."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from faceage.engines.base import fingerprint


def keep(path: Path, compiled: bytes) -> None:
    """Write what was compiled, with its digest; where nothing can be written, the next process compiles it again."""
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    with suppress(OSError):
        try:
            part.write_bytes(fingerprint(compiled).encode() + b"\n" + compiled)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read_kept(path: Path) -> bytes | None:
    """Return what `keep` wrote, or None if there is nothing, or not all of it."""
    try:
        digest, compiled = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return compiled if digest == fingerprint(compiled).encode() else None
