"""The network that draws what age adds to a face, taught by real old skin.

    python -m train.space.older --pairs pairs --out older-pairs --minutes 75
    python -m train.space.older --pairs pairs --skin skin.safetensors --start older-pairs --out older --minutes 150

Each face of `train.space.pairs` was made young by the product; the network learns the way back to the real one, in log
ratios of luma, R/G and B/G: the error of the change in each band of a pyramid, as a share of the band's own contrast.
So its targets are no drawings: what it learns is where and how this skin, in this light, has folds, bags, spots and
grey stubble.

A face that was made young knows something of what it was. One that is young does not, and a network that has learned
from pairs alone draws much less on it. So the second run shows it real faces of 18 to 57 years, which have no pair:

- an adversary sees faces that were made older beside real old faces of the same dataset and gender;
- the reader of skin (`train.space.skin`) must read the wanted age;
- both see luma without what is wide: they can neither light nor tint. Wide luma and colour stay as the first network
  drew them, and folds get the colour that folds have.

Against the traces of making young, the versions of several models are mixed, with a part of the way back already gone,
at any light, and under noise that only the network sees.

Writes `older.safetensors` and `sheet.png`: real validation faces of 18 to 57 years, then each at 50, 70 and 85.

References: Isola et al., Image-to-image translation with conditional adversarial networks, CVPR 2017; Goodfellow et
al., Generative adversarial nets, NeurIPS 2014 (the loss that does not saturate); Shrivastava et al., Learning from
simulated and unsupervised images, CVPR 2017 (an adversary that is shown earlier pictures too).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from train.space.skin import SkinReader, blur, inside, load_skin_reader

DATASET = {"name": "UTKFace, All-Age-Faces (a part)", "licence": "non-commercial research only"}
SHEET_AGES = (50, 70, 85)
LEVELS = 5
"""Of the pyramid; each has half the side of the one before."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 8
    """Pairs a step."""
    alone_batch: int = 8
    """Faces without a pair a step, once there is an adversary."""
    rate: float = 6e-4
    warm_images: int = 2_000
    """The rate rises to its value over these."""
    betas: tuple[float, float] = (0.5, 0.99)
    adversary_rate: float = 1e-3
    adversary_decay: float = 0.02
    adversary_weight: float = 2.0
    adversary_kept: int = 256
    """So many faces of earlier steps are kept; a step's faces come to it with as many of them."""
    adversary_ramp_images: int = 2_000
    """The weights of the adversary and of the reader grow to their values over these."""
    adversary_noise: float = 0.08
    """Largest deviation of the noise under which the adversary sees, in its units (4 times log luma)."""
    years_weight: float = 0.5
    """Of the reader's error in tens of years, for faces that have no pair."""
    anchor_weights: tuple[float, ...] = (0.0, 0.0, 0.0, 0.5, 1.0)
    """How firmly each level of luma, fine to coarse, stays as the first network drew it, on faces that have no pair:
    adversary and reader see only what is fine."""
    anchor_chroma_weight: float = 1.0
    red_of_dark: tuple[float, float] = (-0.28, 0.2)
    """Log R/G and log B/G that come with a change of log luma: folds are redder than skin."""
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


def drift(change: Tensor, first: Tensor, config: Config) -> Tensor:
    """Return how far changes [N, 3, S, S] are from what the first network drew where nothing else holds them.

    That is wide luma, and colour: as the first network's where it is wide, as folds have it where it is fine.
    """
    loss, couple = torch.zeros((), device=change.device), torch.tensor(config.red_of_dark, device=change.device)
    for level, (mine, theirs) in enumerate(zip(pyramid(change), pyramid(first), strict=True)):
        mask = F.avg_pool2d(inside().to(change.device), 2**level)
        contrast = (theirs.square() * mask).mean((0, 2, 3), keepdim=True).sqrt() + 0.004
        colour = theirs[:, 1:] if config.anchor_weights[level] else couple[:, None, None] * mine[:, :1].detach()
        error = torch.cat([mine[:, :1] - theirs[:, :1], mine[:, 1:] - colour], 1) / contrast
        each = (((error.square() + config.kink**2).sqrt() - config.kink) * mask).mean((0, 2, 3)) / mask.mean()
        loss = loss + config.anchor_weights[level] * each[0] + config.anchor_chroma_weight * each[1:].mean()
    return loss


