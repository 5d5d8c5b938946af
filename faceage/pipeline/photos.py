"""Age every face of many photos: read ahead, batch over photos, write behind; no file stops the others."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from faceage.agers.base import Look
from faceage.align import choose_size, pose_weights, prepare_views
from faceage.blend import blend_faces
from faceage.checkpoint import sha256_of
from faceage.errors import FaceAgeError, MediaError
from faceage.kernels import computing
from faceage.media.image import Still, copy_image, read_image, write_image
from faceage.media.planes import to_device, to_host
from faceage.pipeline.label import describe_request, label_fields
from faceage.pipeline.report import FaceReport, PhotoReport
from faceage.pipeline.request import AgeRequest, Networks, resolve_ages
from faceage.pipeline.threads import WriteBehind, map_ahead, read_ahead
from faceage.pipeline.timer import StageTimer
from faceage.pipeline.workers import Here, Worker, Workers
from faceage.types import Change, Faces, FloatArray, Frame, IntArray

MIN_PHOTO_SCORE = 0.85
"""Confidence below which a photo's face is taken for a false alarm: it has no other frames to confirm it."""
BATCH_PHOTOS = 4
BATCH_MEGAPIXELS = 16
"""Photos are decoded, detected and aged in batches of at most this many of each: the bound on memory."""
BLOCK_PHOTOS = 32
"""Photos that one of several workers is given at a time."""
MAX_WORKERS = 8
"""Batches in work at a time at most; engines run on one thread each, so there is one a core up to here."""


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

    def describe(self) -> tuple[FaceReport, ...]:
        """Return what was done to each face."""
        columns = (self.faces.boxes, self.source_ages, self.target_ages, self.identity, self.weights)
        reports = []
        for box, source, target, identity, weight in zip(*columns, strict=True):
            left, top, right, bottom = (round(float(edge), 1) for edge in box)
            reports.append(
                FaceReport(
                    box=(left, top, right, bottom),
                    source_age=round(float(source), 1),
                    target_age=round(float(target), 1),
                    identity=round(float(identity), 3),
                    weight=round(float(weight), 2),
                )
            )
        return tuple(reports)


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
    looks = networks.ager.look(appearances, source, target, frames[0] if frames else None)
    drawn = _draw(networks, frames, faces, looks, timer)
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
    kinds = sorted(set(map(tuple, sizes.tolist())))  # NumPy's unique imports numpy.ma, for 10 ms
    for kind in np.array(kinds, np.int64):  # with Python's integers templates would be float32
        rows = np.flatnonzero((sizes == kind).all(1))
        some = faces[rows]
        with timer("gather"):
            crops = prepare_views(frames, some.frame_index, some.landmarks, views, kind)
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
    label: bool = True,
    quality: int | None = None,
    timer: StageTimer | None = None,
) -> list[PhotoReport]:
    """Age the faces of photos. A photo that cannot be read or written is reported; the others are done.

    Args:
        networks: from `load_networks`.
        items: (source, target) of each photo; the target's folders are made.
        request: whom to age, and how.
        overwrite: replace targets that exist.
        label: mark a photo that was changed as partly synthetic, in its XMP.
        quality: 1 to 100, see `media.image.write_image`; None: changed blocks only, or as the source.
        timer: counts the stages.

    Returns:
        One report an item, in order.
    """
    places = {str(target): place for place, (_, target) in enumerate(items)}
    reports = photo_reports(
        Here(networks), items, request, overwrite=overwrite, label=label, quality=quality, timer=timer
    )
    return sorted(reports, key=lambda report: places[report.target])


