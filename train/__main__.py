"""From the official UTKFace archive to the bundled checkpoints, in one command.

    python -m train --data utkface.tar --teacher mobilefacenet_casia.ckpt --runs runs --hours 6

Runs the scripts of this folder one after the other, each in a run folder of its own under `--runs` and with its share
of the hours. Started again after it was stopped, it goes on where it stopped: finished steps find their budget used up.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

SHARES = {
    "identity": 0.11,
    "age": 0.05,
    "reader64": 0.03,
    "reader32": 0.02,
    "judge": 0.06,
    "gan": 0.14,
    "encoder": 0.04,
    "aging": 0.25,
    "stylegan": 0.12,
    "facegan": 0.18,
}
"""Run folder of each step that trains, and its part of the hours."""


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="UTKFace, a tar or a folder.")
@click.option(
    "--teacher", type=click.Path(exists=True, path_type=Path), required=True, help="MobileFaceNet checkpoint."
)
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), help="Folder for the run folders.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=6.0, help="Training time of all steps.")
@click.option("--pair-px", type=click.Choice(["64", "128", "256"]), default="64", help="Synthetic pairs; 128 on a GPU.")
@click.option("--cache", type=click.Path(path_type=Path), help="Aligned faces.  [default: cache in --runs]")
@click.option("--bundle/--no-bundle", default=True, help="Copy the result into the package.")
def main(data: Path, teacher: Path, runs: Path, hours: float, pair_px: str, cache: Path | None, bundle: bool) -> None:
    """Train everything."""
    runs.mkdir(parents=True, exist_ok=True)
    started = runs / "hours.txt"
    if started.exists() and float(started.read_text()) != hours:
        # A step that trained on would change the parents of the steps after it.
        raise click.ClickException(
            f"{runs} was started with --hours {started.read_text()}, now it is {hours:g}; give that, or other --runs"
        )
    started.write_text(f"{hours:g}")
    for step, args in commands(data, teacher, runs, hours, pair_px, cache or runs / "cache"):
        if step == "bundle" and not bundle:
            continue
        click.echo(f"{step}: python -m {' '.join(args)}", err=True)
        done = subprocess.run([sys.executable, "-m", *args], check=False)
        if done.returncode:
            raise click.ClickException(f"{step} failed; mend it and start again: finished steps are not repeated")


def commands(
    data: Path, teacher: Path, runs: Path, hours: float, pair_px: str, cache: Path
) -> list[tuple[str, list[str]]]:
    """Return (step, arguments of `python -m`) in the order in which they run."""
    minutes = {step: share * hours * 60 for step, share in SHARES.items()}
    generator, identity = runs / "gan" / "generator.safetensors", runs / "identity" / "identity.safetensors"
    readers = [runs / name / "age-estimator.safetensors" for name in ("reader64", "reader32")]
    loss = ["--identity", identity, "--reader", readers[0], "--reader", readers[1]]
    aged = ["--generator", runs / "aging" / "generator.safetensors", "--identity", identity]
    training: list[tuple[str, str, list]] = [
        ("identity", "readers.identity", ["--teacher", teacher]),
        ("age", "readers.age_estimator", []),
        ("reader64", "readers.age_estimator", ["--half", 0]),
        ("reader32", "readers.age_estimator", ["--half", 0, "--size", 32]),
        ("judge", "readers.judge", []),
        ("gan", "age_cgan.gan", ["--identity", identity]),
        ("encoder", "age_cgan.encoder", ["--generator", generator, "--identity", identity]),
        (
            "aging",
            "age_cgan.aging",
            ["--gan", runs / "gan", "--encoder", runs / "encoder" / "encoder.safetensors", *loss],
        ),
        ("stylegan", "facegan.stylegan", ["--size", pair_px, *loss]),
        ("facegan", "facegan.facegan", ["--aging", runs / "aging", "--pairs", runs / "pairs", *loss]),
    ]
    steps: list[tuple[str, list]] = []
    for step, script, args in training:
        if step == "facegan":
            generator = runs / "stylegan" / "stylegan.safetensors"
            made = ["--generator", generator, *loss, "--out", runs / "pairs"]
            steps.append(("pairs", ["train.facegan.make_pairs", *made]))
        place = ["--data", data, "--cache", cache, "--out", runs / step, "--minutes", minutes[step]]
        steps.append((step, [f"train.{script}", *place, *args]))
    place = ["--data", data, "--cache", cache, "--out"]
    encoder = runs / "aging" / "encoder.safetensors"
    steps.append(("curvature", ["train.age_cgan.curvature", *place, runs / "curvature", "--encoder", encoder, *aged]))
    steps.append(("bundle", ["train.bundle", "--runs", runs]))
    return [(step, [str(arg) for arg in args]) for step, args in steps]


if __name__ == "__main__":
    main()
