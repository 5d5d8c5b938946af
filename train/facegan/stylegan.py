"""FaceGAN, step 1: a StyleGAN2 conditioned on age, in which one z is one person at every age.

    python -m train.facegan.stylegan --data utkface.tar --identity runs/identity/identity.safetensors \
        --reader runs/reader64/age-estimator.safetensors --reader runs/reader32/age-estimator.safetensors \
        --out runs/stylegan --minutes 60 --size 64

Every batch holds each z at two ages. The adversary sees both, and real faces with a wrong age as fakes; an identity
network holds the two together, estimators say whether the ages are right. Writes `stylegan.safetensors` (averaged
weights), the input of `train.facegan.make_pairs`, and `sheet.png`: rows are identities, columns ages 10 to 80.

Reference: Karras et al., CVPR 2020 (weight demodulation, R1 every sixteenth step); Zhao et al.: Differentiable
Augmentation, NeurIPS 2020; Reed et al. 2016 (wrong labels as fakes).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F

from faceage.ages import OLDEST_YEARS, age_to_classes
from faceage.checkpoint import Header, load, save
from faceage.networks.stylegan import StyleDiscriminator, StyleGANDims, StyleGenerator
from train.augment import degrade, shift_and_jitter
from train.data import DATASET, Sampler, load_faces
from train.losses import r1_penalty, read_by_all
from train.readers.age_estimator import load_reader, reader_option
from train.readers.identity import identity_option, load_identity
from train.run import EMA, Run, Script, autocast, device, git_commit, run_options, sheet

SHEET_AGES = (10, 20, 30, 40, 50, 60, 70, 80)
WIDTHS = {64: (192, 192, 128, 64, 32), 128: StyleGANDims().widths, 256: (*StyleGANDims().widths, 32)}
"""Side of the faces -> channels. 64 px is for a CPU: some 40 faces/s on one core."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 32
    """Faces a step: half as many z, each at two ages."""
    rate: float = 2e-3
    betas: tuple[float, float] = (0.0, 0.99)
    r1_weight: float = 1.0
    r1_every_steps: int = 16
    """The gradient penalty is taken this seldom, and weighs as much more then (lazy regularisation)."""
    wrong_age_gap_years: float = 15.0
    """Only ages at least this far apart are called wrong: labels are noisy and neighbours look alike."""
    wrong_age_weight: float = 0.5
    identity_weight: float = 1.0
    """Weight of 1 - cosine between two ages of one z."""
    age_weight: float = 0.5
    """Weight of the estimators' mean error, in decades."""
    guidance_start: float = 0.1
    """Share of the budget after which these two terms begin: before, there are no faces to be read."""
    ema_half_life_images: int = 10_000
    tick_images: int = 9_600
    seed: int = 7


