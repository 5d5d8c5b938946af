r"""The shape of the latent objective, measured once, so that optimizing it takes fewer evaluations.

    python -m train.age_cgan.curvature --data utkface.tar --generator runs/aging/generator.safetensors \
        --encoder runs/aging/encoder.safetensors --identity runs/identity/identity.safetensors --out runs/curvature

Directions of z differ 200-fold in how much they change a face. The objective's Gauss-Newton curvature

    H = 2 identity_weight J_e^T J_e + 2 pixel_weight J_x^T W J_x + 2 prior_weight I / Z

with the Jacobians J_e and J_x of embedding and face with respect to z, is averaged over training faces (J by central
differences). C with C C^T = H^-1 is stored in a copy of the encoder's checkpoint as `latent_root`; the step of
`networks.latent` then works on u with z = start + C u.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from faceage.agers.latent import LatentConfig
from faceage.ages import age_to_classes
from faceage.checkpoint import load, save
from faceage.geometry import face_mask
from faceage.networks.age_cgan import AgeCGANDims, Encoder, Generator
from train.data import load_faces, to_tensor
from train.readers.identity import load_identity
from train.run import Script

STEP = 0.05
"""Step of the differences, in units of z."""


@click.command(cls=Script, context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="UTKFace, a tar or a folder.")
@click.option(
    "--generator", type=click.Path(exists=True, path_type=Path), required=True, help="From train.age_cgan.aging."
)
@click.option(
    "--encoder", type=click.Path(exists=True, path_type=Path), required=True, help="From train.age_cgan.aging."
)
@click.option(
    "--identity", type=click.Path(exists=True, path_type=Path), required=True, help="From train.readers.identity."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for encoder.safetensors.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/cache"), help="Aligned faces.")
@click.option("--faces", "count", type=click.IntRange(1), default=64, help="Training faces, drawn at random.")
def main(data: Path, generator: Path, encoder: Path, identity: Path, out: Path, cache: Path, count: int) -> None:
    """Store the root of the inverse curvature with the encoder."""
    header, weights = load(generator, "age-cgan-generator")
    dims = AgeCGANDims(**header.dims)
    G, E, FR = Generator(dims).eval(), Encoder(dims).eval(), load_identity(identity)
    G.load_state_dict(weights)
    encoder_header, encoder_weights = load(encoder, "age-cgan-encoder")
    E.load_state_dict(encoder_weights)
    config = LatentConfig()
    train = load_faces(data, dims.size_px, cache).train
    faces = train.rows(np.random.default_rng(0).choice(len(train), min(count, len(train)), replace=False))
    mask = torch.tensor(face_mask(dims.size_px))
    pixel_scale = (config.pixel_weight * mask / mask.mean() / (3 * mask.numel())).sqrt()
    steps = STEP * torch.cat([torch.eye(dims.latent), -torch.eye(dims.latent)])
    H = 2 * config.prior_weight / dims.latent * torch.eye(dims.latent, dtype=torch.float64)
    with torch.inference_mode():
        z_NZ, y_NK = E(to_tensor(faces.pixels)), torch.from_numpy(age_to_classes(faces.ages))
        for z, y in zip(z_NZ, y_NK, strict=True):
            x = G(z + steps, y.expand(len(steps), -1))
            for value, scale in ((x, pixel_scale), (FR(x), config.identity_weight**0.5)):
                plus, minus = (value * scale).flatten(1).double().chunk(2)
                J = (plus - minus) / (2 * STEP)  # [Z, outputs]
                H += 2 * J @ J.T / len(faces)
    encoder_weights["latent_root"] = torch.linalg.cholesky(torch.linalg.inv(H)).float()
    out.mkdir(parents=True, exist_ok=True)
    save(out / "encoder.safetensors", encoder_weights, encoder_header)
    spread = torch.linalg.eigvalsh(H)
    click.echo(f"curvature from {float(spread[0]):.4f} to {float(spread[-1]):.4f}")


if __name__ == "__main__":
    main()
