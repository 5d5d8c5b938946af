"""Measurements of speed and memory, each against its baseline, on the same input and in the same run.

What has a peak of memory of its own runs in a process of its own. Runs of the two sides alternate, so that a machine
that gets slower or faster on the way does so for both; medians are reported.
"""

from __future__ import annotations

import resource
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import av
import numpy as np

from faceage.agers.age_cgan import AgeCGAN
from faceage.agers.latent import Fit
from faceage.align import align_faces
from faceage.errors import MediaError, NoFaceError, UnsupportedError
from faceage.kernels import gather_crops
from faceage.media.image import read_image
from faceage.media.probe import open_input, video_stream
from faceage.media.video import EncodeOptions, transcode
from faceage.pipeline.naive import naive_evaluations, naive_fit, naive_photos
from faceage.pipeline.photos import age_photos
from faceage.pipeline.request import AgeRequest, Networks, StageTimer
from faceage.pipeline.video import age_video
from faceage.types import FloatArray

Load = Callable[[], Networks]
"""Loads the networks; it is sent to other processes, so it is a `functools.partial` of `load_networks`."""
Notify = Callable[[str], None]
"""Told in one line what is measured now."""

EVALUATION_STEPS = (1, 2, 4, 8, 12, 16, 24, 32)
"""Budgets at which the loss of latent optimization is looked at."""
LATENT_BATCH = 32
PROBE_PHOTOS = 8
"""Photos on which the number of evaluations a face is counted."""


def bench_video(
    load: Load,
    clip: Path,
    request: AgeRequest,
    encode: EncodeOptions,
    *,
    repeats: int = 2,
    against: str | None = None,
    loops: int | None = None,
    notify: Notify,
) -> dict:
    """Measure `age_video` against a bare transcode of the same clip with the same encoder settings.

    Args:
        load: its engines are built already.
        clip: the video.
        request: whom to age.
        encode: for both.
        repeats: runs of each side.
        against: a command with {in} and {out}, timed as a whole process, start included, like ours is then.
        loops: also age the clip this many times in a row, to compare the peaks of memory.
        notify: told what runs.
    """
    runs: dict[str, list[dict]] = {"transcode": [], "faceage": [], "against": []}
    with tempfile.TemporaryDirectory(prefix="faceage-bench-") as folder:
        target = Path(folder) / f"out{clip.suffix}"
        encode = replace(encode, overwrite=True)
        for number in range(1, repeats + 1):
            notify(f"bare transcode, {number} of {repeats}")
            runs["transcode"].append(_in_child(_transcode, clip, target, encode))
            notify(f"faceage, {number} of {repeats}")
            runs["faceage"].append(_in_child(_age, load, clip, target, request, encode))
            if against:
                notify(f"{against}, {number} of {repeats}")
                runs["against"].append(_command(against, clip, target.with_stem("against")))
        result = _compare(runs)
        if loops:
            notify(f"faceage on {loops} times the clip")
            longer = loop_clip(clip, target.with_stem("longer"), loops)
            looped = _in_child(_age, load, longer, target, request, encode)
            peak = result["faceage"]["peak_rss_mb"]
            looped["peak_rss_ratio"] = round(looped["peak_rss_mb"] / peak, 3)
            result["looped"] = {"loops": loops, **looped}
    return result


def _compare(runs: dict[str, list[dict]]) -> dict:
    result: dict = {name: _medians(rows) for name, rows in runs.items() if rows}
    result["ratio_to_transcode"] = round(result["faceage"]["fps"] / result["transcode"]["fps"], 3)
    if "against" in result:
        factor = result["against"]["process_seconds"] / result["faceage"]["process_seconds"]
        result["factor_over_against"] = round(factor, 2)
    result["runs"] = {name: rows for name, rows in runs.items() if rows}
    return result


def _medians(rows: list[dict]) -> dict:
    """Return the median of each number of several runs; of memory, the largest."""
    numbers = {
        key: round(median(row[key] for row in rows), 3) for key, value in rows[0].items() if not isinstance(value, dict)
    }
    if "peak_rss_mb" in numbers:
        numbers["peak_rss_mb"] = max(row["peak_rss_mb"] for row in rows)
    for key, value in rows[0].items():
        if isinstance(value, dict):
            numbers[key] = {name: round(median(row[key][name] for row in rows), 2) for name in value}
    return numbers


