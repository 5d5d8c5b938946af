"""`faceage bench`."""

from __future__ import annotations

import tempfile
from itertools import zip_longest
from pathlib import Path

import click

from faceage.bench.engines import bench_engines
from faceage.bench.kernels import bench_kernels
from faceage.bench.latent import LATENT_FACES, age_cgan_of, bench_follow, bench_latent
from faceage.bench.naive import generated_faces, generated_photos
from faceage.bench.photos import bench_photos, faces_of
from faceage.bench.scale import bench_scale
from faceage.bench.video import ON_DEVICE, bench_video
from faceage.cli.encoding import encode_options
from faceage.cli.environment import machine, versions
from faceage.cli.options import AGE, NetworkOptions, check_model, model_option, network_options, output_options
from faceage.cli.output import Output
from faceage.engines.base import Runtime
from faceage.engines.eager import kind_of
from faceage.engines.registry import BACKENDS, BackendName, backend_named, backends_for
from faceage.engines.store import EngineStore
from faceage.errors import EngineError
from faceage.extras import missing
from faceage.media.find import find_images
from faceage.media.video import EncodeOptions, probe_video
from faceage.pipeline.request import AgeRequest, Networks
from faceage.types import Crops

GENERATED_PHOTOS = 12

age_option = click.option("--age", type=AGE, default=70.0, show_default=True, metavar="YEARS", help="Target age.")
repeats_option = click.option(
    "--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Runs of each side; medians are shown."
)
photos_argument = click.argument("photos", nargs=-1, type=click.Path(path_type=Path), metavar="[PHOTO|FOLDER]...")


@click.group("bench")
def command() -> None:
    """Measure speed on this machine, against baselines in the same run."""


@command.command("video")
@click.argument("clip", type=click.Path(path_type=Path))
@age_option
@repeats_option
@click.option("--against", metavar="COMMAND", help='Another program, timed as a whole process: "deface {in} -o {out}".')
@click.option(
    "--repeat-clip", type=click.IntRange(min=2), metavar="K", help="Compare memory on the clip K times in a row."
)
@click.option("--plan", is_flag=True, help="Measure runs from a plan: the clip is scanned once, before.")
@network_options
@encode_options
@output_options
def video_command(
    *, clip: Path, age: float, repeats: int, against: str | None, repeat_clip: int | None, plan: bool,
    network: NetworkOptions, encode: EncodeOptions, out: Output,
) -> None:  # fmt: skip
    """Age a clip, against decoding and encoding it with the same settings and nothing else."""
    with out:
        info = probe_video(clip)
        networks = _build_engines(network, out)
        result = bench_video(
            network.loader(), clip, AgeRequest(age=age), encode,
            repeats=repeats, against=against, loops=repeat_clip, device=networks.device, from_plan=plan,
            notify=out.note,
        )  # fmt: skip
        _finish(out, result, clip)
        ours, bare = result["faceage"], result["transcode"]
        out.line(
            f"{clip}: {info.width}x{info.height} {info.codec}, {ours['frames']:g} frames, {ours['people']:g} people"
        )
        out.line(f"bare transcode    {bare['fps']:8.2f} fps   peak RSS {bare['peak_rss_mb']:6.0f} MB")
        out.line(f"faceage           {ours['fps']:8.2f} fps   peak RSS {ours['peak_rss_mb']:6.0f} MB")
        out.line(f"ratio             {result['ratio_to_transcode']:8.3f}")
        out.line("ms a frame        " + ", ".join(f"{k} {v:g}" for k, v in ours["stage_ms"].items()) + " (overlapping)")
        for name in ON_DEVICE if networks.device else ():
            out.line(f"{name.replace('_', ' '):17} {result[name]['fps']:8.2f} fps")
        if networks.device:
            out.line(f"faceage is {result['share_of_decode_and_encode']:.3f} of the slower of decode and encode, "
                     f"{result['factor_over_eager']:g} times as fast as eager, "
                     f"{result['factor_over_whole_frames']:g} times as fast as whole frames")  # fmt: skip
        if against:
            seconds = result["against"]["process_seconds"], ours["process_seconds"]
            out.line(f"{against}: {seconds[0]:.1f} s; faceage as a whole process: {seconds[1]:.1f} s; "
                     f"faceage is {result['factor_over_against']:g} times as fast")  # fmt: skip
        if repeat_clip:
            looped = result["looped"]
            peak = f"{looped['peak_rss_mb']:6.0f} MB, {looped['peak_rss_ratio']:g} of the clip once"
            out.line(f"clip {repeat_clip} times    {looped['fps']:8.2f} fps   peak RSS {peak}")


