"""The compact age estimator: reads the source age of a face, once a person and shot.

    python -m train.readers.age_estimator --data utkface.tar --out runs/age --minutes 10

A distribution over the years 0 to 100 (Rothe et al., DEX, 2015), taught with soft labels (Geng, Label Distribution
Learning, TKDE 2016) because UTKFace's ages are themselves estimates. Writes `age-estimator.safetensors`.

`train.age_cgan.aging` needs two more for its loss, which must not be taught by the pictures that `train.readers.judge`
learned from:

    python -m train.readers.age_estimator --data utkface.tar --out runs/reader64 --minutes 10 --half 0
    python -m train.readers.age_estimator --data utkface.tar --out runs/reader32 --minutes 8 --half 0 --size 32
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from faceage.checkpoint import Header, load, save
from faceage.errors import CheckpointError
from faceage.networks.regressors import AgeEstimator, TrunkDims
from train.augment import degrade, shift_and_jitter, zoom
from train.data import DATASET, FaceSet, Sampler, load_faces, to_tensor
from train.evaluate.metrics import age_figures
from train.run import EMA, Run, Script, autocast, device, git_commit, run_options

LOSS_HALF = 0
"""The half of the training pictures for estimators that are in a loss; `train.readers.judge` learns from the other."""

reader_option = click.option(
    "--reader",
    "reader_files",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    required=True,
    help="From train.readers.age_estimator --half 0; several.",
)
"""The estimators of a loss, for `load_reader`."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 64
    rate: float = 1.5e-3
    weight_decay: float = 0.05
    label_sigma_years: float = 3.0
    years_weight: float = 0.1
    """Weight of the absolute error of the mean, in years, beside the cross entropy."""
    ema_half_life_images: int = 20_000
    tick_images: int = 19_200
    half: int | None = None
    """Learn from this half of the training pictures only, 0 or 1."""
    seed: int = 4


def check_half(path: Path, header: Header) -> None:
    """Refuse a reader for a loss that may have learned from the judge's pictures.

    Raises:
        CheckpointError: if so.
    """
    if header.train_config.get("half") != LOSS_HALF:
        raise CheckpointError(
            f"{path} did not learn from half {LOSS_HALF} alone, the judge's pictures may be among its own; "
            f"train it with --half {LOSS_HALF}"
        )


def load_reader(path: Path) -> AgeEstimator:
    """Load an age estimator for a loss, frozen, in evaluation mode.

    Raises:
        CheckpointError: if it may have learned from the pictures that the judge learned from.
    """
    header, weights = load(path, "age-estimator")
    check_half(path, header)
    net = AgeEstimator(TrunkDims(**header.dims))
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def validate(net: AgeEstimator, faces: FaceSet, where: torch.device) -> dict[str, float]:
    """Return MAE and Pearson r over the ages 0 to 100, and the MAE over 15 to 85."""
    parts = [net(to_tensor(faces.pixels[i : i + 256]).to(where)) for i in range(0, len(faces), 256)]
    return age_metrics(torch.cat(parts).cpu().numpy(), faces.ages)


def age_metrics(read: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return MAE and Pearson r of ages [N] that were read off validation faces, and the MAE over 15 to 85 years."""
    adult = (labels >= 15) & (labels <= 85)
    everyone = age_figures(labels, read)
    return {
        "val_mae": everyone["mae"],
        "val_mae_15_85": age_figures(labels[adult], read[adult])["mae"],
        "val_r": everyone["r"],
    }


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=10.0)
@click.option("--half", type=click.IntRange(0, 1), help="Learn from one half of the pictures only.")
@click.option("--size", "size_px", type=click.Choice(["64", "32"]), default="64", help="Side of the faces, px.")
def main(
    data: Path, out: Path, cache: Path, minutes: float, images: int | None, half: int | None, size_px: str
) -> None:
    """Train the age estimator."""
    config = Config(half=half)
    dims = TrunkDims(outputs=101, dropout=0.3)
    if size_px == "32":
        dims = TrunkDims(size_px=32, widths=(64, 96, 160), blocks=(1, 2, 1), outputs=101, dropout=0.3)
    torch.manual_seed(config.seed)
    run = Run(out, config, minutes, images, dims=dims)
    faces = load_faces(data, dims.size_px, cache)
    where = device()
    val = faces.val
    train = faces.train if half is None else faces.train.half(half)
    sampler = Sampler(train, config.batch, config.seed, power=0.5)

    net = AgeEstimator(dims).to(where, memory_format=torch.channels_last)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=config.weight_decay)
    parts = {"net": net, "ema": ema.net, "step": step, "sampler": sampler}
    run.load_state(parts)
    bins = torch.linspace(0, 100, dims.outputs, device=where)

    ticks, errors = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        pixels, ages = sampler.draw()
        x = to_tensor(zoom(pixels, sampler.random))
        want = torch.from_numpy(ages).clamp(0, 100).to(where)
        x = shift_and_jitter(degrade(x).to(where), shift_px=dims.size_px // 20, colour=0.3)
        with autocast(where):
            log_p = net.log_probabilities(x.contiguous(memory_format=torch.channels_last))
        label = torch.softmax(-0.5 * ((bins - want[:, None]) / config.label_sigma_years) ** 2, 1)
        error = (log_p.exp() @ bins - want).abs().mean()
        loss = -(label * log_p).sum(1).mean() + config.years_weight * error
        step.zero_grad()
        loss.backward()
        step.step()
        run.images_seen += len(x)
        ema.update(net, len(x), run.images_seen)
        errors.append(float(error.detach()))
        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            metrics = validate(ema.net, val, where)
            run.record(train_mae=float(np.mean(errors)), **metrics)
            errors.clear()
            header = Header(
                arch="age-estimator",
                dims=dataclasses.asdict(dims),
                stage="age_estimator",
                images_seen=run.images_seen,
                dataset=DATASET,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "age-estimator.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
