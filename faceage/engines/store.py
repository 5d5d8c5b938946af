"""The engine store: builds an engine once, checks it against torch, and finds it again.

An engine is a file named `<program>-<key>` with a JSON sidecar. The key hashes the program's fingerprint, its shapes,
the backend and its versions, the target and the precision, so a change of any of them leads to another file; the
sidecar repeats them with the file's own hash, its parity with torch, and the seconds that it took. What does not agree
with its sidecar is rebuilt, never used.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from faceage.cache import cache_root
from faceage.engines import aotinductor, openvino, ort, tensorrt
from faceage.engines.base import Backend, Engine, Precision, Program, Runtime, Spec, fingerprint
from faceage.engines.parity import check_parity
from faceage.engines.registry import DEFAULT_RUNTIME, backend_named
from faceage.errors import EngineError, UnfitEngineError

logger = logging.getLogger(__name__)

OnBuild = Callable[[str], AbstractContextManager | None]
"""Called with an engine's name before it is built; what it returns, if anything, is entered for the time of it."""

FORMAT_VERSION = 2
"""Version of the files and their sidecars; a change makes all stored engines stale."""

GPU_RUNS = 3
"""See `parity.check_parity`."""

KEY_DIGITS = 16
"""Hex digits of the key in a file name."""

NOT_RUN = "there was no such GPU where it was built; it is compared with torch when it is first loaded on one"


@dataclass(frozen=True)
class Stored:
    """An engine in the store, or what is left of one."""

    path: Path
    record: dict
    """The sidecar; empty if it cannot be read."""
    fault: str
    """Why it cannot be used, or ""."""