@command.command("scale")
@click.argument("clip", type=click.Path(path_type=Path))
@age_option
@click.option(
    "--jobs", type=click.IntRange(min=2), default=2, show_default=True, metavar="N", help="Processes beside one."
)
@repeats_option
@network_options
@encode_options
@output_options
def scale_command(
    *, clip: Path, age: float, jobs: int, repeats: int, network: NetworkOptions, encode: EncodeOptions, out: Output
) -> None:
    """Age a clip by one process and by several, and simulate an hour of it by up to 64 workers.

    `examples/plot_scale.py` draws the report.
    """
    with out:
        _build_engines(network, out)
        result = bench_scale(
            network.loader(), clip, AgeRequest(age=age), encode, jobs=(1, jobs), repeats=repeats, notify=out.note
        )
        _finish(out, result, clip)
        for row in result["jobs"]:
            out.line(f"--jobs {row['jobs']:<3} {row['fps']:8.2f} fps   {row['speedup']:5.2f} times one")
        out.line("simulated, an hour of video:")
        for row in result["simulated"]:
            out.line(f"{row['workers']:3} workers  {row['seconds']:9.1f} s   rendering {row['speedup']:5.2f} times one")


@command.command("images", context_settings={"default_map": {"model": "facegan"}})
@photos_argument
@age_option
@click.option(
    "--megapixels", type=click.FloatRange(0.1, 100), metavar="N",
    help="Instead of naming photos, generate some of this size from the bundled portrait.",
)  # fmt: skip
@repeats_option
@network_options
@output_options
def images_command(
    *, photos: tuple[Path, ...], megapixels: float | None, age: float, repeats: int, network: NetworkOptions,
    out: Output,
) -> None:  # fmt: skip
    """Age photos, against a loop over them with facenet-pytorch's detector and eager torch, face by face."""
    if bool(photos) == (megapixels is not None):
        raise click.UsageError("name photos or folders, or give --megapixels")
    with out, tempfile.TemporaryDirectory(prefix="faceage-photos-") as folder:
        _need_torch("bench images")
        if megapixels is None:
            found = [path for path, _ in find_images(photos)]
        else:
            found = generated_photos(Path(folder), GENERATED_PHOTOS, megapixels)
        _build_engines(network, out)
        result = bench_photos(network.loader(), found, AgeRequest(age=age), repeats=repeats, notify=out.note)
        _finish(out, result, *photos)
        for name in ("faceage", "naive"):
            row = result[name]
            what = f"{row['faces']:g} faces in {row['photos']:g} photos"
            speed = f"{row['photos_per_second']:8.2f} photos/s"
            out.line(f"{name:10} {speed}   {what}   peak RSS {row['peak_rss_mb']:6.0f} MB")
        out.line(f"factor     {result['factor_over_naive']:8.2f}")


# The default model has no latents.
@command.command("latent", context_settings={"default_map": {"model": "age-cgan"}})
@photos_argument
@click.option(
    "--faces", type=click.IntRange(min=1), default=LATENT_FACES, show_default=True,
    help="How many: from the photos, or generated if there are none.",
)  # fmt: skip
@click.option(
    "--clip", type=click.Path(path_type=Path), help="Also follow the largest face of this clip from frame to frame."
)
@repeats_option
@network_options
@output_options
def latent_command(
    *, photos: tuple[Path, ...], faces: int, clip: Path | None, repeats: int, network: NetworkOptions, out: Output
) -> None:
    """Optimize latents of faces in batches, against torch and autograd one face at a time, at equal loss."""
    with out:
        _need_torch("bench latent")
        networks = network.load(out)
        age_cgan_of(networks)  # before a face is looked for
        if photos:
            pixels = faces_of(networks, [path for path, _ in find_images(photos)])[:faces]
        else:
            pixels = generated_faces(network.model, faces)
        result = bench_latent(networks, pixels, repeats=repeats, notify=out.note)
        if clip:
            result["follow"] = bench_follow(networks, clip, notify=out.note)
        _finish(out, result, *photos)
        losses = (
            f"{result['encoder_loss']:g} from the encoder, {result['loss']:g} after {result['evaluations_a_face']:g}"
        )
        share = f"lower for {result['share_below_encoder']:.1%}"
        out.line(f"{result['faces']} faces; loss {losses} evaluations; {share}")
        out.line(f"torch, one by one  {result['naive_faces_per_second']:8.1f} faces/s   "
                 f"loss {result['naive_loss']:g} after {result['naive_evaluations_a_face']} evaluations")  # fmt: skip
        for row in result["batches"]:
            speed = f"{row['faces_per_second']:8.1f} faces/s   {row['factor_over_naive']:g} times torch"
            out.line(f"batches of {row['faces']:<6}  {speed}")
        _loss_curve(out, result["curve"])
        if clip:
            follow = result["follow"]
            out.line(f"{clip}: loss {follow['loss_anew']:g} after {follow['evaluations_anew']:g} evaluations a new "
                     f"face; from the frame before, {follow['needed'] or 'more'} reach it")  # fmt: skip
            _loss_curve(out, follow["curve"])


