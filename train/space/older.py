"""The network that draws what age adds to a face, taught by real old skin.

    python -m train.space.older --pairs runs/space/pairs --out runs/space/older --minutes 120

Each face of `train.space.pairs` was made young by the product; the network learns the way back to the real one, in log
ratios of luma, R/G and B/G. So its targets are no drawings: what it learns is where and how this skin, in this light,
has folds, bags, spots and grey stubble. Two losses:

- the error of the change in each band of a pyramid, as a share of the band's own contrast;
- an adversary that sees faces that were made older beside real old ones. Some of them are real young faces, which have
  no pairs. The error alone would average the wrinkles away, for they are not where one expects them, and the network
  would learn only to undo what making young leaves behind. The adversary sees no more than luma without what is wide:
  it can neither light nor tint.

Against the traces of making young, the versions of several models are mixed, with a part of the way back already gone,
at any light, and under noise that only the network sees.

Writes `older.safetensors` and `sheet.png`: real young validation faces, then each at 50, 70 and 85.

Reference: Isola et al., Image-to-image translation with conditional adversarial networks, CVPR 2017.
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
from faceage.kernels import BLACK_OFFSET, RGB_LUMA
from faceage.networks.space import OlderDims, OlderNet
from train.data import to_tensor
from train.run import EMA, Run, Script, autocast, device, git_commit, sheet
from train.space.pairs import CROP_PX, SHOWN, STORED_PX, YOUNG_YEARS, Pairs

DATASET = {"name": "UTKFace, All-Age-Faces (a part)", "licence": "non-commercial research only"}
SHEET_AGES = (50, 70, 85)
LEVELS = 5
"""Of the pyramid; each has half the side of the one before."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 10
    """Pairs a step."""
    young_batch: int = 6
    """Real young faces a step, once there is an adversary."""
    rate: float = 6e-4
    warm_images: int = 2_000
    """The rate rises to its value over these."""
    betas: tuple[float, float] = (0.5, 0.99)
    adversary_rate: float = 6e-4
    adversary_from_images: int = 12_000
    adversary_ramp_images: int = 4_000
    """Without adversary at first, unless a run goes on from another; then its weight grows over so many images."""
    adversary_weight: float = 1.0
    r1_weight: float = 4.0
    r1_every_steps: int = 8
    """Penalty of the gradient of a real face's mean realness (Mescheder et al., ICML 2018)."""
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 0.8, 0.6)
    """Of the pyramid, fine to coarse."""
    chroma_weight: float = 0.4
    kink: float = 0.8
    """Errors below this share of a level's contrast count as squares."""
    likely_years: float = 70.0
    likely_spread_years: float = 14.0
    """Faces near this age are drawn most often."""
    way_back_share: float = 0.3
    """Share of inputs that have a part of the way back already gone."""
    ema_half_life_images: int = 4_000
    tick_images: int = 6_000
    seed: int = 6


@cache
def inside() -> Tensor:
    """Return where the change counts: float32 [1, 1, S, S], 1 on the face, falling to 0 at its outline."""
    y, x = (np.mgrid[0:CROP_PX, 0:CROP_PX].astype(np.float32) + 0.5) / CROP_PX
    radius = np.hypot((x - 0.5) / 0.37, (y - 0.535) / 0.46)
    return torch.from_numpy(np.clip((1.06 - radius) / 0.2, 0, 1).astype(np.float32))[None, None]


def log_colours(rgb: Tensor) -> Tensor:
    """Return log luma, log R/G and log B/G [N, 3, S, S] of RGB [N, 3, S, S] in [0, 1]."""
    luma = torch.einsum("c,nchw->nhw", torch.from_numpy(RGB_LUMA).to(rgb.device), rgb)
    red, green, blue = torch.log(rgb + BLACK_OFFSET).unbind(1)
    return torch.stack([torch.log(luma + BLACK_OFFSET), red - green, blue - green], 1)


def change_colours(rgb: Tensor, change: Tensor) -> Tensor:
    """Return RGB [N, 3, S, S] in [0, 1] after a change [N, 3, S, S] of what `log_colours` returns."""
    luma, red, blue = change.unbind(1)
    green = luma - RGB_LUMA[0] * red - RGB_LUMA[2] * blue
    logs = torch.log(rgb + BLACK_OFFSET) + torch.stack([green + red, green, green + blue], 1)
    return (torch.exp(logs) - BLACK_OFFSET).clamp(0, 1)


