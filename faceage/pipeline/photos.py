"""Age every face of many photos: read ahead, batch over photos, write behind; no file stops the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from faceage.agers.base import Look
from faceage.align import choose_size, pose_weights, prepare_crops
from faceage.blend import blend_faces
from faceage.errors import FaceAgeError
from faceage.media.image import Still, copy_image, read_image, write_image
from faceage.media.planes import writable
from faceage.pipeline.request import AgeRequest, Networks, StageTimer, resolve_ages
from faceage.pipeline.threads import WriteBehind, map_ahead, read_ahead
from faceage.types import Change, Faces, FloatArray, Frame, IntArray

MIN_PHOTO_SCORE = 0.85
"""Confidence below which a photo's face is taken for a false alarm: it has no other frames to confirm it."""
BATCH_PHOTOS = 4
BATCH_MEGAPIXELS = 16
"""Photos are decoded, detected and aged in batches of at most this many of each: the bound on memory."""
MAX_WORKERS = 8
"""Batches in work at a time at most; engines run on one thread each, so there is one a core up to here."""


@dataclass(kw_only=True)
class PhotoReport:
    """What was done to one photo."""

    source: str
    target: str
    faces: list[dict] = field(default_factory=list)
    error: str | None = None
    """Why nothing was written, in one line."""


@dataclass(frozen=True, kw_only=True)
class AgedPhoto:
    """The faces of one photo, and how they were changed."""

    faces: Faces
    source_ages: FloatArray
    target_ages: FloatArray
    identity: FloatArray
    """float32 [F], see `Networks.measure_identity`: of the whole change, whatever the weight."""
    frame_to_crop: FloatArray
    """float32 [F, 2, 3], to the crops of the view "face"."""
    sizes_px: IntArray
    """int64 [F], sides of these crops."""
    weights: FloatArray
    """float32 [F], the share of the change that was applied: 0 for a profile."""

    @property
    def is_changed(self) -> bool:
        """Whether any sample can have changed."""
        return bool((self.weights > 0).any())

    def describe(self) -> list[dict]:
        """Return what was done to each face, for the report."""
        columns = (self.faces.boxes, self.source_ages, self.target_ages, self.identity, self.weights)
        return [
            {
                "box": [round(float(v), 1) for v in box],
                "source_age": round(float(source), 1),
                "target_age": round(float(target), 1),
                "identity": round(float(identity), 3),
                "weight": round(float(weight), 2),
            }
            for box, source, target, identity, weight in zip(*columns, strict=True)
        ]


def age_frames(
    networks: Networks, frames: Sequence[Frame], request: AgeRequest, timer: StageTimer | None = None
) -> list[AgedPhoto]:
    """Age the faces of independent pictures, in place.

    Args:
        networks: from `load_networks`.
        frames: their planes must be writable.
        request: whom to age, and how.
        timer: counts the stages.
    """
    timer = timer or StageTimer()
    with timer("detect"):
        faces = networks.detector.detect(frames)
        faces = faces[faces.scores >= MIN_PHOTO_SCORE]
    if request.faces == "largest":
        faces = _largest(faces)
    with timer("source age"):
        needs_estimate = request.source_age is None
        estimated = networks.read_ages(frames, faces) if needs_estimate else np.zeros(len(faces), np.float32)
        appearances = networks.sample_appearances(frames, faces) if networks.ager.needs_appearance else []
    source, target = resolve_ages(estimated, request)
    weights = pose_weights(faces.landmarks, faces.scores) * request.strength
    drawn = _draw(networks, frames, faces, networks.ager.look(appearances, source, target), timer)
    results = []
    with timer("blend"):
        for i, frame in enumerate(frames):
            rows = np.flatnonzero(faces.frame_index == i)
            for row in rows:
                count = len(drawn.changes[row])
                blend_faces(frame, drawn.changes[row], [weights[row]] * count, drawn.frame_to_crop[row])
            results.append(
                AgedPhoto(
                    faces=faces[rows],
                    source_ages=source[rows],
                    target_ages=target[rows],
                    identity=drawn.identity[rows],
                    frame_to_crop=drawn.frame_to_crop[rows, 0],
                    sizes_px=drawn.sizes_px[rows, 0],
                    weights=weights[rows],
                )
            )
    return results


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """The changes of all faces of a batch of photos, V views each."""

    changes: list[Sequence[Change | None]]
    """F times V."""
    frame_to_crop: FloatArray
    """float32 [F, V, 2, 3]."""
    sizes_px: IntArray
    """int64 [F, V]."""
    identity: FloatArray
    """float32 [F]."""