def _transcode(clip: Path, target: Path, encode: EncodeOptions) -> dict:
    start = perf_counter()
    frames = transcode(clip, target, encode)
    seconds = perf_counter() - start
    return {"frames": frames, "seconds": seconds, "fps": frames / seconds}


def _age(load: Load, clip: Path, target: Path, request: AgeRequest, encode: EncodeOptions) -> dict:
    networks = load()
    report = age_video(networks, clip, target, request, encode=encode)
    return {
        "frames": report.frames,
        "seconds": report.seconds,
        "fps": report.frames / report.seconds,
        "people": len(report.people),
        "stage_ms": report.stage_ms,
    }


def _command(command: str, clip: Path, target: Path) -> dict:
    """Run another program on the clip."""
    words = [word.replace("{in}", str(clip)).replace("{out}", str(target)) for word in shlex.split(command)]
    start = perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnsupportedError(f"{words[0]} cannot be run ({error.strerror}); check --against") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnsupportedError(f"{words[0]} failed with exit code {done.returncode}: {last}; check --against")
    return {"process_seconds": perf_counter() - start}


def _in_child(function: Callable[..., dict], *args: object) -> dict:
    """Call a function in a new process; add the process's peak memory and its whole time to what it returns."""
    start = perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(_with_peak, function, args).result()
    return result | {"process_seconds": perf_counter() - start}


def _with_peak(function: Callable[..., dict], args: tuple) -> dict:
    return function(*args) | {"peak_rss_mb": round(_peak_rss_mb(), 1)}


def _peak_rss_mb() -> float:
    """Return the most memory this process has had. Linux's getrusage would count the parent before exec too."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def loop_clip(clip: Path, target: Path, loops: int) -> Path:
    """Write a clip several times in a row, packet for packet, picture only."""
    with open_input(clip) as source, av.open(str(target), "w") as output:
        stream = video_stream(source, clip)
        copy = output.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        times = [(packet.pts, packet.dts) for packet in packets if packet.pts is not None and packet.dts is not None]
        if not packets or len(times) < len(packets):
            raise MediaError(f"{clip} has packets without times, so it cannot be looped; use an MP4 clip")
        first, last = min(times), max(times)
        duration = packets[times.index(last)].duration or 1
        length = last[0] + duration - first[0]
        for start in range(0, loops * length, length):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                again = av.Packet(bytes(packet))
                again.pts, again.dts = pts + start, dts + start
                again.duration, again.time_base = packet.duration, packet.time_base
                again.is_keyframe = packet.is_keyframe
                again.stream = copy
                output.mux(again)
    return target


def bench_photos(load: Load, photos: list[Path], request: AgeRequest, *, repeats: int = 2, notify: Notify) -> dict:
    """Measure `age_photos` against a naive loop with the same networks; see `naive.naive_photos`.

    The naive loop's plain L-BFGS gets as many evaluations as it needs for the loss that ours reaches.

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
    (ages,) = networks.age_reader(faces)
    ager = _ager(networks)
    fit = ager.fit(faces, ages)
    notify("evaluations that the naive loop needs for the same loss")
    evaluations = naive_evaluations(networks.model, faces, ages, ager.config, float(fit.losses.mean()))
    runs: dict[str, list[dict]] = {"faceage": [], "naive": []}
    with tempfile.TemporaryDirectory(prefix="faceage-bench-") as folder:
        for number in range(1, repeats + 1):
            notify(f"faceage, {number} of {repeats}")
            runs["faceage"].append(_in_child(_age_photos, load, photos, Path(folder), request))
            notify(f"naive loop, {number} of {repeats}")
            runs["naive"].append(
                _in_child(naive_photos, networks.model, photos, Path(folder) / "naive", request, evaluations)
            )
    result: dict = {name: _medians(rows) for name, rows in runs.items()}
    speeds = [result[name]["photos_per_second"] for name in ("faceage", "naive")]
    return result | {
        "factor_over_naive": round(speeds[0] / speeds[1], 2),
        "evaluations_a_face": round(float(fit.evaluations.mean()), 1),
        "naive_evaluations_a_face": evaluations,
        "runs": runs,
    }