def pyramid(x: Tensor) -> list[Tensor]:
    """Return the levels of a Laplacian pyramid of [N, C, S, S], fine to coarse."""
    levels = []
    for _ in range(LEVELS - 1):
        half = F.avg_pool2d(x, 2)
        levels.append(x - F.interpolate(half, scale_factor=2.0, mode="bilinear", align_corners=False))
        x = half
    return [*levels, x]


def level_errors(change: Tensor, wanted: Tensor, config: Config) -> tuple[Tensor, list[float]]:
    """Return the loss of changes [N, 3, S, S], and each level's correlation of luma with what was wanted."""
    loss, alike = torch.zeros((), device=change.device), []
    for level, (mine, theirs) in enumerate(zip(pyramid(change), pyramid(wanted), strict=True)):
        mask = F.avg_pool2d(inside().to(change.device), 2**level)
        contrast = (theirs.square() * mask).mean((0, 2, 3), keepdim=True).sqrt() + 0.004
        error = ((((mine - theirs) / contrast).square() + config.kink**2).sqrt() * mask).mean((0, 2, 3)) / mask.mean()
        loss = loss + config.level_weights[level] * (error[0] + config.chroma_weight * error[1:].mean())
        with torch.no_grad():
            products = [
                (a[:, 0] * b[:, 0] * mask[:, 0]).sum() for a, b in ((mine, theirs), (mine, mine), (theirs, theirs))
            ]
            alike.append(float(products[0] / (products[1] * products[2] + 1e-12).sqrt()))
    return loss, alike


class Adversary(nn.Module):
    """Luma of faces, without what is wide -> realness of each patch."""

    WIDE_SIGMA = 9.0
    """Blur in pixels; what that leaves is not seen."""

    def __init__(self, widths: tuple[int, ...] = (40, 80, 128, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip((2, *widths), widths, strict=False)):
            conv = nn.Conv2d(a, b, 4, stride=2 if i < len(widths) - 1 else 1, padding=1)
            nn.init.kaiming_normal_(conv.weight, 0.2)
            layers += [conv, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def see(self, luma: Tensor) -> Tensor:
        """Return what it sees of log luma [N, 1, S, S]: [N, 2, S, S]."""
        mask = inside().to(luma.device)
        seen = torch.cat([4 * self._fine(luma) * mask, mask.expand_as(luma)], 1)
        return seen.contiguous(memory_format=torch.channels_last)

    def _fine(self, x: Tensor) -> Tensor:
        radius = int(3 * self.WIDE_SIGMA)
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / self.WIDE_SIGMA) ** 2)
        kernel = (kernel / kernel.sum())[None, None]
        padded = F.pad(x, (radius,) * 4, mode="reflect")
        return x - F.conv2d(F.conv2d(padded, kernel[:, :, None]), kernel[:, :, :, None])

    def forward(self, seen: Tensor) -> Tensor:
        """Return logits [N, 1, P, P], high for patches of real faces."""
        return self.layers(seen)