def _draw(
    networks: Networks, frames: Sequence[Frame], faces: Faces, looks: Sequence[Look], timer: StageTimer
) -> _Drawn:
    """Run the ager on all faces, in batches of equal sizes."""
    views = networks.ager.views
    sizes = np.array([[choose_size(points[None], view) for view in views] for points in faces.landmarks], np.int64)
    sizes = sizes.reshape(-1, len(views))
    changes: list[Sequence[Change | None]] = [()] * len(faces)
    matrices = np.empty((len(faces), len(views), 2, 3), np.float32)
    identity = np.empty(len(faces), np.float32)
    for kind in np.unique(sizes, axis=0):
        rows = np.flatnonzero((sizes == kind).all(1))
        some = faces[rows]
        with timer("gather"):
            crops = [
                prepare_crops(frames, some.frame_index, some.landmarks, view, size)
                for view, size in zip(views, kind, strict=True)
            ]
        matrices[rows] = np.stack([each.frame_to_crop for each in crops], 1)
        with timer("age"):
            mine = [looks[int(row)] for row in rows]
            keys = networks.ager.observe(mine, crops, [None] * len(rows))
            for row, look, key in zip(rows, mine, keys, strict=True):
                changes[row] = networks.ager.draw(look, key, key, 0.0)
            identity[rows] = networks.measure_identity(crops[0], [changes[row][0] for row in rows])
    return _Drawn(changes=changes, frame_to_crop=matrices, sizes_px=sizes, identity=identity)


def _largest(faces: Faces) -> Faces:
    """Keep the largest face of each picture."""
    spread = np.square(faces.landmarks - faces.landmarks.mean(1, keepdims=True)).sum((1, 2))
    order = np.lexsort((-spread, faces.frame_index))
    _, first = np.unique(faces.frame_index[order], return_index=True)
    return faces[order[first]]


def age_photos(
    networks: Networks,
    items: Sequence[tuple[Path, Path]],
    request: AgeRequest,
    *,
    overwrite: bool = False,
    label: dict[str, str] | None = None,
    progress: Callable[[PhotoReport], None] | None = None,
    timer: StageTimer | None = None,
) -> list[PhotoReport]:
    """Age the faces of many photos. A photo that cannot be read or written is reported; the others are done.

    Args:
        networks: from `load_networks`.
        items: (source, target) of each photo; the target's folders are made.
        request: whom to age, and how.
        overwrite: replace targets that exist.
        label: what is written into the target's XMP about its origin; None for nothing.
        progress: called with each photo's report as soon as it is final, from a worker thread.
        timer: counts the stages.

    Returns:
        One report an item, in order.
    """
    timer = timer or StageTimer()
    reports = [PhotoReport(source=str(s), target=str(t)) for s, t in items]
    finished = progress or (lambda _: None)

    def read() -> Iterator[tuple[int, Still]]:
        for i, (source, _) in enumerate(items):
            try:
                with timer("read"):
                    still = read_image(source)
            except FaceAgeError as error:
                reports[i].error = str(error)
                finished(reports[i])
                continue
            yield i, still

    def write(job: tuple[int, Still, Frame | None]) -> None:
        i, still, frame = job
        target = items[i][1]
        try:
            with timer("write"):
                if frame is None:
                    copy_image(items[i][0], target, overwrite=overwrite)
                else:
                    write_image(target, still, frame, overwrite=overwrite, label=label)
        except FaceAgeError as error:
            reports[i].error = str(error)
        finished(reports[i])

    def age(batch: list[tuple[int, Still]]) -> tuple[list[tuple[int, Still]], list[Frame], list[AgedPhoto]]:
        frames = [writable(s.frame) for _, s in batch]
        return batch, frames, age_frames(networks, frames, request, timer)

    with WriteBehind(write, BATCH_PHOTOS) as out:
        batches = _batches(read_ahead(read(), BATCH_PHOTOS))
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
        for batch, frames, results in map_ahead(age, batches, workers):
            for (i, still), frame, aged in zip(batch, frames, results, strict=True):
                reports[i].faces = aged.describe()
                # What nothing was done to is copied, byte for byte, and carries no label.
                out.put((i, still, frame if aged.is_changed else None))
    return reports


def _batches(photos: Iterable[tuple[int, Still]]) -> Iterator[list[tuple[int, Still]]]:
    batch: list[tuple[int, Still]] = []
    pixels = 0
    for photo in photos:
        size = photo[1].frame.width * photo[1].frame.height
        if batch and (len(batch) == BATCH_PHOTOS or pixels + size > BATCH_MEGAPIXELS * 1e6):
            yield batch
            batch, pixels = [], 0
        batch.append(photo)
        pixels += size
    if batch:
        yield batch
