"""Step 3 of training: encoder and generator together, on what the product does with a real face.

    python -m train.age_cgan.aging --data utkface.tar --gan runs/gan --encoder runs/encoder/encoder.safetensors \
        --identity runs/identity/identity.safetensors --reader runs/reader64/age-estimator.safetensors \
        --reader runs/reader32/age-estimator.safetensors --out runs/aging --minutes 60

The first two steps give a generator that ages faces of its own and an encoder that finds a real face among them; how
old a *real* face looks after `x + mask * (G(z, target) - G(z, source))` was in no loss. Here it is, as the product
makes it but for the optimization of z, its gain, and the smaller change where contrast is low:

- an adversary, started from the GAN's, sees these faces beside real ones of the target age, inside the mask only (hair
  does not change, and would give every aged face away). It also sees faces with a wrong age as fakes, the unchanged
  source face among them;
- G(z, source) must still be the face, in pixels and in the identity network;
- the aged face must still be the person;
- an age loss, small and late, through several dissimilar estimators at two resolutions, behind random shifts,
  brightness and blur. A lone estimator is fooled within minutes, by patterns that nobody else takes for age.

Writes `generator.safetensors`, `encoder.safetensors` and `sheet.png`: validation faces, then each at 20, 40, 60 and 80.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from faceage.agers.age_cgan import CHROMA_BLUR, CHROMA_SHARE, LUMA, feature_shares
from faceage.ages import OLDEST_YEARS, age_to_classes
from faceage.checkpoint import Header, load, save
from faceage.errors import CheckpointError
from faceage.geometry import face_mask
from faceage.networks.age_cgan import AgeCGANDims, Discriminator, Encoder, Generator
from faceage.networks.regressors import AgeEstimator
from train.augment import degrade, shift_and_jitter
from train.data import DATASET, FaceSet, Sampler, load_faces, to_tensor
from train.losses import read_by_all
from train.readers.age_estimator import load_reader, reader_option
from train.readers.identity import identity_option, load_identity
from train.run import EMA, Run, Script, autocast, device, git_commit, run_options, sheet

SHEET_AGES = (20, 40, 60, 80)


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 32
    """Faces to age a step, and as many real ones for the adversary."""
    rate: float = 2e-4
    discriminator_rate: float = 4e-4
    betas: tuple[float, float] = (0.0, 0.99)
    latent_noise: float = 0.3
    """Standard deviation that is added to E(x): the product optimizes z from there."""
    wrong_age_gap_years: float = 10.0
    """Only ages at least this far apart are called wrong: labels are noisy and neighbours look alike."""
    pixel_weight: float = 4.0
    """Weight of the mean squared error of the reconstruction inside the mask."""
    reconstruction_identity_weight: float = 0.5
    identity_weight: float = 0.25
    """Weight of 1 - cosine between the face and the aged face."""
    delta_weight: float = 0.1
    """Weight of the mean absolute change."""
    prior_weight: float = 0.02
    age_weight: float = 0.8
    """Weight of the estimators' error, in decades, once it is fully on."""
    age_start: float = 0.25
    """Share of the budget after which the age loss begins; it is fully on a quarter of the budget later."""
    ema_half_life_images: int = 10_000
    tick_images: int = 9_600
    seed: int = 6


def calm(delta: Tensor) -> Tensor:
    """Keep of differences [N, 3, S, S] what the product keeps: `faceage.agers.age_cgan._calm`, differentiable."""
    luma = (delta * torch.from_numpy(LUMA).to(delta.device)[:, None, None]).sum(1, keepdim=True)
    side = delta.shape[-1]
    # The blur of a row as a matrix [S, S], border pixels repeated: far cheaper than a convolution a channel.
    place = torch.arange(side, device=delta.device)
    offsets = torch.arange(-side, side + 1, device=delta.device)
    weights = torch.exp(-0.5 * (offsets / (CHROMA_BLUR * side)) ** 2)
    source = (place[:, None] + offsets).clamp(0, side - 1)
    blur = delta.new_zeros(side, side).scatter_add(1, source, (weights / weights.sum()).expand(side, -1))
    mask = torch.tensor(face_mask(side)).to(delta.device)
    chroma = blur @ (delta - luma) @ blur.T
    luma = luma - (luma * mask).sum((2, 3), keepdim=True) / mask.sum()
    shares = torch.from_numpy(feature_shares(side)).to(delta.device)
    return (luma + CHROMA_SHARE * chroma) * shares