def draw(
    pairs: Pairs, rows: np.ndarray, random: np.random.Generator, config: Config, *, plain: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (inputs [N, 3, S, S] in [-1, 1], young and real faces [N, 3, S, S] in [0, 1], source and target ages [N]).

    Args:
        pairs: to draw from.
        rows: int64 [N], which of them.
        random: what is random comes from it.
        config: hyper-parameters.
        plain: nothing is moved, spoiled or half done.
    """
    drawn = [_draw_one(pairs.crops[pairs.rows[row]], float(pairs.ages[row]), random, config, plain) for row in rows]
    seen, young, real = (torch.from_numpy(np.stack([each[i] for each in drawn])).permute(0, 3, 1, 2) for i in range(3))
    source = torch.tensor([each[3] for each in drawn], dtype=torch.float32)
    return 2 * seen - 1, young, real, source, torch.from_numpy(pairs.ages[rows].astype(np.float32))


def draw_young(pairs: Pairs, rows: np.ndarray, random: np.random.Generator, config: Config) -> tuple[Tensor, Tensor]:
    """Return real young faces as `draw` does: (inputs [N, 3, S, S] in [-1, 1], faces [N, 3, S, S] in [0, 1])."""
    drawn = [_draw_one(pairs.young[row][None].repeat(2, 0), YOUNG_YEARS, random, config, plain=False) for row in rows]
    seen, young = (torch.from_numpy(np.stack([each[i] for each in drawn])).permute(0, 3, 1, 2) for i in range(2))
    return 2 * seen - 1, young


def _draw_one(
    versions: np.ndarray, age: float, random: np.random.Generator, config: Config, plain: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    size, middle = (CROP_PX, CROP_PX), ((STORED_PX - 1) / 2,) * 2
    amount = 0.0 if plain else 1.0
    angle, zoom = amount * random.uniform(-10, 10), math.exp(amount * random.uniform(-0.1, 0.1))
    matrix = cv2.getRotationMatrix2D(middle, angle, zoom)
    matrix[:, 2] += (CROP_PX - STORED_PX) / 2 + amount * random.uniform(-7, 7, 2)
    faces = [cv2.warpAffine(each, matrix, size, borderMode=cv2.BORDER_REPLICATE) for each in versions]
    if not plain and random.random() < 0.5:
        faces = [face[:, ::-1] for face in faces]
    real, *young_versions = (np.log(face.astype(np.float32) / 255 + BLACK_OFFSET) for face in faces)
    young: np.ndarray = np.tensordot(random.dirichlet((0.7,) * len(young_versions)), np.stack(young_versions), 1)
    source = random.uniform(YOUNG_YEARS - 4, YOUNG_YEARS + 4)
    if not plain and random.random() < config.way_back_share:
        share = random.uniform(0.1, 0.7)
        young, source = young + share * (real - young), source + share * (age - source)
    # One light for both.
    gain = amount * (random.normal(0, 0.25) + random.normal(0, 0.07, 3))
    gamma = math.exp(amount * random.normal(0, 0.15))
    young, real = (
        np.clip(np.clip(np.exp(x) - BLACK_OFFSET, 0, 1) ** gamma * np.exp(gain), 0, 1) for x in (young, real)
    )
    young, real = young.astype(np.float32), real.astype(np.float32)
    if not plain and random.random() < 0.35:
        sigma = random.uniform(0.5, 1.6)
        young, real = (cv2.GaussianBlur(x, (0, 0), sigma) for x in (young, real))
    seen = young.copy()
    if not plain and random.random() < 0.6:
        noise = random.normal(0, 1, size).astype(np.float32)
        seen += cv2.GaussianBlur(noise, (0, 0), random.uniform(0.3, 1.2))[..., None] * random.uniform(0, 0.05)
    if not plain and random.random() < 0.3:
        coded = np.clip(255 * seen, 0, 255).astype(np.uint8)
        quality = int(random.uniform(40, 90))
        data = cv2.imencode(".jpg", coded, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        seen = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.float32) / 255
    return np.clip(seen, 0, 1), young, real, source


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--pairs", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; resumed if it exists.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=120.0, help="Budget of all sessions.")
@click.option("--images", type=click.IntRange(1), help="Budget in images instead.")
@click.option(
    "--start", type=click.Path(exists=True, path_type=Path), help="A run folder, whose network and adversary go on."
)
def main(folder: Path, out: Path, minutes: float, images: int | None, start: Path | None) -> None:
    """Train the network that makes faces older."""
    cv2.setNumThreads(1)
    config, dims = Config(), OlderDims(size_px=CROP_PX)
    torch.manual_seed(config.seed)
    parents, alone = {"pairs": folder / "manifest.json"}, config.adversary_from_images if start is None else 0
    net, adversary = OlderNet(dims), Adversary()
    if start is not None:
        parents["start"] = start / "older.safetensors"
        net.load_state_dict(load(parents["start"], "space-older")[1])
        state = torch.load(start / "resume.pt", weights_only=True, map_location="cpu")
        adversary.load_state_dict(state["adversary"])
    run = Run(out, config, minutes, images, dims=dims, parents=parents)
    pairs, where = Pairs.load(folder), device()
    layout = {"memory_format": torch.channels_last, "device": where}
    train, val = np.flatnonzero(~pairs.validation), np.flatnonzero(pairs.validation)[:96]
    likely = 1 / (1 + ((pairs.ages[train] - config.likely_years) / config.likely_spread_years) ** 2)
    likely = likely / likely.sum()
    margin = (STORED_PX - CROP_PX) // 2
    shown = to_tensor(np.ascontiguousarray(pairs.young[-SHOWN:, margin:-margin, margin:-margin])).to(**layout)

    net, adversary = net.to(**layout), adversary.to(**layout)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.Adam(net.parameters(), config.rate, config.betas)
    adversary_step = torch.optim.Adam(adversary.parameters(), config.adversary_rate, (0.0, 0.99))
    parts = {"net": net, "ema": ema.net, "step": step, "adversary": adversary, "adversary_step": adversary_step}
    run.load_state(parts)
    random = np.random.default_rng((config.seed, run.images_seen))

    ticks, steps = run.images_seen // config.tick_images, run.images_seen // config.batch
    totals: dict[str, list[float]] = {}
    is_over = run.is_over
    while not is_over:
        warm = min(1.0, (run.images_seen + config.batch) / config.warm_images)
        step.param_groups[0]["lr"] = config.rate * warm * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 2e-5
        rows = random.choice(train, config.batch, p=likely)
        seen, made_young, real, source, target = (each.to(where) for each in draw(pairs, rows, random, config))
        before, after = log_colours(made_young), log_colours(real)
        share = (run.images_seen - alone) / config.adversary_ramp_images
        if share > 0:
            rows = random.choice(len(pairs.young) - SHOWN, config.young_batch)
            more, young = (each.to(where) for each in draw_young(pairs, rows, random, config))
            seen, before = torch.cat([seen, more]), torch.cat([before, log_colours(young)])
            source = torch.cat([source, torch.from_numpy(pairs.young_ages[rows]).to(where)])
            target = torch.cat([target, target[torch.randint(len(target), (config.young_batch,))]])
        with autocast(where):
            change = net(seen.contiguous(memory_format=torch.channels_last), source, target).float()
        wanted = (after - before[: config.batch]).clamp(-0.7, 0.7)
        loss, alike = level_errors(change[: config.batch], wanted, config)
        terms = {"error": loss.detach()} | {f"alike{i}": torch.tensor(value) for i, value in enumerate(alike)}
        if share > 0:
            seen_made, seen_real = adversary.see((before + change)[:, :1]), adversary.see(after[:, :1])
            adversary.requires_grad_(False)
            with autocast(where):
                realness = adversary(seen_made).float()
            adversary.requires_grad_(True)
            loss = loss - config.adversary_weight * min(1.0, share) * realness.mean()
            with autocast(where):
                of_real, of_made = adversary(seen_real).float(), adversary(seen_made.detach()).float()
            hinge = F.relu(1 - of_real).mean() + F.relu(1 + of_made).mean()
            penalty = torch.zeros((), device=where)
            if steps % config.r1_every_steps == 0:
                point = seen_real.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(adversary(point).mean((1, 2, 3)).sum(), point, create_graph=True)
                penalty = config.r1_weight * gradient.square().sum((1, 2, 3)).mean()
            adversary_step.zero_grad()
            (hinge + penalty).backward()
            adversary_step.step()
            terms |= {"adversary": hinge.detach(), "real": of_real.detach().mean()}
            terms |= {
                "made": realness[: config.batch].detach().mean(),
                "made_young": realness[config.batch :].detach().mean(),
            }
            terms |= {
                "drawn": change[: config.batch, 0].detach().std(),
                "drawn_young": change[config.batch :, 0].detach().std(),
            }
        step.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        step.step()
        steps += 1
        run.images_seen += config.batch
        ema.update(net, config.batch, run.images_seen)
        for name, term in terms.items():
            totals.setdefault(name, []).append(float(term))

        is_over = run.is_over
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            metrics = validate(ema.net, pairs, val, config)
            run.record(**{name: float(np.mean(values)) for name, values in totals.items()}, **metrics)
            totals.clear()
            draw_sheet(ema.net, shown, out / "sheet.png")
            header = Header(
                arch="space-older",
                dims=dataclasses.asdict(dims),
                stage="older",
                images_seen=run.images_seen,
                dataset=DATASET,
                parents=run.parents,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "older.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


@torch.inference_mode()
def validate(net: OlderNet, pairs: Pairs, rows: np.ndarray, config: Config) -> dict[str, float]:
    """Return the error on held-out pairs, and the correlation of luma in each level."""
    where = next(net.parameters()).device
    fixed, errors, alike = np.random.default_rng(0), [], []
    for some in np.array_split(rows, max(1, len(rows) // 24)):
        seen, young, real, source, target = (each.to(where) for each in draw(pairs, some, fixed, config, plain=True))
        wanted = (log_colours(real) - log_colours(young)).clamp(-0.7, 0.7)
        loss, levels = level_errors(net(seen, source, target), wanted, config)
        errors.append(float(loss))
        alike.append(levels)
    return {"val_error": float(np.mean(errors))} | {
        f"val_alike{i}": float(value) for i, value in enumerate(np.mean(alike, 0))
    }


@torch.inference_mode()
def draw_sheet(net: OlderNet, faces: Tensor, path: Path) -> None:
    """Write real young faces [N, 3, S, S] in [-1, 1], and each at `SHEET_AGES`."""
    source = torch.full((len(faces),), YOUNG_YEARS, device=faces.device)
    rows = [faces]
    for age in SHEET_AGES:
        change = net(faces, source, torch.full_like(source, age)) * inside().to(faces.device)
        rows.append(2 * change_colours((faces + 1) / 2, change) - 1)
    sheet(rows, path)


if __name__ == "__main__":
    main()
