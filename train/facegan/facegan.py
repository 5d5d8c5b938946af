"""FaceGAN, step 3: the U-Net, on real faces and on synthetic pairs.

    python -m train.facegan.facegan --data utkface.tar --pairs runs/pairs --aging runs/aging \
        --identity runs/identity/identity.safetensors --reader runs/reader64/age-estimator.safetensors \
        --reader runs/reader32/age-estimator.safetensors --out runs/facegan --minutes 120

What a real face looks like at another age nobody knows, so it is taught by

- Age-cGAN, whose change is right in its 64 pixels, but for what they cannot show: at first the U-Net follows it alone,
  and later must not stray from it far. Without it estimators are fooled within minutes, by light and shade that nobody
  else takes for age;
- two adversaries, which see aged faces beside real ones of the target age, inside the mask only (hair does not change
  and would give every aged face away): Age-cGAN's own on the whole face at 64 pixels, and one on its patches at full
  resolution. They also see faces with a wrong age as fakes, the unchanged source face among them;
- estimators and an identity network, behind random shifts, brightness and blur. They read 64 pixels and fewer: what is
  finer than that only the second adversary sees, so that it cannot be bent to fool them;
- two views of one face, moved, zoomed and mirrored: the change must move with the skin, and be mirrored too, else one
  cheek gets darker than the other;
- the way back: aged and made young again, it must be the same picture.

Synthetic pairs (`train.facegan.make_pairs`) show the same person at two ages: there the change itself is known. Writes
`facegan.safetensors` and `sheet.png`: validation faces, then each at 20, 40, 60 and 80.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceage.agers.age_cgan import CHANGE_GAIN, LUMA
from faceage.ages import OLDEST_YEARS, age_to_classes
from faceage.checkpoint import Header, load, read_header, save
from faceage.errors import CheckpointError
from faceage.geometry import face_mask, skin_mask
from faceage.networks.age_cgan import AgeCGANDims, Discriminator, Encoder, Generator
from faceage.networks.facegan import FaceGANDims, PatchDiscriminator, UNet
from faceage.networks.regressors import AgeEstimator, IdentityNet
from train.age_cgan.aging import calm
from train.augment import degrade, shift_and_jitter
from train.data import DATASET, FaceSet, Sampler, load_faces, to_tensor
from train.facegan.make_pairs import PairSampler, load_pairs
from train.losses import r1_penalty, read_by_all
from train.readers.age_estimator import load_reader, reader_option
from train.readers.identity import identity_option, load_identity
from train.run import EMA, Part, Run, Script, autocast, device, git_commit, run_options, sheet

SHEET_AGES = (20, 40, 60, 80)
STORED_PX = 192
"""Side of the faces that views are taken of: what UTKFace's 200-pixel pictures hold."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 16
    """Faces to age a step, and as many real ones for the adversary."""
    large_every_steps: int = 5
    """A step with half as many faces of the larger sides, by turns: finer detail, and crops of all sizes look alike."""
    warm_rate: float = 1e-3
    rate: float = 4e-4
    coarse_rate: float = 4e-4
    fine_rate: float = 4e-4
    r1_weight: float = 0.5
    r1_every_steps: int = 16
    """The fine adversary's gradient penalty, as in `train.facegan.stylegan`; the coarse one has spectral norms."""
    betas: tuple[float, float] = (0.0, 0.99)
    label_sigma_years: float = 4.0
    """Noise on the source age: the product reads it off the face."""
    wrong_age_gap_years: float = 10.0
    """Only ages at least this far apart are called wrong: labels are noisy and neighbours look alike."""
    warm_share: float = 0.25
    """Share of the budget at the beginning, in which there is neither adversary nor estimator: a run that starts from
    another's U-Net does without."""
    coarse_weight: float = 0.4
    fine_weight: float = 0.8
    """Weights of the two adversaries."""
    teacher_weight: float = 2.0
    """Weight of the mean absolute distance to Age-cGAN's change, at its resolution."""
    identity_weight: float = 1.0
    """Weight of 1 - cosine between the face and the aged face."""
    age_weight: float = 0.45
    """Weight of the estimators' mean error, in decades, once it is fully on."""
    age_ramp: float = 0.15
    """Share of the budget after that beginning, in which the age loss grows to its weight."""
    delta_weight: float = 0.5
    """Weight of the mean absolute change."""
    steady_weight: float = 4.0
    """Weight of the mean absolute difference between the changes of two views, one moved onto the other."""
    cycle_weight: float = 1.0
    """Weight of the mean absolute difference between a face and itself after there and back."""
    pair_weight: float = 0.5
    """Weight of the mean absolute error of the change on synthetic pairs."""
    feature_weight: float = 0.1
    """Weight of the same in features of the identity network (Johnson et al., ECCV 2016, with our own network)."""
    ema_half_life_images: int = 5_000
    tick_images: int = 4_800
    seed: int = 8