def age_faces(
    E: Encoder, G: Generator, mask: Tensor, x: Tensor, source: Tensor, target: Tensor, noise: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (aged faces, reconstructions, changes, latents) for age classes [N, K]."""
    z = E(x).float()
    made = G((z + noise * torch.randn_like(z)).repeat(2, 1), torch.cat([source, target])).float()
    reconstruction, aged = made.chunk(2)
    delta = calm(aged - reconstruction) * mask
    return x + delta, reconstruction, delta, z


@torch.inference_mode()
def validate(
    E: Encoder, G: Generator, readers: list[AgeEstimator], mask: Tensor, faces: FaceSet, path: Path
) -> dict[str, float]:
    """Return what the loss's own estimators read for faces of 20 to 35 at 60, and write the sheet."""
    where = mask.device
    young = np.flatnonzero((faces.ages >= 20) & (faces.ages <= 35))[:256]
    x = to_tensor(faces.pixels[young]).to(where)
    source = torch.from_numpy(age_to_classes(faces.ages[young])).to(where)
    target = torch.from_numpy(age_to_classes(np.full(len(young), 60, np.float32))).to(where)
    aged, reconstruction, delta, _ = age_faces(E, G, mask, x, source, target)
    shown = np.linspace(0, len(faces) - 1, 12).astype(int)
    rows = [to_tensor(faces.pixels[shown]).to(where)]
    source = torch.from_numpy(age_to_classes(faces.ages[shown])).to(where)
    for age in SHEET_AGES:
        target = torch.from_numpy(age_to_classes(np.full(len(shown), age, np.float32))).to(where)
        rows.append(age_faces(E, G, mask, rows[0], source, target)[0])
    sheet(rows, path, scale=2)
    return {
        "val_read_at_60": float(read_by_all(readers, aged).mean()),
        "val_pixel": float(((reconstruction - x).square() * mask / mask.mean()).mean()),
        "val_delta": float(delta.abs().mean()),
    }


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=60.0)
@click.option(
    "--gan", type=click.Path(exists=True, path_type=Path), required=True, help="Run folder of train.age_cgan.gan."
)
@click.option(
    "--encoder", type=click.Path(exists=True, path_type=Path), required=True, help="From train.age_cgan.encoder."
)
@identity_option
@reader_option
def main(
    data: Path,
    out: Path,
    cache: Path,
    minutes: float,
    images: int | None,
    gan: Path,
    encoder: Path,
    identity: Path,
    reader_files: tuple[Path, ...],
) -> None:
    """Train the encoder and the generator to age real faces."""
    config = Config()
    torch.manual_seed(config.seed)
    where = device()
    layout = {"memory_format": torch.channels_last, "device": where}
    header, weights = load(gan / "generator.safetensors", "age-cgan-generator")
    dims = AgeCGANDims(**header.dims)
    G, E, D = Generator(dims), Encoder(dims), Discriminator(dims)
    G.load_state_dict(weights)
    E.load_state_dict(load(encoder, "age-cgan-encoder")[1])
    discriminator = gan / "resume.pt"
    if not discriminator.exists():
        raise CheckpointError(
            f"{gan} has no resume.pt, which holds the discriminator; name the run folder of train.age_cgan.gan"
        )
    D.load_state_dict(torch.load(discriminator, weights_only=True, map_location="cpu")["D"])
    # In evaluation mode batch norm is what the product runs: no batch's statistics come between the two ages.
    G, E, D = G.to(**layout).eval(), E.to(**layout).eval(), D.to(**layout)
    FR = load_identity(identity).to(**layout)
    readers = [load_reader(file).to(**layout) for file in reader_files]
    faces = load_faces(data, dims.size_px, cache)
    val = faces.val
    mask = torch.tensor(face_mask(dims.size_px)).to(where)
    parents = {"gan": gan / "generator.safetensors", "discriminator": discriminator}
    parents |= {"encoder": encoder, "identity": identity}
    parents |= {f"reader{i}": file for i, file in enumerate(reader_files)}
    run = Run(out, config, minutes, images, dims=dims, parents=parents)
    sampler = Sampler(faces.train, 2 * config.batch, config.seed, power=0.6)

    G_ema, E_ema = EMA(G, config.ema_half_life_images), EMA(E, config.ema_half_life_images)
    step = torch.optim.Adam([*G.parameters(), *E.parameters()], config.rate, config.betas)
    D_step = torch.optim.Adam(D.parameters(), config.discriminator_rate, config.betas)
    parts = {"G": G, "E": E, "D": D, "G_ema": G_ema.net, "E_ema": E_ema.net, "step": step, "D_step": D_step}
    parts["sampler"] = sampler
    run.load_state(parts)

    totals: dict[str, float] = {}
    steps, ticks = 0, run.images_seen // config.tick_images
    is_over = run.is_over
    while not is_over:
        decay = min(1.0, max(0.02, (1 - run.progress) / 0.4))
        step.param_groups[0]["lr"], D_step.param_groups[0]["lr"] = (
            config.rate * decay,
            config.discriminator_rate * decay,
        )
        pixels, classes, ages = sampler()
        x, real = pixels.to(**layout).chunk(2)
        y, y_target = classes.to(where).chunk(2)
        age, target = torch.from_numpy(ages).clamp(max=OLDEST_YEARS).to(where).chunk(2)  # as the classes

        with autocast(where):
            aged, reconstruction, delta, z = age_faces(E, G, mask, x, y, y_target, config.latent_noise)
            aged = aged.contiguous(memory_format=torch.channels_last)
            # One pass a kind: the discriminator's batch deviation must not mix real and generated faces.
            score_real = D(mask * shift_and_jitter(real), y_target).float()
            score_aged = D(mask * shift_and_jitter(aged.detach()), y_target).float()
            score_wrong = D(mask * shift_and_jitter(x), y_target).float()
        is_wrong = (age - target).abs() >= config.wrong_age_gap_years
        loss_D = (
            F.relu(1 - score_real).mean()
            + 0.5 * F.relu(1 + score_aged).mean()
            + 0.5 * (F.relu(1 + score_wrong) * is_wrong).sum() / is_wrong.sum().clamp(min=1)
        )
        D_step.zero_grad()
        loss_D.backward()
        D_step.step()

        age_share = min(1.0, max(0.0, (run.progress - config.age_start) / 0.25))
        D.requires_grad_(False)
        with autocast(where):
            terms = {"adversary": -D(mask * shift_and_jitter(aged), y_target).float().mean()}
            who = FR(x)
            terms["identity"] = config.identity_weight * (1 - (FR(aged) * who).sum(1)).mean()
            terms["rec_identity"] = (
                config.reconstruction_identity_weight * (FR(reconstruction) - who).square().sum(1).mean()
            )
            if age_share > 0:
                view = shift_and_jitter(degrade(aged), shift_px=3, colour=0.3)
                error = (read_by_all(readers, view) - target).abs() / 10
                terms["age"] = config.age_weight * age_share * error.mean()
        terms["rec_pixel"] = config.pixel_weight * ((reconstruction - x).square() * mask / mask.mean()).mean()
        terms["delta"] = config.delta_weight * delta.abs().mean()
        terms["prior"] = config.prior_weight * z.square().mean()
        step.zero_grad()
        sum(terms.values(), torch.zeros((), device=where)).backward()
        step.step()
        D.requires_grad_(True)

        run.images_seen += len(x)
        G_ema.update(G, len(x), run.images_seen)
        E_ema.update(E, len(x), run.images_seen)
        terms |= {"real": score_real.mean(), "aged": score_aged.mean(), "wrong": score_wrong.mean(), "loss_D": loss_D}
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + float(term.detach())
        steps += 1

        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            metrics = validate(E_ema.net, G_ema.net, readers, mask, val, out / "sheet.png")
            run.record(**{name: total / steps for name, total in totals.items()}, **metrics)
            totals, steps = {}, 0
            header = Header(
                arch="age-cgan-generator",
                dims=dataclasses.asdict(dims),
                stage="aging",
                images_seen=run.images_seen,
                dataset=DATASET,
                parents=run.parents,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            sha = save(out / "generator.safetensors", G_ema.net.state_dict(), header)
            header = dataclasses.replace(
                header, arch="age-cgan-encoder", parents={"gan": sha, "identity": run.parents["identity"]}
            )
            save(out / "encoder.safetensors", E_ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
