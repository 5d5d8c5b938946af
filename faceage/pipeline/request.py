"""What the user asks for, and the loaded networks that do it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from faceage.agers.base import Ager, Composite, ModelFiles
from faceage.agers.latent import LatentConfig
from faceage.agers.registry import ARCHITECTURES, architecture_of, model_programs
from faceage.ages import OLDEST_YEARS
from faceage.align import align_faces
from faceage.checkpoint import read_header
from faceage.detect import DetectConfig, Detector, detector_programs
from faceage.engines.base import Engine, OpeningEngine, Program, Runtime, sha256_of_file
from faceage.engines.registry import BACKENDS, DEFAULT_RUNTIME
from faceage.engines.store import EngineStore, OnBuild
from faceage.errors import CheckpointError, UnsupportedError
from faceage.geometry import TEMPLATE_5, similarity_to_template, template_5
from faceage.kernels import all_to_host, begin_all_to_host, change_crop, gather_crops, maps, to_host
from faceage.models import DEFAULT_MODEL, facenet_file, find_model
from faceage.networks.mtcnn import pnet_program
from faceage.types import Appearance, Change, Crops, Faces, FloatArray, Frame, Samples

log = logging.getLogger(__name__)

AGE_LIMITS_YEARS = (0.0, 100.0)
OPENING_THREADS = min(3, os.cpu_count() or 1)
"""Engines that are opened, or built, at the same time."""
COARSE_PNET = "coarse P-Net"
THUMBNAIL_PX = 16
"""Side of `Appearance.thumbnail`: it shows the light and the tone of the skin, and no feature."""


@dataclass(frozen=True)
class AgeCurve:
    """A wanted age that moves in time, in straight lines from point to point; constant before and after them."""

    points: tuple[tuple[float, float], ...]
    """(time in seconds from the video's first frame, age in years) of each, by ascending time; two at least."""

    def __post_init__(self) -> None:
        low, high = AGE_LIMITS_YEARS
        if len(self.points) < 2 or any(after[0] <= before[0] for before, after in pairwise(self.points)):
            raise ValueError("an age curve has two points at least, each at a later time than the one before")
        for _, age in self.points:
            if not low <= age <= high:
                raise ValueError(f"the curve has age {age:g}; it must be from {low:g} to {high:g} years")

    def at(self, times_s: FloatArray) -> FloatArray:
        """Return the ages at some times: float32 [N], years."""
        times, ages = zip(*self.points, strict=True)
        return np.interp(times_s, times, ages).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class AgeRequest:
    """How faces are to be aged. Exactly one of `age`, `by` and `curve` is given."""

    age: float | None = None
    """Target age in years, 0 to 100; over 85 is made 85, the oldest that training has faces of."""
    by: float | None = None
    """Years to add to each person's source age, -100 to 100."""
    curve: AgeCurve | None = None
    """Target age in a video as a function of time; over 85 is made 85."""
    source_age: float | None = None
    """Everybody's age as they are now, in years, 0 to 100; over 85 is made 85, as the target's. None: estimated, once a
    person and shot."""
    strength: float = 1.0
    """Share of the change that is applied, 0 to 1; 0 gives back every sample as it was."""
    faces: Literal["all", "largest"] = "all"
    """"largest": only the largest face of a photo, or the most prominent person of each shot."""

    def __post_init__(self) -> None:
        low, high = AGE_LIMITS_YEARS
        if [self.age, self.by, self.curve].count(None) != 2:
            raise ValueError("give either an age, a number of years to add, or a curve")
        for name in ("age", "source_age"):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value:g}; it must be from {low:g} to {high:g} years")
        if self.by is not None and not -high <= self.by <= high:
            raise ValueError(f"by is {self.by:g}; it must be from {-high:g} to {high:g} years")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength:g}; it must be from 0 to 1")


