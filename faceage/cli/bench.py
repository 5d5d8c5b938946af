"""`faceage bench`."""

from __future__ import annotations

from pathlib import Path

import click

from faceage.cli.encoding import encode_options
from faceage.cli.environment import machine, versions
from faceage.cli.options import AGE, NetworkOptions, network_options, output_options
from faceage.cli.output import Output
from faceage.media.image import find_images
from faceage.media.video import EncodeOptions, probe_video
from faceage.pipeline.bench import LATENT_BATCH, bench_latent, bench_photos, bench_video, faces_of
from faceage.pipeline.naive import generated_faces
from faceage.pipeline.request import AgeRequest

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
@network_options
@encode_options
@output_options
def video_command(
    *, clip: Path, age: float, repeats: int, against: str | None, repeat_clip: int | None, network: NetworkOptions,
    encode: EncodeOptions, out: Output,
) -> None:  # fmt: skip
    """Age a clip, against decoding and encoding it with the same settings and nothing else."""
    with out:
        info = probe_video(clip)
        network.load(out)
        result = bench_video(
            network.loader(), clip, AgeRequest(age=age), encode,
            repeats=repeats, against=against, loops=repeat_clip, notify=out.note,
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
        if against:
            seconds = result["against"]["process_seconds"], ours["process_seconds"]
            out.line(f"{against}: {seconds[0]:.1f} s; faceage as a whole process: {seconds[1]:.1f} s; "
                     f"faceage is {result['factor_over_against']:g} times as fast")  # fmt: skip
        if repeat_clip:
            looped = result["looped"]
            peak = f"{looped['peak_rss_mb']:6.0f} MB, {looped['peak_rss_ratio']:g} of the clip once"
            out.line(f"clip {repeat_clip} times    {looped['fps']:8.2f} fps   peak RSS {peak}")


@command.command("images")
@photos_argument
@age_option
@repeats_option
@network_options
@output_options
def images_command(*, photos: tuple[Path, ...], age: float, repeats: int, network: NetworkOptions, out: Output) -> None:
    """Age photos, against a loop over them with facenet-pytorch's detector and eager torch, face by face."""
    if not photos:
        raise click.UsageError("name photos or folders")
    with out:
        found = [path for path, _ in find_images(photos)[0]]
        network.load(out)
        result = bench_photos(network.loader(), found, AgeRequest(age=age), repeats=repeats, notify=out.note)
        _finish(out, result, *photos)
        for name in ("faceage", "naive"):
            row = result[name]
            what = f"{row['faces']:g} faces in {row['photos']:g} photos"
            speed = f"{row['photos_per_second']:8.2f} photos/s"
            out.line(f"{name:10} {speed}   {what}   peak RSS {row['peak_rss_mb']:6.0f} MB")
        out.line(f"factor     {result['factor_over_naive']:8.2f}")


@command.command("latent")
@photos_argument
@click.option(
    "--faces", type=click.IntRange(min=1), default=LATENT_BATCH, show_default=True,
    help="How many: from the photos, or generated if there are none.",
)  # fmt: skip
@network_options
@output_options
def latent_command(*, photos: tuple[Path, ...], faces: int, network: NetworkOptions, out: Output) -> None:
    """Optimize latents of faces: loss against time, one at a time against a batch, and against eager torch."""
    with out:
        networks = network.load(out)
        if photos:
            pixels = faces_of(networks, [path for path, _ in find_images(photos)[0]])[:faces]
        else:
            pixels = generated_faces(network.model, faces)
        result = bench_latent(networks, pixels, notify=out.note)
        _finish(out, result, *photos)
        losses = (
            f"{result['encoder_loss']:g} from the encoder, {result['loss']:g} after {result['evaluations_a_face']:g}"
        )
        share = f"lower for {result['share_below_encoder']:.1%}"
        out.line(f"{result['faces']} faces; loss {losses} evaluations; {share}")
        out.line(f"batch of {LATENT_BATCH:<3}      {result['batch_ms_a_face']:8.2f} ms a face, "
                 f"{result['batch_share_of_single']:g} of one at a time")  # fmt: skip
        out.line(f"one at a time    {result['single_ms_a_face']:8.2f} ms a face")
        out.line(f"eager torch      {result['naive_ms_a_face']:8.2f} ms a face, loss {result['naive_loss']:g}; "
                 f"the batch takes {result['batch_share_of_naive']:g} of it")  # fmt: skip
        out.line("evaluations  mean loss  ms a face")
        for row in result["curve"]:
            out.line(f"{row['evaluations']:11d}  {row['mean_loss']:9.4f}  {row['ms_a_face']:9.2f}")


def _finish(out: Output, result: dict, *inputs: Path) -> None:
    """Put the result and what it was measured on into the events and the report."""
    place, found = machine(), versions()
    source = ", ".join(map(str, inputs))
    out.item({"source": source, "machine": place, "versions": found, "threads_an_engine": 1, **result})
    out.line(f"{place['cpu']}, {place['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in found.items()))