class EngineStore:
    """A folder of engines. Several processes may use the same folder, and several threads the same store."""

    def __init__(self, root: Path | None = None, on_build: OnBuild | None = None) -> None:
        """Use the folder `root`, by default `engines` in `cache_root()`.

        Args:
            root: the folder; made when something is stored.
            on_build: see `OnBuild`.
        """
        self.root = cache_root() / "engines" if root is None else root
        self._on_build = on_build or (lambda name: None)
        # Threads that build share the folder's lock and the folder of drafts, which end with the last of them.
        self._guard = threading.Lock()
        self._builders = 0
        self._shared = ExitStack()
        self._one_builder: dict[Path, threading.Lock] = defaultdict(threading.Lock)

    def load(self, program: Program, runtime: Runtime = DEFAULT_RUNTIME) -> Engine:
        """Return the engine of `program`, building it first if the store has none that fits.

        Args:
            program: the network.
            runtime: what runs it. A network that measures is computed in fp32 where bf16 is asked for. That a network
                is run by one of the fallbacks is logged, with the reason.

        Raises:
            EngineError: for a backend that is not installed, a device that is not there, an engine that differs from
                torch, or a folder that cannot be written.
        """
        try:
            return self._load(program, runtime)
        except EngineError as error:
            if not runtime.fallbacks:
                raise
            backend, *rest = runtime.fallbacks
            logger.warning("%s; %s is run by %s", error, program.name, backend.name)
        precision = backend.best_precision(runtime.device)
        return self.load(program, replace(runtime, backend=backend, precision=precision, fallbacks=tuple(rest)))

    def _load(self, program: Program, runtime: Runtime) -> Engine:
        """Do so by the runtime's own backend."""
        backend = runtime.backend
        specs = [program.spec(target, runtime.precision) for target in backend.targets(runtime.device)]
        runtime = replace(runtime, precision=specs[0].precision)
        if backend.suffix(program, specs[0].target) is None:
            check_buildable(backend, specs[0])
            return backend.load(program, None, runtime)
        for spec in specs:
            path, record = self._find(program, backend, spec)
            if record is not None:
                break
        if record is None:
            spec = specs[0]
            path = self.path(program, backend, spec)
            record, _ = self.build(program, backend, spec)
        try:
            engine = backend.load(program, path, runtime)
        except UnfitEngineError:
            raise  # another machine may use it
        except EngineError as error:
            logger.warning("rebuilding an engine that does not load: %s", error)
            record, _ = self.build(program, backend, spec, anew=True)
            engine = backend.load(program, path, runtime)
        if record["parity"] is None:
            self._check_first_run(program, engine, path, spec.precision)
        return engine

    def build(self, program: Program, backend: Backend, spec: Spec, *, anew: bool = False) -> tuple[dict, bool]:
        """Build and store an engine, unless the store has it; `anew`: even then, in its place.

        Returns:
            Its sidecar, and whether it had to be built.

        Raises:
            EngineError: if it cannot be built here, differs from torch, or cannot be stored.
        """
        identity = _identity(program, backend, spec)
        path = self._path(identity, backend.suffix(program, spec.target))
        record, fault = _look(path, identity)
        if record is not None and not anew:
            return record, False
        with self._one_builder[path], self._locked() as folder:
            record, fault = _look(path, identity)  # it may have been built while this one waited
            if record is not None and not anew:
                return record, False
            if fault or (fault := self._older(identity)):
                logger.warning("rebuilding engine %s: %s", path.name, fault)
            with self._on_build(program.name) or nullcontext():
                start = perf_counter()
                draft = folder / path.name
                backend.build(program, spec, draft)
                record = identity | {"file_sha256": fingerprint(draft), "bytes": draft.stat().st_size}
                record["build_seconds"] = round(perf_counter() - start, 2)
                record["created"] = datetime.now(UTC).isoformat(timespec="seconds")
                reference = ort.open_graph(program, program.graph)
                device = _device_for(backend, spec)
                if device is not None:
                    runtime = Runtime(backend=backend, device=device, precision=spec.precision)
                    engine = backend.load(program, draft, runtime)
                    runs = 1 if spec.kind == "cpu" else GPU_RUNS
                    record["parity"] = check_parity(
                        program, engine, reference, spec.precision, runs=runs, cuts_batches=backend.cuts_batches
                    )
                else:
                    parity = check_parity(program, backend.emulate(program, spec), reference, spec.precision)
                    record |= {"parity": None, "parity_missing_because": NOT_RUN, "graph_parity": parity}
                _write_json(draft.with_suffix(".json"), record)
                # What was compiled for more sizes while it was compared goes with it; the sidecar comes last.
                for file in sorted(folder.glob(f"{draft.stem}.*"), key=lambda file: file.suffix == ".json"):
                    os.replace(file, self.root / file.name)
        return record, True

    def contains(self, program: Program, backend: Backend = DEFAULT_RUNTIME.backend, spec: Spec | None = None) -> bool:
        """Return whether the store has an engine that fits; `spec` is for the CPU, in fp32, if there is none."""
        spec = spec or Spec()
        if backend.suffix(program, spec.target) is None:
            return True
        return self._find(program, backend, spec)[1] is not None

    def path(self, program: Program, backend: Backend, spec: Spec | None = None) -> Path:
        """Return where the engine of `program` is, or would be; `spec` as in `contains`."""
        spec = spec or Spec()
        return self._path(_identity(program, backend, spec), backend.suffix(program, spec.target))

    def _find(self, program: Program, backend: Backend, spec: Spec) -> tuple[Path, dict | None]:
        """Return where an engine is, or would be, and its sidecar if it is there and fits."""
        identity = _identity(program, backend, spec)
        path = self._path(identity, backend.suffix(program, spec.target))
        return path, _look(path, identity)[0]

    def _path(self, identity: dict, suffix: str | None) -> Path:
        key = fingerprint(json.dumps(identity, sort_keys=True))[:KEY_DIGITS]
        return self.root / f"{identity['program']}-{key}{suffix}"

    def stored(self) -> list[Stored]:
        """Return what the store holds, by name, each compared with its sidecar."""
        found = []
        suffixes = (openvino.SUFFIX, aotinductor.SUFFIX, tensorrt.RTX_SUFFIX)
        files = list(self.root.iterdir()) if self.root.is_dir() else []
        stems = {file.stem for file in files if file.suffix in (".json", *suffixes) and not file.name.startswith(".")}
        for stem in sorted(stems):
            path = next((self.root / f"{stem}{s}" for s in suffixes if (self.root / f"{stem}{s}").exists()), None)
            sidecar = self.root / f"{stem}.json"
            if path is None:
                found.append(Stored(sidecar, _read_json(sidecar), "its engine is missing"))
                continue
            record, fault = _look(path, {})
            found.append(Stored(path, record or _read_json(sidecar), fault))
        return found

    def prune(self, programs: list[Program]) -> list[Path]:
        """Remove engines that are damaged, for other versions, or of none of `programs`, and what dead builders left.

        Returns:
            The files that were removed.

        Raises:
            EngineError: if the folder cannot be written.
        """
        fingerprints = {program.fingerprint for program in programs}
        removed = []
        for engine in self.stored():
            if engine.fault or engine.record.get("fingerprint") not in fingerprints or _is_old(engine.record):
                files = sorted(self.root.glob(f"{engine.path.stem}.*"))
                removed += files
                for file in files:
                    try:
                        file.unlink(missing_ok=True)
                    except OSError as error:
                        raise EngineError(f"{file} cannot be removed ({error}); make its folder writable") from error
        if self.root.is_dir():
            with self._locked():
                pass  # drafts of a builder that died go with the next one's
        return removed

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """Wait until no other process builds anything; give a folder for drafts; the last thread removes it."""
        with self._guard:
            if not self._builders:
                self._shared.enter_context(self._locked_folder())
            self._builders += 1
        try:
            yield self._drafts
        finally:
            with self._guard:
                self._builders -= 1
                if not self._builders:
                    self._shared.close()

    @property
    def _drafts(self) -> Path:
        return self.root / ".drafts"

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / ".lock").open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        with file:
            # The kernel releases the lock when its holder dies, so a dead builder is in nobody's way.
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is building engines; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            shutil.rmtree(self._drafts, ignore_errors=True)
            try:
                self._drafts.mkdir()
            except OSError as error:
                raise self._unwritable(error) from error
            try:
                yield
            finally:
                shutil.rmtree(self._drafts, ignore_errors=True)

    def _unwritable(self, error: OSError) -> EngineError:
        return EngineError(
            f"engines cannot be stored in {self.root} ({error}); set FACEAGE_CACHE to a folder that can be written"
        )

    def _older(self, identity: dict) -> str:
        """Return which version changed since an engine of the same weights was built for the same purpose, or ""."""
        same = ("fingerprint", "backend", "target", "precision")
        for sidecar in self.root.glob(f"{identity['program']}-*.json"):
            record = _read_json(sidecar)
            if all(record.get(name) == identity[name] for name in same) and isinstance(record.get("versions"), dict):
                changes = [
                    f"{name} {record['versions'].get(name, 'none')} -> {now}"
                    for name, now in identity["versions"].items()
                    if record["versions"].get(name) != now
                ]
                return f"it was built with other versions ({', '.join(changes)})" if changes else ""
        return ""

    def _check_first_run(self, program: Program, engine: Engine, path: Path, precision: Precision) -> None:
        """Compare an engine with torch that was built where it could not run."""
        sidecar = path.with_suffix(".json")
        record = _read_json(sidecar)
        if record.get("parity") is not None:
            return
        logger.info("comparing %s with torch on this GPU, once", path.name)
        try:
            reference = ort.open_graph(program, program.graph)
            record["parity"] = check_parity(program, engine, reference, precision, runs=GPU_RUNS)
        except EngineError:
            path.unlink()
            sidecar.unlink()
            raise
        del record["parity_missing_because"]
        draft = sidecar.with_suffix(f".{os.getpid()}.part")
        _write_json(draft, record)
        os.replace(draft, sidecar)


