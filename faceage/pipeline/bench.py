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
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import av
import numpy as np

from faceage.agers.age_cgan import AgeCGAN
from faceage.align import prepare_crops
from faceage.errors import MediaError, NoFaceError, UnsupportedError
from faceage.media.image import read_image
from faceage.media.probe import open_input, video_stream
from faceage.media.video import EncodeOptions, VideoReader, transcode
from faceage.pipeline.naive import naive_evaluations, naive_fit, naive_loop
from faceage.pipeline.photos import age_photos
from faceage.pipeline.request import AgeRequest, Networks, StageTimer
from faceage.pipeline.video import age_video
from faceage.types import FloatArray

Load = Callable[[], Networks]
"""Loads the networks; it is sent to other processes, so it is a `functools.partial` of `load_networks`."""
Notify = Callable[[str], None]
"""Told in one line what is measured now."""

EVALUATION_STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Budgets at which the loss of latent optimization is looked at."""
LATENT_BATCHES = (1, 8, 32, 128)
"""Faces at once in latent optimization."""
LATENT_FACES = 32
"""Faces that latent optimization is timed on; more for larger batches."""
FOLLOWED_FRAMES = 40
"""Frames of a clip that a latent is followed through."""
PROBE_PHOTOS = 8
"""Photos on which the number of evaluations a face is counted, and that both sides age once before they are timed."""


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
            runs["faceage"].append(_in_child(_age_photos, load, photos, Path(folder), request))
            notify(f"naive loop, {number} of {repeats}")
            runs["naive"].append(_in_child(_age_naively, networks.model, photos, Path(folder), request, evaluations))
    result: dict = {name: _medians(rows) for name, rows in runs.items()}
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


def bench_latent(networks: Networks, faces: FloatArray, *, repeats: int = 2, notify: Notify) -> dict:
    """Measure latent optimization: batches of several sizes against eager torch and autograd, one face at a time.

    Torch's L-BFGS gets as many evaluations as it needs for the mean loss that ours reaches.

    Args:
        networks: from `load_networks`.
        faces: float32 [F, 3, S, S], RGB in [-1, 1], aligned. A batch that is larger has faces more than once.
        repeats: runs of each side.
        notify: told what runs.
    """
    ager, wanted = age_cgan_of(networks), age_cgan_of(networks).config
    (ages,) = networks.age_reader(faces)
    fit = ager.fit(faces, ages)
    loss = float(fit.losses.mean())
    notify("evaluations that eager torch needs for the same loss")
    evaluations = naive_evaluations(networks.model, faces, ages, wanted, loss)
    milliseconds: dict[int, list[float]] = {count: [] for count in LATENT_BATCHES}
    naive_milliseconds = []
    some = slice(LATENT_FACES)
    for number in range(1, repeats + 1):
        for count in LATENT_BATCHES:
            notify(f"batches of {count}, {number} of {repeats}")
            rows = np.arange(max(count, LATENT_FACES)) % len(faces)
            milliseconds[count].append(_fit_ms(ager, faces[rows], ages[rows], count))
        notify(f"eager torch, one face at a time, {number} of {repeats}")
        naive_milliseconds.append(naive_fit(networks.model, faces[some], ages[some], wanted, evaluations)[1])
    naive_ms = median(naive_milliseconds)
    batches = []
    for count, runs in milliseconds.items():
        ms = median(runs)
        row = {"ms_a_face": round(ms, 2), "faces_per_second": round(1e3 / ms, 1)}
        batches.append({"faces": count, **row, "factor_over_naive": round(naive_ms / ms, 2)})
    curve = []
    for budget in EVALUATION_STEPS:
        ager.config = replace(wanted, max_evaluations=budget, tolerance=0)
        curve.append({"evaluations": budget, "mean_loss": round(float(ager.fit(faces, ages).losses.mean()), 4)})
    ager.config = wanted
    naive_losses, _ = naive_fit(networks.model, faces, ages, wanted, evaluations)
    return {
        "faces": len(faces),
        "encoder_loss": round(float(fit.first_losses.mean()), 4),
        "loss": round(loss, 4),
        "share_below_encoder": round(float((fit.losses < fit.first_losses).mean()), 3),
        "evaluations_a_face": round(float(fit.evaluations.mean()), 1),
        "naive_loss": round(float(naive_losses.mean()), 4),
        "naive_evaluations_a_face": evaluations,
        "naive_ms_a_face": round(naive_ms, 2),
        "naive_faces_per_second": round(1e3 / naive_ms, 1),
        "batches": batches,
        "curve": curve,
    }


def _fit_ms(ager: AgeCGAN, faces: FloatArray, ages: FloatArray, count: int) -> float:
    """Optimize latents, `count` at once; return milliseconds a face."""
    start = perf_counter()
    for i in range(0, len(faces), count):
        ager.fit(faces[i : i + count], ages[i : i + count])
    return 1e3 * (perf_counter() - start) / len(faces)


def bench_follow(networks: Networks, clip: Path, *, notify: Notify) -> dict:
    """Measure how many evaluations a face needs whose latent begins at the one of the frame before.

    The largest face of each of the first `FOLLOWED_FRAMES` frames is fitted anew, from the encoder, and then from the
    frame before with every budget up to the one of a new face.

    Args:
        networks: from `load_networks`.
        clip: of one person.
        notify: told what runs.
    """
    ager, wanted = age_cgan_of(networks), age_cgan_of(networks).config
    (view,) = ager.views
    notify(f"the faces of {clip}")
    crops = []
    with VideoReader(clip) as reader:
        for frame in islice(reader, FOLLOWED_FRAMES):
            found = networks.detector.detect([frame])
            if len(found.boxes):
                sides = found.boxes[:, 2:] - found.boxes[:, :2]
                largest = [int(sides.prod(1).argmax())]
                one = found[np.array(largest)]
                made = prepare_crops([frame], one.frame_index, one.landmarks, view, view.sizes_px[0])
                crops.append(made.pixels)
    if len(crops) < 2:
        raise NoFaceError(
            f"{clip} shows a face in {len(crops)} of its first {FOLLOWED_FRAMES} frames; use another clip"
        )
    faces = np.concatenate(crops)
    age = np.median(networks.age_reader(faces)[0], keepdims=True).astype(np.float32)
    anew = ager.fit(faces, np.repeat(age, len(faces)))
    target = float(anew.losses[1:].mean())
    curve = []
    for budget in range(1, wanted.max_evaluations + 1):
        notify(f"from the frame before, {budget} evaluations")
        ager.config = replace(wanted, max_evaluations_known=budget)
        latents, losses = anew.latents[:1], []
        for i in range(1, len(faces)):
            fit = ager.fit(faces[i : i + 1], age, latents)
            latents = wanted.memory * latents + (1 - wanted.memory) * fit.latents
            losses.append(fit.losses[0])
        curve.append({"evaluations": budget, "mean_loss": round(float(np.mean(losses)), 4)})
    ager.config = wanted
    return {
        "frames": len(faces),
        "loss_anew": round(target, 4),
        "evaluations_anew": round(float(anew.evaluations[1:].mean()), 1),
        "encoder_loss": round(float(anew.first_losses[1:].mean()), 4),
        "needed": next((row["evaluations"] for row in curve if row["mean_loss"] <= target), None),
        "curve": curve,
    }


def age_cgan_of(networks: Networks) -> AgeCGAN:
    """Return the ager, which must be an Age-cGAN; UnsupportedError if it has no latents."""
    if not isinstance(networks.ager, AgeCGAN):
        raise UnsupportedError(f"model {networks.model} has no latents to optimize; choose an Age-cGAN model")
    return networks.ager