class Adversary(nn.Module):
    """What `SkinReader.see` shows of faces -> how real they are.

    It has features of its own: the reader has learned to read through blur and noise, and is blind to much. It also
    sees the same luma divided by its local deviation, in which weak texture counts as much as strong folds.
    """

    local_sigma = 9.0
    """Pixels."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 72, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((3, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, seen: Tensor) -> Tensor:
        """Return logits [N], high for real faces: a single patch says too little to learn from."""
        luma = seen[:, :1].float()
        even = luma / ((blur(luma.square(), self.local_sigma) + 1e-4).sqrt() + 0.04)
        return self.layers(torch.cat([seen, even * seen[:, 1:]], 1)).mean((1, 2, 3))


class Critics:
    """Who judges faces that have no pair: the reader of skin, and an adversary that learns beside the network."""

    def __init__(self, reader: SkinReader, config: Config, **layout: Any) -> None:
        self._reader, self._config = reader.to(**layout), config
        self.adversary = Adversary().to(**layout)
        rate, decay = config.adversary_rate, config.adversary_decay
        self.step = torch.optim.AdamW(self.adversary.parameters(), rate, (0.5, 0.99), weight_decay=decay)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def judge(self, made: Tensor, years: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return how unreal faces are, the error of the age that is read, and figures.

        Args:
            made: log colours [N, 3, S, S] of faces that were made older; both have gradients to them.
            years: [N], how old they are to be.
        """
        seen = self._see(made[:, :1])
        with autocast(made.device):
            self.adversary.eval().requires_grad_(False)
            unreal = F.softplus(-self.adversary(seen).float()).mean()
            self.adversary.train().requires_grad_(True)
            read = self._reader(seen)
        late = F.smooth_l1_loss(read, years, beta=10.0) / 10
        figures = {"unreal": unreal, "late": late, "years": read.mean(), "years_wanted": years.mean()}
        return unreal, late, {name: value.detach() for name, value in figures.items()}

    def learn(self, made: Tensor, real: Tensor, random: np.random.Generator) -> dict[str, Tensor]:
        """Let the adversary learn to tell faces that were made from real ones, and return figures.

        Args:
            made: log colours [N, 3, S, S] of faces that were made older.
            real: of as many real old faces.
            random: says which of those before come with them, and whose place these take.
        """
        now, kept = list(zip(made[:, :1].detach(), real[:, :1], strict=True)), self._kept
        before = random.choice(len(kept), min(len(now), len(kept)), replace=False) if kept else ()
        shown = [torch.stack(each) for each in zip(*now, *(kept[i] for i in before), strict=True)]
        for pair in now:
            if len(kept) < self._config.adversary_kept:
                kept.append(pair)
            else:
                kept[random.integers(len(kept))] = pair
        with autocast(made.device):
            of_made, of_real = self.adversary(self._see(torch.cat(shown))).float().chunk(2)
        loss = F.softplus(of_made).mean() + F.softplus(-of_real).mean()
        self.step.zero_grad()
        loss.backward()
        self.step.step()
        return {"adversary": loss.detach(), "told": (of_real[:, None] > of_made).float().mean()}

    def _see(self, luma: Tensor) -> Tensor:
        """Return what critics see of log luma [N, 1, S, S]: [N, 2, S, S], under noise."""
        seen = self._reader.see(luma)
        return seen + self._config.adversary_noise * torch.rand(1, device=seen.device) * torch.randn_like(seen)


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