def resolve_ages(estimated: FloatArray, request: AgeRequest) -> tuple[FloatArray, FloatArray]:
    """Return the source and the target age of people, both in the range that agers are asked for.

    Both are clamped alike: otherwise 88 years and 10 more, which are clamped to 85, would make a person younger.

    Args:
        estimated: float32 [F], years; the request's own source age goes before it.
        request: see there.

    Returns:
        float32 [F] and float32 [F], years, from 0 to `OLDEST_YEARS`.

    Raises:
        UnsupportedError: for a curve, which `target_at` knows.
    """
    if request.curve is not None:
        raise UnsupportedError("an age curve needs the time of a video; give photos an age or a number of years")
    source = source_ages(estimated, request)
    target = source + request.by if request.by is not None else np.full(len(source), request.age)
    return source, np.clip(target, AGE_LIMITS_YEARS[0], OLDEST_YEARS).astype(np.float32)


def source_ages(estimated: FloatArray, request: AgeRequest) -> FloatArray:
    """Return the source ages of people: float32 [F]; arguments as `resolve_ages`."""
    source = estimated if request.source_age is None else np.full(len(estimated), request.source_age, np.float32)
    return np.clip(source, AGE_LIMITS_YEARS[0], OLDEST_YEARS).astype(np.float32)


def target_at(source_age: float, request: AgeRequest, times_s: FloatArray) -> FloatArray:
    """Return the target age of one person at some times of a video.

    Args:
        source_age: years; the request's own goes before it.
        request: see there.
        times_s: float64 [N], seconds from the video's first frame.

    Returns:
        float32 [N], years, from 0 to `OLDEST_YEARS`.
    """
    if request.curve is None:
        _, target = resolve_ages(np.array([source_age], np.float32), request)
        return np.repeat(target, len(times_s))
    return np.clip(request.curve.at(times_s), AGE_LIMITS_YEARS[0], OLDEST_YEARS)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The loaded networks, shared by all files of a run."""

    model: str
    detector: Detector
    age_reader: Engine
    age_reader_px: int
    """Side of the aligned crops that `age_reader` takes."""
    identity: Engine
    """Faces -> embeddings of unit length."""
    identity_px: int
    """Side of the aligned crops that `identity` takes."""
    ager: Ager
    fingerprinting: Future[dict[str, str]]
    """The fingerprints, which another thread computes."""
    device: str | None = None
    """Where frames are to lie for them: "cuda" or "cuda:N"; None: they are arrays."""
    opening: Sequence[Future[Engine]] = ()
    """The engines, which other threads open."""

    def wait_until_open(self) -> None:
        """Wait for all engines that were asked for; raise what is wrong with one."""
        for engine in self.opening:
            engine.result()

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells the results of these networks from those of others.

        The SHA-256 of each checkpoint by its role, and the options that they were loaded with.
        """
        return self.fingerprinting.result()

    @property
    def estimators(self) -> dict[str, str]:
        """The fingerprints of what measures people before they are changed."""
        return {role: self.fingerprints[role] for role in ("age", "identity")}

    def read_ages(self, frames: Sequence[Frame], faces: Faces) -> FloatArray:
        """Return the ages that faces of a batch of frames seem to have: float32 [F], years."""
        return to_host(self._ages(frames, faces))

    def sample_appearances(self, frames: Sequence[Frame], faces: Faces) -> list[Appearance]:
        """Measure the appearance of each face of a batch of frames; see `mean_appearance`."""
        return _appearances(*all_to_host(self._looks(frames, faces)))

    def begin_measuring(
        self, frames: Sequence[Frame], faces: Faces
    ) -> Callable[[], tuple[FloatArray, list[Appearance]]]:
        """Do both; return what gives it, and waits only if a device has not sent it yet."""
        arrived = begin_all_to_host([self._ages(frames, faces), *self._looks(frames, faces)])

        def finish() -> tuple[FloatArray, list[Appearance]]:
            ages, *looks = arrived()
            return ages, _appearances(*looks)

        return finish

    def _ages(self, frames: Sequence[Frame], faces: Faces) -> Samples:
        matrices = align_faces(faces.landmarks, self.age_reader_px)
        (ages,) = self.age_reader(gather_crops(frames, faces.frame_index, matrices, self.age_reader_px))
        return ages

    def _looks(self, frames: Sequence[Frame], faces: Faces) -> list[Samples]:
        """Return thumbnails and embeddings of faces."""
        matrices = align_faces(faces.landmarks, self.identity_px)
        pixels = gather_crops(frames, faces.frame_index, matrices, self.identity_px)
        (embeddings,) = self.identity(pixels)
        return [_shrink(pixels, THUMBNAIL_PX), embeddings]

    def measure_identity(self, crops: Crops, changes: Sequence[Change | None]) -> FloatArray:
        """Return the cosine between each face's embedding and that of the changed face: float32 [F], in [-1, 1].

        Args:
            crops: in the view "face".
            changes: of the same faces, in the same view.
        """
        before = crops.pixels
        changed = [
            face if change is None else change_crop(face, change) for face, change in zip(before, changes, strict=True)
        ]
        after = maps.namespace(before).stack(changed) if changed else before
        embeddings = all_to_host([self.identity(self._frame_face(faces))[0] for faces in (before, after)])
        return (embeddings[0] * embeddings[1]).sum(1)

    def _frame_face(self, pixels: Samples) -> Samples:
        """Return crops [F, 3, S, S] of the ager's first view as the identity network frames a face."""
        template = self.ager.views[0].template
        if template is TEMPLATE_5:
            return _shrink(pixels, self.identity_px)
        # The template's own landmarks say how the two crops lie in one another. The smaller side is read by area first.
        side = self.identity_px
        faces = _shrink(pixels, min(pixels.shape[-1], 2 * side))
        inner, outer = template_5(side), template_5(faces.shape[-1], template)
        (matrix,) = similarity_to_template(outer[None], inner)
        framed = [maps.warp(maps.pixels_of(face), matrix, side, is_replicated=True) for face in faces]
        return _stack([maps.by_planes(face) for face in framed], like=pixels[:, :, :side, :side])


