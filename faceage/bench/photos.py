"""Speed of ageing photos, against a loop over them as a first script would have it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from faceage.agers.age_cgan import AgeCGAN
from faceage.align import prepare_crops
from faceage.bench.naive import naive_evaluations, naive_loop
from faceage.bench.runs import Load, Notify, in_child, medians
from faceage.errors import NoFaceError
from faceage.media.image import read_image
from faceage.pipeline.photos import age_photos
from faceage.pipeline.request import AgeRequest, Networks
from faceage.pipeline.timer import StageTimer
from faceage.types import FloatArray

PROBE_PHOTOS = 8
"""Photos on which the number of evaluations a face is counted, and that both sides age once before they are timed."""


def bench_photos(load: Load, photos: list[Path], request: AgeRequest, *, repeats: int = 2, notify: Notify) -> dict:
    """Measure `age_photos` against a naive loop with the same networks; see `naive.naive_loop`.

    Both are timed warm, after some photos: networks are loaded and compiled while the first ones are aged. The
    processes' seconds have all of it. For an Age-cGAN, the naive loop's plain L-BFGS gets as many evaluations as it
    needs for the loss that ours reaches.

    Args:
        load: its engines are built already.
        photos: files.
        request: whom to age.
        repeats: runs of each side.
        notify: told what runs.
    """
    networks = load()
    faces = faces_of(networks, photos[:PROBE_PHOTOS])
    if not len(faces):
        raise NoFaceError(f"the first {len(photos[:PROBE_PHOTOS])} photos show no face; name photos with faces")
    evaluations, ours = 0, 0.0
    if isinstance(networks.ager, AgeCGAN):
        (ages,) = networks.age_reader(faces)
        fit = networks.ager.fit(faces, ages)
        ours = round(float(fit.evaluations.mean()), 1)
        notify("evaluations that the naive loop needs for the same loss")
        config, loss = networks.ager.config, float(fit.losses.mean())
        evaluations = naive_evaluations(networks.model, faces, ages, config, loss)
    runs: dict[str, list[dict]] = {"faceage": [], "naive": []}
    with tempfile.TemporaryDirectory(prefix="faceage-bench-") as folder:
        for number in range(1, repeats + 1):
            notify(f"faceage, {number} of {repeats}")
            runs["faceage"].append(in_child(_age_photos, load, photos, Path(folder), request))
            notify(f"naive loop, {number} of {repeats}")
            runs["naive"].append(in_child(_age_naively, networks.model, photos, Path(folder), request, evaluations))
    result: dict = {name: medians(rows) for name, rows in runs.items()}
    speeds = [result[name]["photos_per_second"] for name in ("faceage", "naive")]
    return result | {
        "factor_over_naive": round(speeds[0] / speeds[1], 2),
        "evaluations_a_face": ours,
        "naive_evaluations_a_face": evaluations,
        "runs": runs,
    }


def _age_photos(load: Load, photos: list[Path], folder: Path, request: AgeRequest) -> dict:
    networks = load()
    items = [(photo, folder / f"{i}{photo.suffix}") for i, photo in enumerate(photos)]
    age_photos(networks, items[:PROBE_PHOTOS], request, overwrite=True)
    timer = StageTimer()
    start = perf_counter()
    reports = age_photos(networks, items, request, overwrite=True, timer=timer)
    seconds = perf_counter() - start
    faces = sum(len(report.faces) for report in reports)
    return _speed(photos, faces, seconds) | {"stage_ms": timer.ms_per(len(photos))}


def _age_naively(model: str, photos: list[Path], folder: Path, request: AgeRequest, evaluations: int) -> dict:
    age = naive_loop(model, folder, request, evaluations)
    age(photos[:PROBE_PHOTOS])
    start = perf_counter()
    faces = age(photos)
    return _speed(photos, faces, perf_counter() - start)


def _speed(photos: list[Path], faces: int, seconds: float) -> dict:
    speed = len(photos) / seconds
    return {"photos": len(photos), "faces": faces, "seconds": seconds, "photos_per_second": speed}


def faces_of(networks: Networks, photos: list[Path]) -> FloatArray:
    """Return the aligned faces of photos, in the smallest size the ager takes: float32 [F, 3, S, S]."""
    crops = []
    view = networks.ager.views[0]
    for photo in photos:
        frames = [read_image(photo).frame]
        faces = networks.detector.detect(frames)
        crops.append(prepare_crops(frames, faces.frame_index, faces.landmarks, view, view.sizes_px[0]).pixels)
    return np.concatenate(crops)
