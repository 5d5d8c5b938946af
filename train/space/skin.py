"""The reader of skin: how old is what is fine in a face. The adversary of `train.space.older` gets the same input.

    python -m train.space.skin --faces runs/space/faces --out runs/space/skin --minutes 15

It sees luma without what is wide, at any contrast and sharpness, so it can say nothing of light, colour or shape. It
is in a loss (`train.space.older`), therefore it learns from no UTKFace picture that `train.readers.judge` learned from;
All-Age-Faces the judge has never seen. Writes `skin.safetensors`; not part of the product.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceage.checkpoint import Header, load, save
from faceage.errors import CheckpointError
from faceage.kernels import BLACK_OFFSET, RGB_LUMA
from train.data import in_half
from train.readers.age_estimator import LOSS_HALF, age_metrics, check_half
from train.run import EMA, Run, Script, autocast, device, git_commit
from train.space.coordinates import STORED_PX
from train.space.faces import UTKFACE, Heads
from train.space.pairs import CROP_PX

DATASET = {"name": "UTKFace (a half), All-Age-Faces (a part)", "licence": "non-commercial research only"}
FIRST_YEARS, LAST_YEARS = 15, 90
_YEARS = 100


@dataclass(frozen=True)
class SkinDims:
    """Dimensions of the reader of skin."""

    size_px: int = CROP_PX
    wide_sigma: float = 9.0
    """Blur in pixels; what that leaves is not seen."""
    widths: tuple[int, ...] = (24, 48, 96, 128)
    """Channels at S/2, S/4, S/8 and S/16."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 48
    rate: float = 2e-3
    weight_decay: float = 0.05
    label_blur_years: float = 3.0
    ema_half_life_images: int = 10_000
    tick_images: int = 9_600
    seed: int = 7


@cache
def inside() -> Tensor:
    """Return where a change counts: float32 [1, 1, S, S], 1 on the face, falling to 0 at its outline."""
    y, x = (np.mgrid[0:CROP_PX, 0:CROP_PX].astype(np.float32) + 0.5) / CROP_PX
    radius = np.hypot((x - 0.5) / 0.37, (y - 0.535) / 0.46)
    return torch.from_numpy(np.clip((1.06 - radius) / 0.2, 0, 1).astype(np.float32))[None, None]


def blur(planes: Tensor, sigma: float) -> Tensor:
    """Return planes [N, 1, S, S] after a Gaussian blur."""
    radius = int(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=planes.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    padded = F.pad(planes, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None]), kernel[:, :, :, None])


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)
    )


class SkinReader(nn.Module):
    """Fine luma of a face -> years: the sum over the years k of p(older than k)."""

    def __init__(self, dims: SkinDims) -> None:
        super().__init__()
        self.dims, previous = dims, 2
        self.levels = nn.ModuleList()
        for width in dims.widths:
            self.levels.append(nn.Sequential(_conv(previous, width, 2), _conv(width, width, 1)))
            previous = width
        self.dropout = nn.Dropout(0.3)
        self.older = nn.Linear(previous * 25, _YEARS)

    def see(self, luma: Tensor) -> Tensor:
        """Return what it sees of log luma [N, 1, S, S]: [N, 2, S, S]."""
        mask = inside().to(luma.device)
        seen = torch.cat([4 * (luma - blur(luma, self.dims.wide_sigma)) * mask, mask.expand_as(luma)], 1)
        return seen.contiguous(memory_format=torch.channels_last)

    def logits(self, seen: Tensor) -> Tensor:
        """Return logits [N, 100] of p(older than 0, 1, ... 99)."""
        x = seen
        for level in self.levels:
            x = level(x)
        # Where a line lies says more than that there is one: areas of the face are kept apart.
        return self.older(self.dropout(F.adaptive_avg_pool2d(x, 5).flatten(1))).float()

    def forward(self, seen: Tensor) -> Tensor:
        """Return ages [N], years."""
        return self.logits(seen).sigmoid().sum(1)


def load_skin_reader(path: Path) -> SkinReader:
    """Load the reader, frozen, in evaluation mode.

    Raises:
        CheckpointError: if it may have learned from the judge's pictures.
    """
    header, weights = load(path, "skin")
    check_half(path, header)
    reader = SkinReader(SkinDims(**header.dims))
    reader.load_state_dict(weights)
    return reader.eval().requires_grad_(False)


