"""The engine store: builds an engine once, checks it against torch, and finds it again.

An engine is a file named `<program>-<key>` with a JSON sidecar. The key hashes the program's fingerprint, the
backend and its versions, so a change of any of them leads to another file; the sidecar repeats them with the
file's own hash and its parity with torch. What does not agree with its sidecar is rebuilt, never used.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from faceage.cache import cache_root
from faceage.engines import eager, ort
from faceage.engines.base import Engine, Program, fingerprint
from faceage.engines.build import check_parity, export
from faceage.errors import EngineError

logger = logging.getLogger(__name__)

Backend = Literal["onnxruntime", "torch"]
BACKENDS: dict[str, ModuleType] = {"onnxruntime": ort, "torch": eager}

FORMAT_VERSION = 1
"""Version of the files and their sidecars; a change makes all stored engines stale."""

KEY_DIGITS = 16
"""Hex digits of the key in a file name."""


class EngineStore:
    """A folder of engines. Several processes may use the same folder."""

    def __init__(self, root: Path | None = None, on_build: Callable[[str], None] | None = None) -> None:
        """Use the folder `root`, by default `engines` in `cache_root()`.

        Args:
            root: the folder; made when something is stored.
            on_build: called with a program's name before its engine is built, which takes seconds.
        """
        self.root = cache_root() / "engines" if root is None else root
        self._on_build = on_build

    def load(self, program: Program, backend: Backend = "onnxruntime", device: str = "cpu", threads: int = 1) -> Engine:
        """Return the engine of `program`, building it first if the store has none that fits.

        Args:
            program: the network.
            backend: one of `BACKENDS`.
            device: "cpu", "cuda" or "cuda:N".
            threads: threads of one call.

        Raises:
            EngineError: for an unknown backend, a device that is not there, an engine that differs from
                torch, or a folder that cannot be written.
        """
        module = _backend_module(backend)
        module.check_device(device)
        if module.SUFFIX is None:
            return module.load(program, None, device, threads)
        path = self.path(program, backend)
        if self._is_valid(path, program, backend):
            try:
                return module.load(program, path, device, threads)
            except EngineError as error:
                logger.warning("rebuilding an engine that does not load: %s", error)
        return self._build(program, backend, path, device, threads)

    def contains(self, program: Program, backend: Backend = "onnxruntime") -> bool:
        """Return whether `load` needs no build."""
        if _backend_module(backend).SUFFIX is None:
            return True
        return self._is_valid(self.path(program, backend), program, backend)

    def path(self, program: Program, backend: Backend) -> Path:
        """Return where the engine of `program` is, or would be."""
        module = _backend_module(backend)
        key = fingerprint(json.dumps(_identity(program, backend), sort_keys=True))[:KEY_DIGITS]
        return self.root / f"{program.name}-{key}{module.SUFFIX}"

    def _is_valid(self, path: Path, program: Program, backend: Backend) -> bool:
        sidecar = path.with_suffix(".json")
        if not path.exists() and not sidecar.exists():
            return False
        try:
            record = json.loads(sidecar.read_text())
            want = _identity(program, backend) | {"file_sha256": fingerprint(path)}
        except (OSError, ValueError) as error:
            logger.warning("rebuilding engine %s: it cannot be read (%s)", path.name, error)
            return False
        if not isinstance(record, dict) or {name: record.get(name) for name in want} != want:
            logger.warning("rebuilding engine %s: it does not agree with its sidecar", path.name)
            return False
        return True

    def _build(self, program: Program, backend: Backend, path: Path, device: str, threads: int) -> Engine:
        if self._on_build is not None:
            self._on_build(program.name)
        module = _backend_module(backend)
        with self._draft_folder() as folder:
            draft = Path(folder) / path.name
            network, examples = program.build()
            module.build(program, export(program, network, examples), draft)
            engine = module.load(program, draft, device, threads)
            record = _identity(program, backend) | {
                "file_sha256": fingerprint(draft),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "parity": check_parity(program, engine, network, examples),
            }
            draft.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
            # Another process may do the same now. Each file is replaced whole, and a sidecar beside the
            # other process's engine is caught by the hash.
            os.replace(draft, path)
            os.replace(draft.with_suffix(".json"), path.with_suffix(".json"))
        return engine

    def _draft_folder(self) -> tempfile.TemporaryDirectory:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(prefix=".build-", dir=self.root)
        except OSError as error:
            raise EngineError(
                f"engines cannot be stored in {self.root} ({error}); set FACEAGE_CACHE to a folder that can be written"
            ) from error


def _backend_module(backend: str) -> ModuleType:
    if backend not in BACKENDS:
        raise EngineError(f'unknown backend "{backend}"; use one of: {", ".join(get_args(Backend))}')
    return BACKENDS[backend]


def _identity(program: Program, backend: Backend) -> dict[str, object]:
    """Return what an engine is identified by: all of it goes into the key."""
    return {
        "format_version": FORMAT_VERSION,
        "program": program.name,
        "fingerprint": program.fingerprint,
        "backend": backend,
        "versions": _backend_module(backend).versions(),
    }
