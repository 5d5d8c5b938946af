"""What the user asks for, and the loaded networks that do it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import Literal

import numpy as np

from faceage.agers.age_cgan import AgeCGAN
from faceage.agers.base import Ager, Composite
from faceage.agers.latent import LatentConfig
from faceage.agers.programs import generator_program, latent_program, reader_program
from faceage.ages import OLDEST_YEARS
from faceage.checkpoint import read_array, read_header
from faceage.detect import DetectConfig, Detector, load_detector
from faceage.engines.base import Engine, Program
from faceage.engines.store import Backend, EngineStore
from faceage.errors import CheckpointError
from faceage.models import DEFAULT_MODEL, find_model
from faceage.models.fetch import facenet_file
from faceage.types import FloatArray

log = logging.getLogger(__name__)

AGE_LIMITS_YEARS = (0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class AgeRequest:
    """How faces are to be aged. Exactly one of `age` and `by` is given."""

    age: float | None = None
    """Target age in years, 0 to 100; over 85 is made 85, the oldest that training has faces of."""
    by: float | None = None
    """Years to add to each person's source age, -100 to 100."""
    source_age: float | None = None
    """Everybody's age as they are now, in years; None: estimated, once a person and shot."""
    strength: float = 1.0
    """Share of the change that is applied, 0 to 1; 0 gives back every sample as it was."""
    faces: Literal["all", "largest"] = "all"
    """"largest": only the largest face of a photo, or the most prominent person of each shot."""

    def __post_init__(self) -> None:
        low, high = AGE_LIMITS_YEARS
        if (self.age is None) == (self.by is None):
            raise ValueError("give either an age or a number of years to add")
        for name in ("age", "source_age"):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value:g}; it must be from {low:g} to {high:g} years")
        if self.by is not None and not -high <= self.by <= high:
            raise ValueError(f"by is {self.by:g}; it must be from {-high:g} to {high:g} years")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength:g}; it must be from 0 to 1")

    def target_ages(self, source_ages: FloatArray) -> FloatArray:
        """Return each face's target age in years, from its source age: float32 [F]."""
        ages = source_ages + self.by if self.by is not None else np.full(len(source_ages), self.age)
        return np.clip(ages, AGE_LIMITS_YEARS[0], OLDEST_YEARS).astype(np.float32)


@dataclass
class StageTimer:
    """Seconds spent in each stage, summed over threads."""

    seconds: dict[str, float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside the `with` block toward a stage."""
        start = perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start

    def ms_per(self, count: int) -> dict[str, float]:
        """Return milliseconds per frame (or photo) of each stage."""
        return {stage: round(1e3 * value / max(count, 1), 2) for stage, value in self.seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The loaded networks, shared by all files of a run."""

    model: str
    detector: Detector
    age_reader: Engine
    ager: Ager


def load_networks(
    *,
    model: str = DEFAULT_MODEL,
    identity: Literal["compact", "facenet"] = "compact",
    backend: Backend = "onnxruntime",
    device: str = "cpu",
    threads: int = 1,
    detect: DetectConfig | None = None,
    latent: LatentConfig | None = None,
    composite: Composite = "delta",
    on_build: Callable[[str], None] | None = None,
) -> Networks:
    """Load (and on the first run build) the engines of a model.

    Args:
        model: a name that `faceage models list` shows.
        identity: the network of the identity-preserving term; FaceNet is slower and must have been fetched.
        backend: what runs the engines.
        device: "cpu", "cuda" or "cuda:N".
        threads: threads of one engine call.
        detect: what to look for.
        latent: how latents are optimized.
        composite: see `AgeCGAN`.
        on_build: called with a program's name before its engine is built.

    Raises:
        CheckpointError: for an unknown model or a damaged file.
        EngineError: if an engine cannot be built or run here.
    """
    files = find_model(model)
    size_px = read_header(files.generator).dims["size_px"]
    is_facenet = identity == "facenet"
    if is_facenet and not facenet_file().exists():
        raise CheckpointError("FaceNet is not on this machine; run `faceage models fetch facenet` once, with a network")
    who = facenet_file() if is_facenet else files.identity
    store = EngineStore(on_build=on_build)

    def engine(program: Program) -> Engine:
        return store.load(program, backend, device, threads)

    # FaceNet's pooling and resizing have no exported gradient, so torch differentiates it, whatever runs the rest.
    fit = latent_program(files.generator, who, autograd=is_facenet)
    ager = AgeCGAN(
        encoder=engine(reader_program(files.encoder, size_px)),
        generator=engine(generator_program(files.generator)),
        latent=store.load(fit, "torch", device, threads) if is_facenet else engine(fit),
        identity=engine(reader_program(who, size_px)),
        root=read_array(files.encoder, "latent_root"),
        size_px=size_px,
        config=latent,
        composite=composite,
    )
    detector = load_detector(store, detect, backend=backend, device=device, threads=threads)
    return Networks(model=model, detector=detector, age_reader=engine(reader_program(files.age, size_px)), ager=ager)