def log_luma(faces: np.ndarray, random: np.random.Generator | None) -> Tensor:
    """Return log luma [N, 1, S, S] of stored faces uint8 [N, T, T, 3]; spoiled, if there is a generator."""
    drawn = []
    for face in faces:
        middle = ((STORED_PX - 1) / 2,) * 2
        matrix = cv2.getRotationMatrix2D(middle, 0, 1)
        if random is not None:
            matrix = cv2.getRotationMatrix2D(middle, random.uniform(-10, 10), math.exp(random.uniform(-0.1, 0.1)))
            matrix[:, 2] += random.uniform(-5, 5, 2)
        matrix[:, 2] += (CROP_PX - STORED_PX) / 2
        crop = cv2.warpAffine(face, matrix, (CROP_PX, CROP_PX), borderMode=cv2.BORDER_REPLICATE)
        luma = (crop.astype(np.float32) / 255) @ RGB_LUMA
        if random is not None:
            luma = luma[:, ::-1] if random.random() < 0.5 else luma
            luma = luma ** math.exp(random.normal(0, 0.2)) * math.exp(random.normal(0, 0.2))
            if random.random() < 0.5:
                luma = cv2.GaussianBlur(luma, (0, 0), random.uniform(0.4, 1.8))
            if random.random() < 0.5:
                noise = random.normal(0, 1, luma.shape).astype(np.float32)
                luma = luma + cv2.GaussianBlur(noise, (0, 0), random.uniform(0.3, 1.2)) * random.uniform(0, 0.06)
            if random.random() < 0.3:
                coded = np.clip(255 * luma, 0, 255).astype(np.uint8)
                data = cv2.imencode(".jpg", coded, [cv2.IMWRITE_JPEG_QUALITY, int(random.uniform(40, 90))])[1]
                luma = np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), np.float32) / 255
        drawn.append(np.log(np.clip(luma, 0, 1).astype(np.float32) + BLACK_OFFSET))
    return torch.from_numpy(np.stack(drawn))[:, None]


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--faces", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; resumed if it exists.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=15.0, help="Budget of all sessions.")
@click.option("--images", type=click.IntRange(1), help="Budget in images instead.")
def main(folder: Path, out: Path, minutes: float, images: int | None) -> None:
    """Train the reader of skin."""
    cv2.setNumThreads(1)
    config, dims = Config(), SkinDims()
    torch.manual_seed(config.seed)
    stored = folder / f"crops-{STORED_PX}.npy"
    if not stored.exists():
        raise CheckpointError(f"{folder} has no {stored.name}; run train.space.coordinates, which writes it")
    run = Run(out, config, minutes, images, dims=dims, parents={"faces": folder / "faces.npz"})
    heads, where, crops = Heads.load(folder), device(), np.load(stored, mmap_mode="r")
    adult = (heads.ages >= FIRST_YEARS) & (heads.ages <= LAST_YEARS)
    usable = adult & ((heads.dataset != UTKFACE) | in_half(heads.names, LOSS_HALF))
    train, val = np.flatnonzero(usable & ~heads.validation), np.flatnonzero(adult & heads.validation)
    counts = np.bincount((heads.ages[train] / 5).astype(int), minlength=20)
    likely = counts[(heads.ages[train] / 5).astype(int)] ** -0.7
    likely = likely / likely.sum()

    net = SkinReader(dims).to(where, memory_format=torch.channels_last)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=config.weight_decay)
    parts = {"net": net, "ema": ema.net, "step": step}
    run.load_state(parts)
    random = np.random.default_rng((config.seed, run.images_seen))
    years = torch.arange(_YEARS, device=where) + 0.5

    ticks, losses = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        rows = random.choice(train, config.batch, p=likely)
        want = torch.from_numpy(heads.ages[rows]).to(where)
        label = torch.sigmoid((want[:, None] - years) / config.label_blur_years)
        with autocast(where):
            logits = net.logits(net.see(log_luma(crops[rows], random).to(where)))
        loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none").sum(1).mean()
        step.zero_grad()
        loss.backward()
        step.step()
        run.images_seen += config.batch
        ema.update(net, config.batch, run.images_seen)
        losses.append(float(loss.detach()))
        is_over = run.is_over
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            read = [_read(ema.net, crops[some]) for some in np.array_split(val, max(1, len(val) // 64))]
            metrics = age_metrics(np.concatenate(read), heads.ages[val])
            run.record(loss=float(np.mean(losses)), **metrics)
            losses.clear()
            header = Header(
                arch="skin",
                dims=dataclasses.asdict(dims),
                stage="skin",
                images_seen=run.images_seen,
                dataset=DATASET,
                parents=run.parents,
                train_config=run.config | {"half": LOSS_HALF},
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "skin.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


@torch.inference_mode()
def _read(net: SkinReader, faces: np.ndarray) -> np.ndarray:
    where = next(net.parameters()).device
    return net(net.see(log_luma(faces, None).to(where))).cpu().numpy()


if __name__ == "__main__":
    main()
