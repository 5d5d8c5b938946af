"""Step 1 of Age-cGAN: generator and discriminator, conditioned on age.

    python -m train.age_cgan.gan --data utkface.tar --out runs/gan --minutes 60 \
        --identity runs/identity/identity.safetensors

Writes `generator.safetensors` (averaged weights), the input of `train.age_cgan.encoder`, and `sheet.png`: each z at the
six age classes, three z a row. With `--identity`, one z is taught to stay one person at every age in the last part of
the run.

The discriminator also sees real faces with a wrong age (Reed et al. 2016) as fakes: only then must it look at y.

Reference: Antipov et al. 2017, arXiv:1702.01983; hinge loss and spectral norm: Miyato et al. 2018, arXiv:1802.05957.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F

from faceage.checkpoint import Header, save
from faceage.networks.age_cgan import AgeCGANDims, Discriminator, Generator
from train.augment import shift_and_jitter
from train.data import DATASET, Sampler, load_faces
from train.readers.identity import load_identity
from train.run import EMA, Run, Script, autocast, device, git_commit, run_options, sheet


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 32
    generator_rate: float = 2e-4
    discriminator_rate: float = 4e-4
    betas: tuple[float, float] = (0.0, 0.99)
    wrong_age_weight: float = 0.5
    """Share of the fake side of D's loss that real faces with a wrong age make up."""
    wrong_age_gap_years: float = 15.0
    """Only ages at least this far apart are called wrong: labels are noisy and neighbours look alike."""
    identity_weight: float = 2.0
    """With an identity network: weight of the squared distance between the embeddings of one z at two ages."""
    identity_start: float = 0.75
    """Share of the budget after which that term is on: it costs half as much again as all the rest."""
    ema_half_life_images: int = 20_000
    tick_images: int = 12_800
    seed: int = 1


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=45.0)
@click.option(
    "--identity", type=click.Path(exists=True, path_type=Path), help="From train.readers.identity: keep who z is."
)
@click.option("--size", "size_px", type=click.Choice(["64", "128"]), default="64", help="Side of the faces, px.")
@click.option("--dry-run", is_flag=True, help="Print the configuration and stop.")
def main(
    data: Path,
    out: Path,
    cache: Path,
    minutes: float,
    images: int | None,
    identity: Path | None,
    size_px: str,
    dry_run: bool,
) -> None:
    """Train the conditional GAN."""
    config = Config()
    dims = AgeCGANDims()
    if size_px == "128":
        dims = AgeCGANDims(
            size_px=128,
            generator_channels=(384, 192, 96, 64, 48, 24),
            discriminator_channels=(24, 48, 96, 192, 384),
            encoder_channels=(24, 48, 96, 192, 384),
        )
    click.echo(f"{config}\n{dims}", err=True)
    if dry_run:
        return
    torch.manual_seed(config.seed)
    where = device()
    FR = None if identity is None else load_identity(identity).to(where, memory_format=torch.channels_last)
    parents = {} if identity is None else {"identity": identity}
    run = Run(out, config, minutes, images, dims=dims, parents=parents)
    sampler = Sampler(load_faces(data, dims.size_px, cache).train, config.batch, config.seed)

    layout = {"memory_format": torch.channels_last, "device": where}
    G, D = Generator(dims).to(**layout), Discriminator(dims).to(**layout)
    G_ema = EMA(G, config.ema_half_life_images)
    G_step = torch.optim.Adam(G.parameters(), config.generator_rate, config.betas)
    D_step = torch.optim.Adam(D.parameters(), config.discriminator_rate, config.betas)
    fixed = torch.Generator().manual_seed(config.seed)
    grid_z = torch.randn(12, 1, dims.latent, generator=fixed).expand(-1, dims.classes, -1).flatten(0, 1).to(where)
    grid_y = torch.eye(dims.classes).repeat(12, 1).to(where)

    parts = {"G": G, "D": D, "G_ema": G_ema.net, "G_step": G_step, "D_step": D_step, "sampler": sampler}
    run.load_state(parts)

    totals, steps = torch.zeros(4), 0
    ticks = run.images_seen // config.tick_images
    is_over = run.is_over
    while not is_over:
        # Linear decay over the last 30 % of the budget: the sheet sharpens and the average settles.
        decay = min(1.0, max(0.02, (1 - run.progress) / 0.3))
        G_step.param_groups[0]["lr"], D_step.param_groups[0]["lr"] = (
            config.generator_rate * decay,
            config.discriminator_rate * decay,
        )
        x, y, ages = sampler()
        x, y = x.to(**layout), y.to(where)
        other = torch.randperm(len(x))
        ages_t = torch.from_numpy(ages)
        is_wrong = ((ages_t - ages_t[other]).abs() >= config.wrong_age_gap_years)[: len(x) // 2].to(where)
        z = torch.randn(len(x), dims.latent, device=where)
        y_fake = y[torch.randperm(len(x))]

        with autocast(where):
            fake = G(z, y_fake)
            real_view = shift_and_jitter(x)
            # One pass a kind: the discriminator's batch deviation must not mix real and generated faces.
            real = D(real_view, y).float()
            made = D(shift_and_jitter(fake.detach()), y_fake).float()
            wrong = D(real_view[: len(x) // 2], y[other][: len(x) // 2]).float()
        loss_wrong = (F.relu(1 + wrong) * is_wrong).sum() / is_wrong.sum().clamp(min=1)
        loss_D = (
            F.relu(1 - real).mean()
            + (1 - config.wrong_age_weight) * F.relu(1 + made).mean()
            + config.wrong_age_weight * loss_wrong
        )
        D_step.zero_grad()
        loss_D.backward()
        D_step.step()

        D.requires_grad_(False)
        with autocast(where):
            score = D(shift_and_jitter(fake), y_fake).float()
            loss_G = -score.mean()
            if FR is not None and run.progress >= config.identity_start:
                # One z is one person at any age: half of the batch again, at ages drawn anew.
                half = len(x) // 2
                embeddings = FR(fake[:half]) - FR(G(z[:half], y[:half]))
                loss_G = loss_G + config.identity_weight * embeddings.square().sum(1).mean()
        G_step.zero_grad()
        loss_G.backward()
        G_step.step()
        D.requires_grad_(True)

        run.images_seen += len(x)
        G_ema.update(G, len(x), run.images_seen)
        totals += torch.stack([loss_D, real.mean(), made.mean(), wrong.mean()]).detach().cpu()
        steps += 1

        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            run.record(**dict(zip(("loss_D", "real", "fake", "wrong_age"), totals / steps, strict=True)))
            totals, steps = torch.zeros(4), 0
            with torch.no_grad():
                faces = G_ema.net(grid_z, grid_y).view(12, dims.classes, 3, dims.size_px, dims.size_px)
            sheet([torch.cat(list(faces[i : i + 3])) for i in range(0, 12, 3)], out / "sheet.png")
            header = Header(
                arch="age-cgan-generator",
                dims=dataclasses.asdict(dims),
                stage="gan",
                images_seen=run.images_seen,
                dataset=DATASET,
                parents=run.parents,
                train_config=run.config,
                git_commit=git_commit(),
            )
            save(out / "generator.safetensors", G_ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