def check_buildable(backend: Backend, spec: Spec) -> None:
    """Raise EngineError if a backend builds nothing for `spec`, or lacks a package or a device for it here."""
    backend.check(spec)
    if reason := backend.missing(spec.kind):
        raise EngineError(reason)


def _device_for(backend: Backend, spec: Spec) -> str | None:
    """Return where an engine for `spec` can be run on this machine, or None."""
    device = spec.target if spec.kind in ("cpu", "cuda") else "cuda"
    try:
        return device if spec.target in backend.targets(device) else None
    except EngineError:
        return None


def _identity(program: Program, backend: Backend, spec: Spec) -> dict:
    """Return what an engine is identified by: all of it goes into the key.

    Raises:
        EngineError: if the backend builds no such engine, or is not installed.
    """
    check_buildable(backend, spec)
    return {
        "format_version": FORMAT_VERSION,
        "program": program.name,
        "fingerprint": program.fingerprint,
        "backend": backend.name,
        "versions": backend.versions(spec),
        "target": spec.kind,
        "precision": spec.precision,
        "shapes": {tensor.name: [list(tensor.sizes(which)) for which in ("min", "typical", "max")]
                   for tensor in program.inputs},
    }  # fmt: skip


def _look(path: Path, identity: dict) -> tuple[dict | None, str]:
    """Return the sidecar of the engine at `path`, or None and what is wrong ("" if nothing is there)."""
    sidecar = path.with_suffix(".json")
    if not path.exists() and not sidecar.exists():
        return None, ""
    try:
        record = json.loads(sidecar.read_text())
        sha256 = fingerprint(path)
    except (OSError, ValueError) as error:
        return None, f"it cannot be read ({error})"
    if not isinstance(record, dict) or record.get("file_sha256") != sha256:
        return None, "it is damaged: its contents are not those that its sidecar names"
    if {name: record.get(name) for name in identity} != identity:
        return None, "its sidecar is another engine's"
    return record, ""


def _is_old(record: dict) -> bool:
    """Return whether an engine was built with other versions than those that are installed now."""
    try:
        spec = Spec(record["target"], record["precision"])
        return bool(record["versions"] != backend_named(record["backend"]).versions(spec))
    except KeyError:
        return True
    except (EngineError, ModuleNotFoundError):
        return False  # built for another machine, or by what is not installed here: nobody can say


def _read_json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_json(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")