def _shrink(pixels: Samples, side_px: int) -> Samples:
    """Return faces [F, 3, S, S] reduced to another side by area."""
    if pixels.shape[-1] == side_px:
        return pixels
    channels = [maps.shrink(channel, side_px) for face in pixels for channel in face]
    small = pixels[:, :, :side_px, :side_px]
    return _stack(channels, like=small).reshape(small.shape)


def _stack(samples: Sequence[Samples], like: Samples) -> Samples:
    """Return samples as one, `like` where there are none."""
    return maps.namespace(like).stack(samples) if samples else like


def _appearances(thumbnails: FloatArray, embeddings: FloatArray) -> list[Appearance]:
    return [Appearance(embedding=e, thumbnail=t) for e, t in zip(embeddings, thumbnails, strict=True)]


def mean_appearance(samples: Sequence[Appearance]) -> Appearance:
    """Return a person's appearance from samples of one face each; one at least."""
    embedding = np.mean([sample.embedding for sample in samples], 0)
    return Appearance(
        embedding=embedding / np.maximum(np.linalg.norm(embedding), 1e-6),
        thumbnail=np.mean([sample.thumbnail for sample in samples], 0),
    )


def all_programs(model: str) -> list[Program]:
    """Return every network that a run with a model may need and a backend can build, FaceNet too if it was fetched.

    Raises:
        CheckpointError: for an unknown model or a damaged file.
    """
    files = find_model(model)
    programs = [*model_programs(files).values(), *detector_programs()]
    if facenet_file().exists():
        programs.append(model_programs(files, facenet_file())["identity"])
    return programs