def _loss_curve(out: Output, rows: list[dict]) -> None:
    out.line("evaluations  mean loss")
    for row in rows:
        out.line(f"{row['evaluations']:11d}  {row['mean_loss']:9.4f}")


@command.command("engines")
@model_option
@click.option(
    "--backend", "backends", type=click.Choice(list(BACKENDS)), multiple=True,
    help="May be given several times. Default: all that run on the device.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]", help="Where they run.")
@output_options
def engines_command(*, model: str, backends: tuple[BackendName, ...], device: str, out: Output) -> None:
    """Run each network by each backend in batches of 1, 8 and 32, against eager torch.

    Engines that are not built yet are built first; AOTInductor takes minutes.
    """
    check_model(model)
    with out:
        _need_torch("bench engines")
        chosen = [backend_named(name) for name in backends] if backends else backends_for(device)
        torch = BACKENDS["torch"]
        runtimes = [
            Runtime(backend=backend, device=device, precision=backend.best_precision(device))
            for backend in (torch, *(backend for backend in chosen if backend is not torch))
        ]
        result = bench_engines(model, runtimes, EngineStore(on_build=out.building), notify=out.note)
        _finish(out, result)
        out.line(f"{'network':20} batch  {'backend':12} {'':4}  median ms   faces/s  compile s")
        for row in result["rows"]:
            seconds = "" if row["compile_s"] is None else f"{row['compile_s']:9.1f}"
            out.line(f"{row['network']:20} {row['batch']:5}  {row['backend']:12} {row['precision']:4}  "
                     f"{row['median_ms']:9.2f} {row['faces_per_s']:9.1f}  {seconds}")  # fmt: skip
        for backend, speedup in result["speedups"].items():
            out.line(f"{backend:12} {speedup['total']:6.2f} times torch over all rows' time, "
                     f"{speedup['mean']:.2f} in the geometric mean of the rows")  # fmt: skip


@command.command("kernels")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]", help="Where they run.")
@output_options
def kernels_command(*, device: str, out: Output) -> None:
    """Read and change frames of 1080p, against the PyTorch references of the same operations.

    On a GPU also frames of 4K, and the references are compiled by torch.compile.
    """
    with out:
        _need_torch("bench kernels")
        kind_of(device)  # or one line about what is there
        result = bench_kernels(None if device == "cpu" else device, notify=out.note)
        _finish(out, result)
        out.line(f"{result['device']}: copies {result['copy_gb_per_s']:g} GB/s; the baseline is {result['baseline']}")
        out.line(f"{'operation':14}{'frame':11}{'faces':>5}  {'by':10}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}"
                 f"{'GB/s':>8}  of copy  factor")  # fmt: skip
        for row in result["rows"]:
            factor = f"{row['factor']:8.2f}" if "factor" in row else ""
            times = "".join(f"{row[key]:9.3f}" for key in ("p20_ms", "p50_ms", "p80_ms"))
            out.line(f"{row['operation']:14}{row['frame']:11}{row['faces']:5}  {row['implementation']:10}{times}"
                     f"{row['gb_per_s']:8.1f}  {row['share_of_copy']:7.3f}{factor}")  # fmt: skip


def _need_torch(what: str) -> None:
    """Raise EngineError without torch: what is measured is compared with it."""
    if reason := missing("torch", what):
        raise EngineError(reason)


def _build_engines(network: NetworkOptions, out: Output) -> Networks:
    """Build what is not built yet, also the engines of the sizes that no face has asked for: none is measured."""
    networks = network.load(out)
    ager = networks.ager
    for sizes in zip_longest(*(view.sizes_px for view in ager.views)):
        sides = [size or view.sizes_px[-1] for size, view in zip(sizes, ager.views, strict=True)]
        ager.observe([], [Crops.empty(side) for side in sides], [])
    return networks


def _finish(out: Output, result: dict, *inputs: Path) -> None:
    """Put the result and what it was measured on into the events and the report."""
    place, found = machine(), versions()
    source = ", ".join(map(str, inputs))
    out.item({"source": source, "machine": place, "versions": found, "threads_an_engine": 1, **result})
    out.line(f"{place['cpu']}, {place['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in found.items()))