def weights_of(side_px: int, where: torch.device) -> Tensor:
    """Return what the product multiplies a change with: the mask, without eyes and teeth; [S, S]."""
    return torch.from_numpy(face_mask(side_px) * skin_mask(side_px)).to(where)


class Teacher(nn.Module):
    """Age-cGAN as `train.age_cgan.aging` left it: the change that the product would make, without optimizing z."""

    def __init__(self, encoder: Path, generator: Path) -> None:
        super().__init__()
        header, weights = load(generator, "age-cgan-generator")
        dims = AgeCGANDims(**header.dims)
        self.size_px = dims.size_px
        self.encoder, self.generator = Encoder(dims), Generator(dims)
        self.generator.load_state_dict(weights)
        self.encoder.load_state_dict(load(encoder, "age-cgan-encoder")[1])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, x_N3SS: Tensor, source_N: Tensor, target_N: Tensor) -> Tensor:
        """Return the change [N, 3, P, P] at its own side P, not masked."""
        x = F.interpolate(x_N3SS, self.size_px, mode="area")
        y = [torch.from_numpy(age_to_classes(age.cpu().numpy())).to(x.device) for age in (source_N, target_N)]
        reference, aged = self.generator(self.encoder(x).float().repeat(2, 1), torch.cat(y)).float().chunk(2)
        # As the product: where the face has less contrast than its reconstruction, it gets less change.
        inside = torch.from_numpy(face_mask(self.size_px) > 0.5).to(x.device)
        contrast = [(p * luma_weights(x)).sum(1)[:, inside].std(1) for p in (x, reference)]
        share = (contrast[0] / contrast[1].clamp(min=1e-6)).clamp(max=1)
        return CHANGE_GAIN * calm(aged - reference) * share[:, None, None, None]


def luma_weights(like: Tensor) -> Tensor:
    """Return Rec. 601's weights [3, 1, 1], on the device of `like`."""
    return torch.from_numpy(LUMA).to(like.device)[:, None, None]


def score(D: nn.Module, mask: Tensor, pictures: list[Tensor], y: Tensor) -> list[Tensor]:
    """Return an adversary's logits of each batch of pictures; a pass each, for statistics of a batch must not mix."""
    return [D(mask * shift_and_jitter(x.contiguous(memory_format=torch.channels_last)), y).float() for x in pictures]


def adversary_loss(scores: list[Tensor], is_wrong: Tensor) -> Tensor:
    """Return the hinge loss of logits for real, aged and wrong faces; `is_wrong` [N] says which are far enough."""
    real, aged, wrong = scores
    counted = is_wrong.view(-1, *[1] * (wrong.ndim - 1)).expand_as(wrong)
    wrong_loss = (F.relu(1 + wrong) * counted).sum() / counted.sum().clamp(min=1)
    return F.relu(1 - real).mean() + 0.5 * F.relu(1 + aged).mean() + 0.5 * wrong_loss