def load_networks(
    *,
    model: str = DEFAULT_MODEL,
    identity: Literal["compact", "facenet"] = "compact",
    runtime: Runtime = DEFAULT_RUNTIME,
    detect: DetectConfig | None = None,
    latent: LatentConfig | None = None,
    composite: Composite = "delta",
    hair: bool = True,
    on_build: OnBuild | None = None,
    in_background: bool = False,
) -> Networks:
    """Load (and on the first run build) the engines of a model.

    Those of FaceGAN are loaded when the first face of their size comes.

    Args:
        model: a name that `faceage models list` shows.
        identity: the network that keeps people recognisable; FaceNet is slower and must have been fetched.
        runtime: what runs the networks; `engines.registry.choose_runtime` finds the fastest one.
        detect: what to look for.
        latent: how latents are optimized, for an architecture that has them.
        composite: how the change is made, for an architecture that has a choice; see `agers.age_cgan.AgeCGAN`.
        hair: let hair turn grey, for an architecture that can.
        on_build: called with an engine's name before it is built; see `engines.store.OnBuild`.
        in_background: on the CPU, return at once: engines are opened while other work is done. What needs one waits for
            it, and raises what is wrong with it. A GPU may not be there: nothing is brought to one before it is seen.

    Raises:
        CheckpointError: for an unknown model or a damaged file.
        EngineError: if an engine cannot be built or run here.
        UnsupportedError: if the model has no such thing as is asked for.
    """
    files = find_model(model)
    is_facenet = identity == "facenet"
    if is_facenet and not facenet_file().exists():
        raise CheckpointError("FaceNet is not on this machine; run `faceage models fetch facenet` once, with a network")
    store = EngineStore(on_build=on_build)
    pnet, rnet, onet = detector_programs()
    programs = model_programs(files, facenet_file() if is_facenet else None)
    programs |= {program.name: program for program in (pnet, rnet, onet)} | {COARSE_PNET: pnet_program(exact=False)}
    pool = ThreadPoolExecutor(OPENING_THREADS if runtime.backend.loads_in_threads else 1, "engines")
    hashing = ThreadPoolExecutor(1, "hashing")
    opening: list[Future[Engine]] = []

    @cache
    def engine(role: str) -> Engine:
        """Begin to open an engine; those that the first photo needs first are to be asked for first."""
        # The latent's program may be one that only torch can differentiate.
        by_torch = role == "latent" and is_facenet
        chosen = replace(runtime, backend=BACKENDS["torch"], precision="fp32") if by_torch else runtime
        future = pool.submit(store.load, programs[role], chosen)
        opening.append(future)
        return OpeningEngine(programs[role].name, future)

    architecture = architecture_of(files.architecture)
    given: dict[str, object] = {} if latent is None else {"latent": latent}
    if composite != "delta":
        given["composite"] = composite
    if not hair:
        given["hair"] = hair
    for name in given:
        if name not in architecture.options:
            able = " or ".join(f"--model {other.name}" for other in ARCHITECTURES if name in other.options)
            raise UnsupportedError(f"model {model} has no option {name}; leave it out, or use {able}")

    try:
        detector = Detector(
            engine(pnet.name), engine(rnet.name), engine(onet.name), detect, lambda: engine(COARSE_PNET)
        )
        options = {name: str(value) for name, value in [("detect", detect), *given.items()]}
        fingerprinting = hashing.submit(
            _fingerprints,
            files,
            facenet_file() if is_facenet else files.identity,
            {"model": model, **runtime.describe(), **options},
        )
        for name in architecture.always:  # the largest ones: the others are opened beside them
            engine(name)
        networks = Networks(
            model=model,
            detector=detector,
            age_reader=engine("age"),
            age_reader_px=read_header(files.age).dims["size_px"],
            identity=engine("identity"),
            identity_px=read_header(files.identity).dims["size_px"],
            ager=architecture.make(files, engine, **given),
            device=None if runtime.device == "cpu" else runtime.device,
            opening=opening,
            fingerprinting=fingerprinting,
        )
        if not (in_background and runtime.device == "cpu"):
            networks.wait_until_open()
            networks.fingerprinting.result()
    except BaseException:
        for executor in (pool, hashing):
            executor.shutdown(wait=False, cancel_futures=True)
        raise
    return networks


def _fingerprints(files: ModelFiles, identity: Path, options: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each checkpoint, by role, and options."""
    paths = {**files.paths, "age": files.age, "identity": identity}
    return {role: sha256_of_file(path) for role, path in paths.items()} | dict(options)
