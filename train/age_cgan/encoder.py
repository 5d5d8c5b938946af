"""Step 2 of Age-cGAN: the encoder, for an initial latent of a real face.

    python -m train.age_cgan.encoder --data utkface.tar --generator runs/gan/generator.safetensors \
        --identity runs/identity/identity.safetensors --out runs/encoder --minutes 20

The generator is frozen. On generated faces the loss is the paper's: the Euclidean distance of E(G(z, y)) to z. Real
faces have no z, and an encoder that only saw generated ones is lost on them; so half of each batch is real, and there
the distance is between the face and its reconstruction, in pixels and in the identity network. Writes
`encoder.safetensors` and `sheet.png`: faces of the validation split above their reconstructions.

Reference: Antipov et al. 2017, arXiv:1702.01983, section 2.2.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from faceage.ages import age_to_classes
from faceage.checkpoint import Header, load, save
from faceage.geometry import face_mask
from faceage.networks.age_cgan import AgeCGANDims, Encoder, Generator
from faceage.networks.regressors import IdentityNet
from train.augment import shift_and_jitter
from train.data import DATASET, FaceSet, Sampler, load_faces, to_tensor
from train.readers.identity import load_identity
from train.run import EMA, Run, Script, autocast, device, git_commit, run_options, sheet


@dataclass(frozen=True)
class Config:
    """Hyper-parameters."""

    batch: int = 32
    """Generated faces a step, and as many real ones."""
    rate: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.99)
    pixel_weight: float = 4.0
    """Weight of the real faces' mean squared error inside the blend mask."""
    identity_weight: float = 0.5
    """Weight of the real faces' squared distance of embeddings."""
    prior_weight: float = 0.02
    """Weight of the real faces' mean z^2."""
    ema_half_life_images: int = 20_000
    tick_images: int = 12_800
    seed: int = 2


def losses(
    E: Encoder, G: Generator, identity: IdentityNet, mask: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the reconstructions of real faces and each term of their loss."""
    z = E(x).float()
    made = G(z, y).float()
    pixel = ((made - x).square() * mask / mask.mean()).mean()
    distance = (identity(made) - identity(x)).square().sum(1).mean()
    return made, {"pixel": pixel, "identity": distance, "prior": z.square().mean()}


@torch.inference_mode()
def validate(
    E: Encoder, G: Generator, identity: IdentityNet, mask: torch.Tensor, faces: FaceSet, path: Path
) -> dict[str, float]:
    """Return the terms over the validation split, and write the sheet."""
    where = mask.device
    sums: dict[str, float] = {}
    for start in range(0, len(faces), 256):
        x = to_tensor(faces.pixels[start : start + 256]).to(where)
        y = torch.from_numpy(age_to_classes(faces.ages[start : start + 256])).to(where)
        made, terms = losses(E, G, identity, mask, x, y)
        for name, value in terms.items():
            sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) * len(x) / len(faces)
        if start == 0:
            n = min(12, len(x) // 2)
            sheet([x[:n], made[:n], x[n : 2 * n], made[n : 2 * n]], path)
    return sums


@click.command(cls=Script, context_settings={"show_default": True})
@run_options(minutes=20.0)
@click.option(
    "--generator", type=click.Path(exists=True, path_type=Path), required=True, help="From train.age_cgan.gan."
)
@click.option(
    "--identity", type=click.Path(exists=True, path_type=Path), required=True, help="From train.readers.identity."
)
def main(
    data: Path, out: Path, cache: Path, minutes: float, images: int | None, generator: Path, identity: Path
) -> None:
    """Train the encoder."""
    config = Config()
    torch.manual_seed(config.seed)
    where = device()
    header, weights = load(generator, "age-cgan-generator")
    dims = AgeCGANDims(**header.dims)
    G = Generator(dims).eval().requires_grad_(False).to(where, memory_format=torch.channels_last)
    G.load_state_dict(weights)
    FR = load_identity(identity).to(where, memory_format=torch.channels_last)
    run = Run(out, config, minutes, images, dims=dims, parents={"gan": generator, "identity": identity})
    faces = load_faces(data, dims.size_px, cache)
    val = faces.val
    mask = torch.tensor(face_mask(dims.size_px)).to(where)
    sampler = Sampler(faces.train, config.batch, config.seed, power=0.5)

    E = Encoder(dims).to(where, memory_format=torch.channels_last)
    ema = EMA(E, config.ema_half_life_images)
    step = torch.optim.Adam(E.parameters(), config.rate, config.betas)
    parts = {"E": E, "ema": ema.net, "step": step, "sampler": sampler}
    run.load_state(parts)

    ticks, latent_errors = run.images_seen // config.tick_images, []
    is_over = run.is_over
    while not is_over:
        step.param_groups[0]["lr"] = config.rate * (0.5 + 0.5 * math.cos(math.pi * run.progress)) + 1e-6
        x, y, _ = sampler()
        x, y = x.to(where, memory_format=torch.channels_last), y.to(where)
        z = torch.randn(len(x), dims.latent, device=where)
        with autocast(where):
            with torch.no_grad():
                generated = G(z, y[torch.randperm(len(y))])
            latent_error = (E(shift_and_jitter(generated, shift_px=1, colour=0.05)).float() - z).square().mean()
            _, terms = losses(E, G, FR, mask, x, y)
        loss = (
            latent_error
            + config.pixel_weight * terms["pixel"]
            + config.identity_weight * terms["identity"]
            + config.prior_weight * terms["prior"]
        )
        step.zero_grad()
        loss.backward()
        step.step()
        run.images_seen += len(x)
        ema.update(E, len(x), run.images_seen)
        latent_errors.append(float(latent_error.detach()))
        is_over = run.is_over  # read once a step: the last one must be saved
        if run.images_seen // config.tick_images > ticks or is_over:
            ticks = run.images_seen // config.tick_images
            metrics = validate(ema.net, G, FR, mask, val, out / "sheet.png")
            run.record(latent_error=float(np.mean(latent_errors)), **metrics)
            latent_errors.clear()
            header = Header(
                arch="age-cgan-encoder",
                dims=dataclasses.asdict(dims),
                stage="encoder",
                images_seen=run.images_seen,
                dataset=DATASET,
                parents=run.parents,
                train_config=run.config,
                metrics=metrics,
                git_commit=git_commit(),
            )
            save(out / "encoder.safetensors", ema.net.state_dict(), header)
            run.save_state(parts)


if __name__ == "__main__":
    main()