def load_stylegan(path: Path) -> StyleGenerator:
    """Load a generator, frozen, in evaluation mode."""
    header, weights = load(path, "stylegan")
    net = StyleGenerator(StyleGANDims(**header.dims))
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=60.0)
@identity_option
@reader_option
@click.option("--size", "size_px", type=click.Choice([str(s) for s in WIDTHS]), default="128", help="Side, px.")
def main(
    data: Path,
    out: Path,
    cache: Path,
    minutes: float,
    images: int | None,
    identity: Path,
    reader_files: tuple[Path, ...],
    size_px: str,
) -> None:
    """Train the conditional StyleGAN."""
    config = Config()
    dims = StyleGANDims(size_px=int(size_px), widths=WIDTHS[int(size_px)])
    torch.manual_seed(config.seed)
    where = device()
    layout = {"memory_format": torch.channels_last, "device": where}
    FR = load_identity(identity).to(**layout)
    readers = [load_reader(file).to(**layout) for file in reader_files]
    parents = {"identity": identity} | {f"reader{i}": file for i, file in enumerate(reader_files)}
    run = Run(out, config, minutes, images, dims=dims, parents=parents)
    sampler = Sampler(load_faces(data, dims.size_px, cache).train, config.batch, config.seed)

    G, D = StyleGenerator(dims).to(**layout), StyleDiscriminator(dims).to(**layout)
    G_ema = EMA(G, config.ema_half_life_images)
    G_step = torch.optim.Adam(G.parameters(), config.rate, config.betas)
    # Lazily regularised: the moments must forget in the same number of images (Karras et al. 2020, appendix B).
    share = config.r1_every_steps / (config.r1_every_steps + 1)
    D_step = torch.optim.Adam(D.parameters(), config.rate * share, tuple(b**share for b in config.betas))
    fixed = torch.Generator().manual_seed(config.seed)
    grid_z = torch.randn(8, dims.latent, generator=fixed).to(where)

    parts = {"G": G, "D": D, "G_ema": G_ema.net, "G_step": G_step, "D_step": D_step, "sampler": sampler}
    run.load_state(parts)

    totals: dict[str, float] = {}
    steps, ticks = 0, run.images_seen // config.tick_images
    is_over = run.is_over
    while not is_over:
        decay = min(1.0, max(0.05, (1 - run.progress) / 0.2))
        G_step.param_groups[0]["lr"], D_step.param_groups[0]["lr"] = config.rate * decay, config.rate * share * decay
        pixels, y, ages = sampler()
        x, y = pixels.to(**layout), y.to(where)
        age = torch.from_numpy(ages).clamp(max=OLDEST_YEARS).to(where)
        # Ages as the data has them, in another order, and every z twice.
        other = torch.randperm(len(x))
        y_fake, age_fake = y[other], age[other]
        z = torch.randn(len(x) // 2, dims.latent, device=where).repeat(2, 1)
        is_wrong = ((age - age_fake).abs() >= config.wrong_age_gap_years)[: len(x) // 2]

        with autocast(where):
            fake = G(z, y_fake).float()
            real_view = shift_and_jitter(x)
            # One pass a kind: the discriminator's batch deviation must not mix real and generated faces.
            real = D(real_view, y).float()
            made = D(shift_and_jitter(fake.detach()), y_fake).float()
            wrong = D(real_view[: len(x) // 2], y_fake[: len(x) // 2]).float()
        loss_wrong = (F.softplus(wrong) * is_wrong).sum() / is_wrong.sum().clamp(min=1)
        w = config.wrong_age_weight
        loss_D = F.softplus(-real).mean() + (1 - w) * F.softplus(made).mean() + w * loss_wrong
        terms = {"loss_D": loss_D, "real": real.mean(), "fake": made.mean(), "wrong": wrong.mean()}
        # Counted in images, so that a resumed run has it at the same steps.
        if run.images_seen // config.batch % config.r1_every_steps == 0:
            penalty = r1_penalty(D, real_view[::2], y[::2])
            loss_D = loss_D + 0.5 * config.r1_weight * config.r1_every_steps * penalty
        D_step.zero_grad()
        loss_D.backward()
        D_step.step()

        D.requires_grad_(False)
        with autocast(where):
            loss_G = F.softplus(-D(shift_and_jitter(fake), y_fake).float()).mean()
            terms["loss_G"] = loss_G
            if run.progress >= config.guidance_start:
                small = F.interpolate(fake, FR.trunk.dims.size_px, mode="area")
                first, second = FR(small).chunk(2)
                terms["identity"] = (1 - (first * second).sum(1)).mean()
                view = shift_and_jitter(degrade(fake), colour=0.3)
                terms["age"] = (read_by_all(readers, view) - age_fake).abs().mean() / 10
                loss_G = loss_G + config.identity_weight * terms["identity"] + config.age_weight * terms["age"]
        G_step.zero_grad()
        loss_G.backward()
        G_step.step()
        D.requires_grad_(True)

        run.images_seen += len(x)
        G_ema.update(G, len(x), run.images_seen)
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + float(term.detach())
        steps += 1

        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            run.record(**{name: total / steps for name, total in totals.items()})
            totals, steps = {}, 0
            grid_y = torch.from_numpy(age_to_classes(np.array(SHEET_AGES, np.float32))).to(where)
            with torch.no_grad():
                rows = [G_ema.net(row.expand(len(SHEET_AGES), -1), grid_y) for row in grid_z]
            sheet(rows, out / "sheet.png")
            header = Header(
                arch="stylegan",
                dims=dataclasses.asdict(dims),
                stage="stylegan",
                images_seen=run.images_seen,
                dataset=DATASET,
                parents=run.parents,
                train_config=run.config,
                git_commit=git_commit(),
            )
            save(out / "stylegan.safetensors", G_ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
