"""The hair network: where hair is in the crop of a head.

    python -m train.space.hair --heads runs/space/hair_teacher --out runs/space/hair --minutes 60

Distilled from the teacher's masks (`train.space.hair_teacher`) of East Asian heads, whose hair is mostly black: hair is
recoloured to brown, blond, red, grey and white while training. Writes `hair.safetensors`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import click
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from faceage.checkpoint import Header, save
from faceage.networks.space import MapDims, MapNet
from train.data import to_tensor
from train.run import EMA, Run, Script, device, git_commit
from train.space.coordinates import spoil

DATASET = {"name": "All-Age-Faces (a part)", "licence": "non-commercial research only"}
HAIR_COLOURS = (
    (60, 40, 25),
    (120, 80, 45),
    (190, 150, 90),
    (225, 200, 150),
    (140, 60, 30),
    (130, 130, 130),
    (215, 215, 215),
)
"""RGB that hair is recoloured towards."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters."""

    batch: int = 32
    rate: float = 2e-3
    weight_decay: float = 0.01
    turn_degrees: float = 12.0
    zoom: float = 0.2
    shift: float = 0.08
    recoloured: float = 0.6
    """Share of heads whose hair is recoloured."""
    ema_half_life_images: int = 6_000
    tick_images: int = 8_000
    seed: int = 12


def recolour(head: np.ndarray, mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a head uint8 [S, S, 3] with hair of another colour; mask float32 [S, S]. The strands' contrast stays."""
    x = head.astype(np.float32)
    luma = x.mean(-1, keepdims=True)
    weight = mask.sum() + 1e-3
    mean = float((luma[..., 0] * mask).sum() / weight)
    colour = np.array(HAIR_COLOURS[random.integers(len(HAIR_COLOURS))], np.float32) * random.uniform(0.7, 1.15)
    made = colour * (1 + (luma - mean) / (mean + 25) * random.uniform(0.5, 1.2))
    a = (mask * random.uniform(0.6, 1.0))[..., None]
    return np.clip(x + a * (made - x), 0, 255).astype(np.uint8)


def draw(
    crops: np.ndarray, masks: np.ndarray, rows: np.ndarray, random: np.random.Generator, config: Config, size_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return augmented heads uint8 [B, S, S, 3] and masks float32 [B, S/2, S/2]."""
    stored = crops.shape[1]
    heads, wanted = [], []
    for row in rows:
        angle = random.uniform(-1, 1) * config.turn_degrees
        scale = size_px / stored * math.exp(random.uniform(-1, 1) * config.zoom)
        matrix = cv2.getRotationMatrix2D(((stored - 1) / 2, (stored - 1) / 2), angle, scale)
        matrix[:, 2] += (size_px - stored) / 2 + random.uniform(-1, 1, 2) * config.shift * size_px
        size, border = (size_px, size_px), cv2.BORDER_REPLICATE
        head = cv2.warpAffine(crops[row], matrix, size, flags=cv2.INTER_LINEAR, borderMode=border)
        mask = cv2.resize(masks[row], (stored, stored)).astype(np.float32) / 255
        mask = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_LINEAR, borderMode=border)
        if random.random() < 0.5:
            head, mask = np.ascontiguousarray(head[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
        if random.random() < config.recoloured:
            head = recolour(head, mask, random)
        heads.append(spoil(head, random))
        wanted.append(cv2.resize(mask, (size_px // 2, size_px // 2), interpolation=cv2.INTER_AREA))
    return np.stack(heads), np.stack(wanted)


def losses(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each picture (cross entropy and 1 - Dice), and its intersection over union at 0.5: [N]."""
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((1, 2))
    p = torch.sigmoid(logits)
    dice = 1 - (2 * (p * wanted).sum((1, 2)) + 1) / ((p * p).sum((1, 2)) + (wanted * wanted).sum((1, 2)) + 1)
    a, b = p > 0.5, wanted > 0.5
    overlap = ((a & b).sum((1, 2)) + 1) / ((a | b).sum((1, 2)) + 1)
    return entropy + 0.5 * dice, overlap


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--heads", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; resumed if it exists.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=60.0, help="Budget of all sessions.")
@click.option("--images", type=click.IntRange(1), help="Budget in images instead.")
def main(folder: Path, out: Path, minutes: float, images: int | None) -> None:
    """Train the hair network."""
    cv2.setNumThreads(1)
    config, dims = Config(), MapDims(size_px=160, outputs=1, template="head", widths=(16, 24, 48, 72, 96))
    torch.manual_seed(config.seed)
    run = Run(out, config, minutes, images, dims=dims)
    with np.load(folder / "heads.npz", allow_pickle=False) as data:
        crops, masks, validation = data["crops"], data["masks"], data["validation"]
    read = masks.any((1, 2))
    train, val = np.flatnonzero(read & ~validation), np.flatnonzero(read & validation)[:256]
    where = device()

    net = MapNet(dims)
    with torch.no_grad():
        net.bias_map.fill_(-1.0)
        net.head.weight.mul_(0.1)
    net = net.to(where, memory_format=torch.channels_last)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=config.weight_decay)
    parts = {"net": net, "ema": ema.net, "step": step}
    run.load_state(parts)
    random = np.random.default_rng((config.seed, run.images_seen))

    def measure(network: MapNet, heads: np.ndarray, wanted: np.ndarray) -> tuple[Tensor, Tensor]:
        logits = network(to_tensor(heads).to(where, memory_format=torch.channels_last))[:, 0]
        return losses(logits, torch.from_numpy(wanted).to(where))

    ticks, seen = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        rows = random.choice(train, config.batch)
        loss = measure(net, *draw(crops, masks, rows, random, config, dims.size_px))[0].mean()
        step.zero_grad()
        loss.backward()
        step.step()
        run.images_seen += config.batch
        ema.update(net, config.batch, run.images_seen)
        seen.append(float(loss.detach()))
        is_over = run.is_over
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            fixed = np.random.default_rng(0)
            plain = dataclasses.replace(config, recoloured=0.0)
            with torch.inference_mode():
                parts_of = [
                    measure(ema.net, *draw(crops, masks, val[i : i + 64], fixed, plain, dims.size_px))
                    for i in range(0, len(val), 64)
                ]
            metrics = {
                "val_loss": float(torch.cat([a for a, _ in parts_of]).mean()),
                "val_overlap": float(torch.cat([b for _, b in parts_of]).mean()),
            }
            run.record(loss=float(np.mean(seen)), **metrics)
            seen.clear()
            header = Header(
                arch="space-hair",
                dims=dataclasses.asdict(dims),
                stage="hair",
                images_seen=run.images_seen,
                dataset=DATASET,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "hair.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
