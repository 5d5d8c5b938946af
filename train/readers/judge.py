"""The judge: an age estimator that is in no loss, for `train.evaluate` alone.

    python -m train.readers.judge --data utkface.tar --out runs/judge --minutes 20

A network that is in a generator's loss can be fooled by that generator, and so can its twin. The judge therefore has
another architecture than `AgeEstimator` (a pre-activation ResNet with global pooling, at 128 px), another kind of
output (ordinal), and learns from the half of the training pictures that no age estimator in a loss has seen. It is not
part of the product. Writes `judge.safetensors`.

References: Niu et al.: Ordinal regression with multiple output CNN for age estimation, CVPR 2016; He et al.: Identity
mappings in deep residual networks, ECCV 2016.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceage.checkpoint import Header, load, save
from train.augment import shift_and_jitter, soften, zoom
from train.data import DATASET, FaceSet, Sampler, load_faces, to_tensor
from train.readers.age_estimator import LOSS_HALF, age_metrics
from train.run import EMA, Run, Script, autocast, device, git_commit, run_options

JUDGE_PX = 128
HALF = 1 - LOSS_HALF
"""The half of the training pictures that the judge learns from."""
_YEARS = 100
_WIDTHS = (24, 48, 96, 160)
_BLOCKS = (0, 1, 2, 2)


class _PreActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return x + y


class Judge(nn.Module):
    """face -> years: the sum over the years k of p(older than k)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 7, stride=2, padding=3)]
        previous = _WIDTHS[0]
        for i, (width, blocks) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True)):
            if i:
                layers += [nn.BatchNorm2d(previous), nn.SiLU(), nn.Conv2d(previous, width, 3, stride=2, padding=1)]
            layers += [_PreActivation(width) for _ in range(blocks)]
            previous = width
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(previous), nn.SiLU())
        self.dropout = nn.Dropout(0.2)
        self.older = nn.Linear(previous, _YEARS)

    def features(self, x_N3SS: Tensor) -> Tensor:
        """Return [N, 160]: the pooled features, for distances between sets of faces."""
        return self.body(x_N3SS).mean((2, 3)).float()

    def logits(self, x_N3SS: Tensor) -> Tensor:
        """Return logits [N, 100] of p(older than 0, 1, ... 99)."""
        return self.older(self.dropout(self.features(x_N3SS))).float()

    def forward(self, x_N3SS: Tensor) -> Tensor:
        """Return ages [N], years."""
        return self.logits(x_N3SS).sigmoid().sum(1)


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 64
    rate: float = 2e-3
    weight_decay: float = 0.05
    label_blur_years: float = 2.0
    """Width of the step in the ordinal labels: UTKFace's ages are themselves estimates."""
    ema_half_life_images: int = 20_000
    tick_images: int = 19_200
    seed: int = 5


def load_judge(path: Path) -> Judge:
    """Load the judge, frozen, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict(load(path, "judge")[1])
    return judge.eval().requires_grad_(False)


@torch.inference_mode()
def read_ages(judge: Judge, pixels: np.ndarray) -> np.ndarray:
    """Return the ages [N], years, of uint8 faces [N, 128, 128, 3] that are aligned by `TEMPLATE_5`.

    Each is read together with its mirror image.
    """
    parts = []
    where = next(judge.parameters()).device
    for start in range(0, len(pixels), 128):
        x = to_tensor(pixels[start : start + 128]).to(where).contiguous(memory_format=torch.channels_last)
        parts.append((judge(x) + judge(x.flip(3))) / 2)
    return torch.cat(parts).cpu().numpy()


def validate(judge: Judge, faces: FaceSet) -> dict[str, float]:
    """Return MAE, Pearson r and the MAE over 15 to 85 years."""
    return age_metrics(read_ages(judge, faces.pixels), faces.ages)


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=20.0)
def main(data: Path, out: Path, cache: Path, minutes: float, images: int | None) -> None:
    """Train the judge."""
    config = Config()
    torch.manual_seed(config.seed)
    run = Run(out, config, minutes, images)
    faces = load_faces(data, JUDGE_PX, cache)
    where = device()
    train, val = faces.train.half(HALF), faces.val
    sampler = Sampler(train, config.batch, config.seed, power=0.5)

    net = Judge().to(where, memory_format=torch.channels_last)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=config.weight_decay)
    parts = {"net": net, "ema": ema.net, "step": step, "sampler": sampler}
    run.load_state(parts)
    years = torch.arange(_YEARS, device=where) + 0.5

    ticks, losses = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        pixels, ages = sampler.draw()
        x = to_tensor(zoom(pixels, sampler.random)).to(where)
        x = shift_and_jitter(soften(x), shift_px=6, colour=0.3)
        want = torch.from_numpy(ages).to(where)
        label = torch.sigmoid((want[:, None] - years) / config.label_blur_years)
        with autocast(where):
            logits = net.logits(x.contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none").sum(1).mean()
        step.zero_grad()
        loss.backward()
        step.step()
        run.images_seen += len(x)
        ema.update(net, len(x), run.images_seen)
        losses.append(float(loss.detach()))
        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            metrics = validate(ema.net, val)
            run.record(loss=float(np.mean(losses)), **metrics)
            losses.clear()
            header = Header(
                arch="judge",
                dims={"size_px": JUDGE_PX},
                stage="judge",
                images_seen=run.images_seen,
                dataset=DATASET,
                train_config=run.config | {"half": HALF},
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "judge.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