def draw_alone(faces: list[np.ndarray], random: np.random.Generator, config: Config) -> tuple[Tensor, Tensor]:
    """Return faces that have no pair as `draw` does: (inputs [N, 3, S, S] in [-1, 1], faces [N, 3, S, S] in [0, 1])."""
    drawn = [_draw_one(face[None].repeat(2, 0), YOUNG_YEARS, random, config, plain=False) for face in faces]
    seen, clean = (torch.from_numpy(np.stack([each[i] for each in drawn])).permute(0, 3, 1, 2) for i in range(2))
    return 2 * seen - 1, clean


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
@click.option("--start", type=click.Path(exists=True, path_type=Path), help="A run folder, whose network goes on.")
@click.option("--skin", type=click.Path(exists=True, path_type=Path), help="From train.space.skin; with --start.")
def main(folder: Path, out: Path, minutes: float, images: int | None, start: Path | None, skin: Path | None) -> None:
    """Train the network that makes faces older."""
    if (start is None) != (skin is None):
        raise click.UsageError("--start and --skin go together: faces that have no pair need both")
    cv2.setNumThreads(1)
    config, dims = Config(), OlderDims(size_px=CROP_PX)
    torch.manual_seed(config.seed)
    where = device()
    layout = {"memory_format": torch.channels_last, "device": where}
    parents = {"pairs": folder / "manifest.json"}
    net, first, critics = OlderNet(dims), OlderNet(dims), None
    if start is not None and skin is not None:
        parents |= {"skin": skin, "start": start / "older.safetensors"}
        net.load_state_dict(load(parents["start"], "space-older")[1])
        first.load_state_dict(net.state_dict())
        critics = Critics(load_skin_reader(skin), config, **layout)
    first.eval().requires_grad_(False)
    run = Run(out, config, minutes, images, dims=dims, parents=parents)
    pairs = Pairs.load(folder)
    train, val = np.flatnonzero(~pairs.validation), np.flatnonzero(pairs.validation)[:96]
    likely = 1 / (1 + ((pairs.ages[train] - config.likely_years) / config.likely_spread_years) ** 2)
    likely = likely / likely.sum()
    # Real faces that the adversary sees are like those that were made: of the same dataset and gender.
    by_group = {
        group: (train[here], likely[here] / likely[here].sum())
        for group in np.unique(pairs.alone_groups)
        if (here := pairs.groups[train] == group).any()
    }
    margin = (STORED_PX - CROP_PX) // 2
    shown = to_tensor(np.ascontiguousarray(pairs.alone[-SHOWN:, margin:-margin, margin:-margin])).to(**layout)
    shown_ages = torch.from_numpy(pairs.alone_ages[-SHOWN:]).to(where)

    net, first = net.to(**layout), first.to(**layout)
    ema = EMA(net, config.ema_half_life_images)
    step = torch.optim.Adam(net.parameters(), config.rate, config.betas)
    parts = {"net": net, "ema": ema.net, "step": step}
    if critics is not None:
        parts |= {"adversary": critics.adversary, "adversary_step": critics.step}
    run.load_state(parts)
    random = np.random.default_rng((config.seed, run.images_seen))

    ticks = run.images_seen // config.tick_images
    totals: dict[str, list[float]] = {}
    is_over = run.is_over
    while not is_over:
        warm = min(1.0, (run.images_seen + config.batch) / config.warm_images)
        step.param_groups[0]["lr"] = config.rate * warm * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 2e-5
        rows = random.choice(train, config.batch, p=likely)
        seen, made_young, real, source, target = (each.to(where) for each in draw(pairs, rows, random, config))
        before, after = log_colours(made_young), log_colours(real)
        if critics is not None:
            rows = random.choice(len(pairs.alone) - SHOWN, config.alone_batch)
            like = np.array(
                [random.choice(by_group[group][0], p=by_group[group][1]) for group in pairs.alone_groups[rows]]
            )
            more, alone = (each.to(where) for each in draw_alone(list(pairs.alone[rows]), random, config))
            old = draw_alone([pairs.crops[pairs.rows[row], 0] for row in like], random, config)[1].to(where)
            seen, before = torch.cat([seen, more]), torch.cat([before, log_colours(alone)])
            source = torch.cat([source, torch.from_numpy(pairs.alone_ages[rows]).to(where)])
            target = torch.cat([target, torch.from_numpy(pairs.ages[like].astype(np.float32)).to(where)])
        with autocast(where):
            change = net(seen.contiguous(memory_format=torch.channels_last), source, target).float()
        wanted = (after - before[: config.batch]).clamp(-0.7, 0.7)
        loss, alike = level_errors(change[: config.batch], wanted, config)
        terms = {"error": loss.detach()} | {f"alike{i}": torch.tensor(value) for i, value in enumerate(alike)}
        if critics is not None:
            made = (before + change)[config.batch :]
            unreal, late, figures = critics.judge(made, target[config.batch :])
            with torch.no_grad(), autocast(where):
                was = first(seen[config.batch :], source[config.batch :], target[config.batch :]).float()
            moved = drift(change[config.batch :], was, config)
            share = min(1.0, run.images_seen / config.adversary_ramp_images)
            loss = loss + moved + share * (config.years_weight * late + config.adversary_weight * unreal)
            terms |= figures | {
                "drift": moved.detach(),
                "drawn_fine": pyramid(change[config.batch :, :1].detach())[0].std(),
                "first_fine": pyramid(was[:, :1])[0].std(),
            }
        step.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        step.step()
        if critics is not None:
            terms |= critics.learn(made, log_colours(old), random)  # after the gradients that went through it
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
            draw_sheet(ema.net, shown, shown_ages, out / "sheet.png")
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
def draw_sheet(net: OlderNet, faces: Tensor, ages: Tensor, path: Path) -> None:
    """Write faces [N, 3, S, S] in [-1, 1] of ages [N], and each at `SHEET_AGES`."""
    rows = [faces]
    for age in SHEET_AGES:
        change = net(faces, ages, torch.full_like(ages, age)) * inside().to(faces.device)
        rows.append(2 * change_colours((faces + 1) / 2, change) - 1)
    sheet(rows, path)


if __name__ == "__main__":
    main()