def photo_reports(
    workers: Workers,
    items: Iterable[tuple[Path, Path]],
    request: AgeRequest,
    *,
    overwrite: bool = False,
    label: bool = True,
    quality: int | None = None,
    timer: StageTimer | None = None,
) -> Iterator[PhotoReport]:
    """Age the faces of any number of photos, and yield each one's report as soon as it is final, in any order.

    Args:
        workers: age blocks of photos.
        items: as `age_photos`, like all that follow; taken when they are needed.
        request: see there.
        overwrite: see there.
        label: see there.
        quality: see there.
        timer: see there.
    """
    # One worker has more of one block: it reads on from photo to photo.
    blocks: Iterable[Iterable[tuple[Path, Path]]] = [items] if workers.count == 1 else _blocks(items)
    with closing(workers.map(partial(_age_block, request, overwrite, label, quality), blocks)) as results:
        for result in results:
            if isinstance(result, PhotoReport):
                yield result
            elif timer:
                timer.add(result)


def _blocks(items: Iterable[tuple[Path, Path]]) -> Iterator[list[tuple[Path, Path]]]:
    source = iter(items)
    while block := list(islice(source, BLOCK_PHOTOS)):
        yield block


def _age_block(
    request: AgeRequest,
    overwrite: bool,
    label: bool,
    quality: int | None,
    worker: Worker,
    items: Iterable[tuple[Path, Path]],
) -> Iterator[PhotoReport | Mapping[str, float]]:
    """Yield the reports of photos, and the seconds of each stage at the end."""
    timer = StageTimer()
    networks = worker.networks
    fields = label_fields(networks, describe_request(request)) if label else None
    finished: SimpleQueue[PhotoReport] = SimpleQueue()

    def read() -> Iterator[_Job]:
        for source, target in items:
            sha256 = None
            try:
                with timer("read"):
                    sha256 = _sha256_of(source)
                    still = read_image(source)
            except FaceAgeError as error:
                finished.put(PhotoReport(source=str(source), target=str(target), sha256=sha256, error=str(error)))
                continue
            yield _Job(source, target, still, sha256)

    def age(batch: list[_Job]) -> list[tuple[_Job, Frame, AgedPhoto]]:
        with computing(networks.device):
            frames = [to_device(job.still.frame, networks.device) for job in batch]
            aged = age_frames(networks, frames, request, timer)
            return [
                (job, to_host(frame) if photo.is_changed else frame, photo)
                for job, frame, photo in zip(batch, frames, aged, strict=True)
            ]

    def write(done: tuple[_Job, Frame, AgedPhoto]) -> None:
        job, frame, aged = done
        error = None
        try:
            with timer("write"):
                if aged.is_changed:
                    write_image(job.target, job.still, frame, overwrite=overwrite, label=fields, quality=quality)
                else:  # what nothing was done to is copied, byte for byte, and carries no label
                    copy_image(job.source, job.target, overwrite=overwrite)
        except FaceAgeError as failure:
            cause = failure.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):  # no other would fare better
                raise MediaError(f"{failure}; free space there and run the same command again") from cause
            error = str(failure)
        finished.put(
            PhotoReport(
                source=str(job.source),
                target=str(job.target),
                faces=aged.describe(),
                sha256=job.sha256,
                error=error,
            )
        )

    with WriteBehind(write, BATCH_PHOTOS) as out:
        batches = _batches(read_ahead(read(), BATCH_PHOTOS))
        for batch in map_ahead(age, batches, min(worker.threads, MAX_WORKERS)):
            for done in batch:
                out.put(done)
            yield from _drain(finished)
    yield from _drain(finished)
    yield timer.measured()[0]


class _Job(NamedTuple):
    """A photo on its way."""

    source: Path
    target: Path
    still: Still
    sha256: str | None


def _sha256_of(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None  # what is wrong is said when it is read


def _drain(queue: SimpleQueue[PhotoReport]) -> Iterator[PhotoReport]:
    while not queue.empty():
        yield queue.get()


def _batches(photos: Iterable[_Job]) -> Iterator[list[_Job]]:
    batch: list[_Job] = []
    pixels = 0
    for photo in photos:
        size = photo.still.frame.width * photo.still.frame.height
        if batch and (len(batch) == BATCH_PHOTOS or pixels + size > BATCH_MEGAPIXELS * 1e6):
            yield batch
            batch, pixels = [], 0
        batch.append(photo)
        pixels += size
    if batch:
        yield batch