def _age_photos(load: Load, photos: list[Path], folder: Path, request: AgeRequest) -> dict:
    networks = load()
    timer = StageTimer()
    items = [(photo, folder / f"{i}{photo.suffix}") for i, photo in enumerate(photos)]
    start = perf_counter()
    reports = age_photos(networks, items, request, overwrite=True, timer=timer)
    seconds = perf_counter() - start
    return {
        "photos": len(photos),
        "faces": sum(len(report.faces) for report in reports),
        "seconds": seconds,
        "photos_per_second": len(photos) / seconds,
        "stage_ms": timer.ms_per(len(photos)),
    }


def faces_of(networks: Networks, photos: list[Path]) -> FloatArray:
    """Return the aligned faces of photos: float32 [F, 3, S, S]."""
    crops = []
    for photo in photos:
        frames = [read_image(photo).frame]
        faces = networks.detector.detect(frames)
        matrices = align_faces(faces.landmarks, networks.ager.size_px)
        crops.append(gather_crops(frames, faces.frame_index, matrices, networks.ager.size_px))
    return np.concatenate(crops)


def bench_latent(networks: Networks, faces: FloatArray, *, notify: Notify) -> dict:
    """Measure latent optimization: one face at a time, a batch at once, and eager torch one at a time.

    Args:
        networks: from `load_networks`.
        faces: float32 [F, 3, S, S], RGB in [-1, 1], aligned.
        notify: told what runs.
    """
    ager, wanted = _ager(networks), _ager(networks).config
    (ages,) = networks.age_reader(faces)
    batches = [slice(i, i + LATENT_BATCH) for i in range(0, len(faces), LATENT_BATCH)]
    singles = [slice(i, i + 1) for i in range(len(faces))]
    ager.fit(faces[:1], ages[:1])  # the first call of an engine is slower
    notify(f"{len(faces)} faces in batches of {LATENT_BATCH}")
    batched, batched_ms = _fit(ager, faces, ages, batches)
    notify(f"{len(faces)} faces one at a time")
    single, single_ms = _fit(ager, faces, ages, singles)
    notify(f"{len(faces)} faces one at a time, eager torch")
    evaluations = naive_evaluations(networks.model, faces, ages, wanted, float(single.losses.mean()))
    naive_losses, naive_ms = naive_fit(networks.model, faces, ages, wanted, evaluations)
    curve = []
    for budget in EVALUATION_STEPS:
        notify(f"at most {budget} evaluations")
        ager.config = replace(wanted, max_evaluations=budget, tolerance=0)
        fit, milliseconds = _fit(ager, faces, ages, batches)
        loss = round(float(fit.losses.mean()), 4)
        curve.append({"evaluations": budget, "mean_loss": loss, "ms_a_face": round(milliseconds, 2)})
    ager.config = wanted
    return {
        "faces": len(faces),
        "encoder_loss": round(float(batched.first_losses.mean()), 4),
        "loss": round(float(batched.losses.mean()), 4),
        "share_below_encoder": round(float((batched.losses < batched.first_losses).mean()), 3),
        "evaluations_a_face": round(float(batched.evaluations.mean()), 1),
        "batch_ms_a_face": round(batched_ms, 2),
        "single_ms_a_face": round(single_ms, 2),
        "batch_share_of_single": round(batched_ms / single_ms, 3),
        "naive_ms_a_face": round(naive_ms, 2),
        "naive_evaluations_a_face": evaluations,
        "batch_share_of_naive": round(batched_ms / naive_ms, 3),
        "naive_loss": round(float(naive_losses.mean()), 4),
        "curve": curve,
    }


def _fit(ager: AgeCGAN, faces: FloatArray, ages: FloatArray, parts: list[slice]) -> tuple[Fit, float]:
    """Optimize in the given parts; return the whole, and milliseconds a face."""
    start = perf_counter()
    fits = [ager.fit(faces[part], ages[part]) for part in parts]
    milliseconds = 1e3 * (perf_counter() - start) / len(faces)
    names = ("latents", "first_losses", "losses", "evaluations")
    return Fit(**{name: np.concatenate([getattr(fit, name) for fit in fits]) for name in names}), milliseconds


def _ager(networks: Networks) -> AgeCGAN:
    if not isinstance(networks.ager, AgeCGAN):
        raise UnsupportedError(f"model {networks.model} has no latents to optimize; choose an Age-cGAN model")
    return networks.ager