def age_faces(U: nn.Module, x: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (aged faces, changes), both [N, 3, S, S], for ages in years."""
    delta = U(x, source, target).float()
    return x + weights_of(x.shape[-1], x.device) * delta, delta


def random_motion(count: int, where: torch.device) -> Tensor:
    """Return small similarities in `affine_grid`'s coordinates [N, 3, 3]: turned, zoomed, shifted."""
    angle, zoom, right, down = (torch.rand(4, count, device=where) * 2 - 1) * torch.tensor(
        [[math.radians(6)], [0.07], [0.05], [0.05]], device=where
    )
    cos, sin = torch.cos(angle) * torch.exp(zoom), torch.sin(angle) * torch.exp(zoom)
    zero = torch.zeros_like(cos)
    rows = torch.stack([cos, -sin, right, sin, cos, down, zero, zero, zero + 1], 1)
    return rows.view(count, 3, 3)


def view(x: Tensor, motion: Tensor, side_px: int) -> Tensor:
    """Return pictures [N, 3, S, S], each seen through its motion [N, 3, 3] at a side of `side_px`."""
    grid = F.affine_grid(motion[:, :2], [len(x), 3, side_px, side_px], align_corners=False)
    seen = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return seen.contiguous(memory_format=torch.channels_last)


def early_features(FR: IdentityNet, x: Tensor) -> Tensor:
    """Return the first stages of the identity network's features of faces of any side."""
    stages = FR.trunk.body[: 3 + FR.trunk.dims.blocks[0] + 3]  # two strided convolutions, each with norm and ReLU
    return stages(F.interpolate(x, FR.trunk.dims.size_px, mode="area")).float()


@torch.inference_mode()
def validate(
    U: nn.Module, FR: IdentityNet, readers: list[AgeEstimator], faces: FaceSet, side_px: int, path: Path
) -> dict[str, float]:
    """Return what the loss's own networks say of validation faces made 25 years older and younger; write the sheet."""
    where = next(U.parameters()).device
    chosen = np.flatnonzero((faces.ages >= 26) & (faces.ages <= 60))[:128]
    x = to_tensor(faces.pixels[chosen]).to(where)
    x = F.interpolate(x, side_px, mode="bilinear", antialias=True)
    source = torch.from_numpy(faces.ages[chosen]).to(where)
    metrics: dict[str, float] = {}
    for name, years in (("older", 25.0), ("younger", -25.0)):
        aged, delta = age_faces(U, x, source, source + years)
        pair = (F.interpolate(picture, FR.trunk.dims.size_px, mode="area") for picture in (x, aged))
        before, after = (FR(small) for small in pair)
        error = (read_by_all(readers, aged) - source - years).abs()
        metrics |= {
            f"val_mae_{name}": float(error.mean()),
            f"val_cosine_{name}": float((before * after).sum(1).mean()),
            f"val_delta_{name}": float(delta.abs().mean()),
        }
    shown = np.linspace(0, len(faces) - 1, 10).astype(int)
    rows = [F.interpolate(to_tensor(faces.pixels[shown]).to(where), side_px, mode="bilinear", antialias=True)]
    source = torch.from_numpy(faces.ages[shown]).to(where)
    rows += [age_faces(U, rows[0], source, torch.full_like(source, age))[0] for age in SHEET_AGES]
    sheet(rows, path)
    return metrics


def pair_losses(
    U: nn.Module, FR: IdentityNet, young: Tensor, old: Tensor, source: Tensor, target: Tensor, side_px: int
) -> tuple[Tensor, Tensor]:
    """Return (error of the change, error of the features) on pairs [N, 3, P, P] of any side, in [-1, 1].

    The change is compared at the pairs' own side, and without its mean luma, which the U-Net cannot draw.
    """
    pair_px = young.shape[-1]
    x = F.interpolate(young, side_px, mode="bilinear", align_corners=False).contiguous(
        memory_format=torch.channels_last
    )
    aged, delta = age_faces(U, x, source, target)
    weights = weights_of(pair_px, x.device)
    known = old - young
    light = ((known * luma_weights(x)).sum(1, keepdim=True) * weights).sum((2, 3), keepdim=True) / weights.sum()
    known = known - light
    error = (F.interpolate(delta, pair_px, mode="area") - known) * weights
    wanted = early_features(FR, young + weights * known)
    return error.abs().mean() / weights.mean(), (early_features(FR, aged) - wanted).abs().mean()


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=120.0)
@click.option(
    "--aging", type=click.Path(exists=True, path_type=Path), required=True, help="Run folder of train.age_cgan.aging."
)
@click.option("--pairs", type=click.Path(exists=True, path_type=Path), help="Folder of train.facegan.make_pairs.")
@identity_option
@reader_option
@click.option(
    "--start", type=click.Path(exists=True, path_type=Path), help="A U-Net to start from, with its adversary."
)
def main(
    data: Path,
    out: Path,
    cache: Path,
    minutes: float,
    images: int | None,
    aging: Path,
    pairs: Path | None,
    identity: Path,
    reader_files: tuple[Path, ...],
    start: Path | None,
) -> None:
    """Train the U-Net."""
    config, dims = Config(), FaceGANDims()
    torch.manual_seed(config.seed)
    where = device()
    layout = {"memory_format": torch.channels_last, "device": where}
    FR = load_identity(identity).to(**layout)
    readers = [load_reader(file).to(**layout) for file in reader_files]
    teacher = Teacher(aging / "encoder.safetensors", aging / "generator.safetensors").to(**layout)
    U, fine = UNet(dims).to(**layout), PatchDiscriminator(dims).to(**layout)
    coarse = Discriminator(AgeCGANDims(**read_header(aging / "generator.safetensors").dims))
    adversary = aging / "resume.pt"
    if not adversary.exists():
        raise CheckpointError(
            f"{aging} has no resume.pt, which holds the adversary; name the run folder of train.age_cgan.aging"
        )
    coarse.load_state_dict(torch.load(adversary, weights_only=True, map_location="cpu")["D"])
    coarse = coarse.to(**layout)
    pair_sampler = None if pairs is None else PairSampler(load_pairs(pairs), config.batch // 4, config.seed)
    parents = {"identity": identity} | {f"reader{i}": file for i, file in enumerate(reader_files)}
    parents |= {name: aging / f"{name}.safetensors" for name in ("encoder", "generator")} | {"adversary": adversary}
    if pairs is not None:
        parents["pairs"] = pairs / "pairs.npz"
    if start is not None:
        parents |= {"start": start / "facegan.safetensors", "adversaries": start / "resume.pt"}
        U.load_state_dict(load(parents["start"], "facegan")[1])
        state = torch.load(parents["adversaries"], weights_only=True, map_location="cpu")
        coarse.load_state_dict(state["coarse"])
        fine.load_state_dict(state["fine"])
    run = Run(out, config, minutes, images, dims=dims, parents=parents)
    faces = load_faces(data, STORED_PX, cache)
    val, sampler = faces.val, Sampler(faces.train, 2 * config.batch, config.seed, power=0.6)
    del faces  # a few gigabytes

    U_ema = EMA(U, config.ema_half_life_images)
    U_step = torch.optim.Adam(U.parameters(), config.rate, config.betas)
    groups = [
        {"params": coarse.parameters(), "lr": config.coarse_rate},
        {"params": fine.parameters(), "lr": config.fine_rate},
    ]
    D_step = torch.optim.Adam(groups, betas=config.betas)
    parts: dict[str, Part] = {"U": U, "coarse": coarse, "fine": fine, "U_ema": U_ema.net}
    parts |= {"U_step": U_step, "D_step": D_step, "sampler": sampler}
    if pair_sampler is not None:
        parts["pair_sampler"] = pair_sampler
    run.load_state(parts)

    larger_px = dims.sizes_px[1:] or dims.sizes_px
    warm_share = 0.0 if start is not None else config.warm_share
    totals: dict[str, list[float]] = {}
    ticks, steps = run.images_seen // config.tick_images, run.images_seen // config.batch
    is_over = run.is_over
    while not is_over:
        decay = min(1.0, max(0.02, (1 - run.progress) / 0.4))
        D_step.param_groups[0]["lr"], D_step.param_groups[1]["lr"] = (
            config.coarse_rate * decay,
            config.fine_rate * decay,
        )
        is_large = steps % config.large_every_steps == config.large_every_steps - 1
        large_px = larger_px[steps // config.large_every_steps % len(larger_px)]
        side_px, count = (large_px, config.batch // 2) if is_large else (dims.sizes_px[0], config.batch)
        pixels, ages = sampler.draw()
        stored = to_tensor(pixels).to(where)
        age = torch.from_numpy(ages).clamp(max=OLDEST_YEARS).to(where)  # as the classes
        y_target = torch.from_numpy(age_to_classes(ages)).to(where)[config.batch :][:count]
        age, target = age[:count], age[config.batch :][:count]
        source = (age + config.label_sigma_years * torch.randn_like(age)).clamp(0, OLDEST_YEARS)
        motion = random_motion(count, where)
        x = view(stored[:count], motion, side_px)
        real = view(stored[config.batch :][:count], random_motion(count, where), side_px)
        weights = weights_of(side_px, where)
        masks = [torch.from_numpy(face_mask(px).copy()).to(where) for px in (teacher.size_px, side_px)]

        is_warm = run.progress < warm_share
        # Later in evaluation mode: no batch's statistics come between two ages, and it is what the product runs.
        U.train(is_warm)
        U_step.param_groups[0]["lr"] = (config.warm_rate if is_warm else config.rate) * decay

        with autocast(where):
            aged, delta = age_faces(U, x, source, target)
        terms: dict[str, Tensor] = {}
        if not is_warm:
            is_wrong = (age - target).abs() >= config.wrong_age_gap_years
            with autocast(where):
                small, small_real, small_aged = (
                    F.interpolate(p, teacher.size_px, mode="area") for p in (x, real, aged)
                )
                coarse_scores = score(coarse, masks[0], [small_real, small_aged.detach(), small], y_target)
                fine_scores = score(fine, masks[1], [real, aged.detach(), x], y_target)
            terms["loss_coarse"] = adversary_loss(coarse_scores, is_wrong)
            terms["loss_fine"] = adversary_loss(fine_scores, is_wrong)
            loss_D = terms["loss_coarse"] + terms["loss_fine"]
            if steps % config.r1_every_steps == 0:
                penalty = r1_penalty(lambda x, y: fine(x, y).mean((1, 2)), (masks[1] * real)[::2], y_target[::2])
                loss_D = loss_D + 0.5 * config.r1_weight * config.r1_every_steps * penalty
            D_step.zero_grad()
            loss_D.backward()
            D_step.step()

        age_share = min(1.0, (run.progress - warm_share) / config.age_ramp)
        coarse.requires_grad_(False)
        fine.requires_grad_(False)
        losses: dict[str, Tensor] = {}
        with autocast(where):
            if not is_warm:
                losses["coarse"] = -config.coarse_weight * score(coarse, masks[0], [small_aged], y_target)[0].mean()
                losses["fine"] = -config.fine_weight * score(fine, masks[1], [aged], y_target)[0].mean()
                before, after = (F.interpolate(p, FR.trunk.dims.size_px, mode="area") for p in (x, aged))
                losses["identity"] = config.identity_weight * (1 - (FR(after) * FR(before)).sum(1)).mean()
                seen = shift_and_jitter(degrade(aged), shift_px=side_px // 20, colour=0.3)
                error = (read_by_all(readers, seen) - target).abs() / 10
                losses["age"] = config.age_weight * age_share * error.mean()
            mine = F.interpolate(weights * delta, teacher.size_px, mode="area")
            error = (mine - weights_of(teacher.size_px, where) * teacher(x, source, target)).abs()
            losses["teacher"] = config.teacher_weight * error.mean() / masks[0].mean()
            # Two of the terms need the U-Net once more: they take turns.
            if not is_warm and steps % 2 == 0:
                moved = random_motion(count, where)
                mirrored = view(stored[:count], moved, side_px).flip(3)
                again = U(mirrored.contiguous(memory_format=torch.channels_last), source, target).float().flip(3)
                onto = view(delta, torch.linalg.solve(motion, moved), side_px)
                losses["steady"] = config.steady_weight * ((again - onto).abs() * weights).mean() / weights.mean()
            elif not is_warm:
                back, _ = age_faces(U, aged, target, source)
                losses["cycle"] = config.cycle_weight * (back - x).abs().mean() / weights.mean()
            if pair_sampler is not None:
                young, old, young_age, old_age = (t.to(where) for t in pair_sampler())
                change, features = pair_losses(U, FR, young, old, young_age, old_age, dims.sizes_px[0])
                losses |= {"pair": config.pair_weight * change, "features": config.feature_weight * features}
        losses["delta"] = config.delta_weight * (delta.abs() * weights).mean() / weights.mean()
        U_step.zero_grad()
        sum(losses.values(), torch.zeros((), device=where)).backward()
        U_step.step()
        coarse.requires_grad_(True)
        fine.requires_grad_(True)

        steps += 1
        run.images_seen += config.batch  # a large step counts as a whole one: it costs as much
        U_ema.update(U, config.batch, run.images_seen)
        for name, term in (terms | losses).items():
            totals.setdefault(name, []).append(float(term.detach()))

        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            metrics = validate(U_ema.net, FR, readers, val, dims.sizes_px[0], out / "sheet.png")
            run.record(**{name: float(np.mean(values)) for name, values in totals.items()}, **metrics)
            totals = {}
            header = Header(
                arch="facegan",
                dims=dataclasses.asdict(dims),
                stage="facegan",
                images_seen=run.images_seen,
                dataset=DATASET,
                parents=run.parents,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "facegan.safetensors", U_ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
