"""FaceGAN, step 2: synthetic pairs, the same person at several ages.

    python -m train.facegan.make_pairs --generator runs/stylegan/stylegan.safetensors \
        --identity runs/identity/identity.safetensors --reader runs/reader64/age-estimator.safetensors \
        --reader runs/reader32/age-estimator.safetensors --out runs/pairs --people 4000

Each z of `train.facegan.stylegan` is drawn at `AGES`. Pictures that the estimators read as another age, or in which the
identity network does not see the person of the others, are left out, and people with fewer than two pictures left.
The same seed and checkpoints give the same set. Writes `pairs.npz`, `manifest.json` and `sheet.png`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from faceage.ages import age_to_classes
from faceage.checkpoint import sha256_of
from faceage.errors import CheckpointError
from train.data import to_tensor
from train.facegan.stylegan import load_stylegan
from train.losses import read_by_all
from train.readers.age_estimator import load_reader, reader_option
from train.readers.identity import identity_option, load_identity
from train.run import Script, device, sheet

AGES = (10, 20, 30, 40, 50, 60, 70, 80)
BATCH = 16
"""People drawn at once."""


@dataclass(frozen=True)
class Pairs:
    """Synthetic people at several ages."""

    pixels: np.ndarray
    """uint8 [N, S, S, 3], RGB."""
    people: np.ndarray
    """int64 [N], whose picture it is; sorted, two or more of each."""
    ages: np.ndarray
    """float32 [N], the age in years that it was drawn at."""


def load_pairs(folder: Path) -> Pairs:
    """Load what this script wrote.

    Raises:
        CheckpointError: if the file is not there.
    """
    file = folder / "pairs.npz"
    if not file.exists():
        raise CheckpointError(f"{folder} has no pairs.npz; name the --out of train.facegan.make_pairs")
    with np.load(file, allow_pickle=False) as data:
        return Pairs(data["pixels"], data["people"], data["ages"])


class PairSampler:
    """Endless random pairs: two pictures of one person, in either order. A resumed run goes on in the sequence."""

    def __init__(self, pairs: Pairs, batch: int, seed: int) -> None:
        self.pairs, self.batch = pairs, batch
        self.first = np.flatnonzero(np.diff(pairs.people, prepend=-1))
        """Where each person's pictures begin."""
        self.counts = np.diff(self.first, append=len(pairs.people))
        self.random = np.random.default_rng(seed)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (pictures, pictures at another age, both [N, 3, S, S] in [-1, 1]; their ages [N] in years)."""
        who = self.random.integers(len(self.first), size=self.batch)
        one = self.random.integers(self.counts[who])
        other = (one + 1 + self.random.integers(self.counts[who] - 1)) % self.counts[who]
        flip = self.random.random(self.batch) < 0.5
        made = []
        for rows in (self.first[who] + one, self.first[who] + other):
            pixels = self.pairs.pixels[rows]
            pixels[flip] = pixels[flip, :, ::-1]
            made += [to_tensor(pixels), torch.from_numpy(self.pairs.ages[rows])]
        return made[0], made[2], made[1], made[3]

    def state_dict(self) -> dict[str, str]:
        """Return where the sequence is."""
        return {"random": json.dumps(self.random.bit_generator.state)}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on in the sequence of another sampler of the same pairs."""
        self.random.bit_generator.state = json.loads(state["random"])


@click.command(cls=Script, context_settings={"show_default": True})
@click.option(
    "--generator", type=click.Path(exists=True, path_type=Path), required=True, help="From train.facegan.stylegan."
)
@identity_option
@reader_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the pairs.")
@click.option("--people", type=click.IntRange(1), default=4000, help="Identities drawn, before the filter.")
@click.option("--min-cosine", type=click.FloatRange(-1, 1), default=0.5, help="To the mean of the person's pictures.")
@click.option("--max-error", type=click.FloatRange(0), default=12.0, help="Of the estimators' mean, in years.")
@click.option("--seed", type=int, default=0)
@torch.inference_mode()
def main(
    generator: Path,
    identity: Path,
    reader_files: tuple[Path, ...],
    out: Path,
    people: int,
    min_cosine: float,
    max_error: float,
    seed: int,
) -> None:
    """Draw synthetic people at several ages."""
    where = device()
    G, FR = load_stylegan(generator).to(where), load_identity(identity).to(where)
    readers = [load_reader(file).to(where) for file in reader_files]
    random = torch.Generator().manual_seed(seed)
    ages = np.array(AGES, np.float32)
    y = torch.from_numpy(age_to_classes(ages)).to(where).repeat(BATCH, 1)
    wanted = torch.from_numpy(ages).to(where).repeat(BATCH)
    kept: dict[str, list[np.ndarray]] = {"pixels": [], "people": [], "ages": []}
    drawn = wrong_age = wrong_person = 0
    for start in range(0, people, BATCH):
        z = torch.randn(BATCH, G.dims.latent, generator=random).to(where)
        faces = G(z.repeat_interleave(len(AGES), 0), y).clamp(-1, 1)
        embeddings = FR(F.interpolate(faces, FR.trunk.dims.size_px, mode="area"))
        means = F.normalize(embeddings.view(BATCH, len(AGES), -1).mean(1), dim=1).repeat_interleave(len(AGES), 0)
        is_person = (embeddings * means).sum(1) >= min_cosine
        is_age = (read_by_all(readers, faces).mean(0) - wanted).abs() <= max_error
        in_number = torch.arange(start, start + BATCH).repeat_interleave(len(AGES)) < people
        drawn += int(in_number.sum())
        wrong_age += int((~is_age.cpu() & in_number).sum())
        wrong_person += int((~is_person.cpu() & in_number).sum())
        good = ((is_person & is_age).cpu() & in_number).view(BATCH, len(AGES))
        good &= good.sum(1, keepdim=True) >= 2
        rows = good.flatten().numpy()
        pixels = ((faces + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        kept["pixels"].append(pixels[rows])
        kept["people"].append(np.repeat(np.arange(start, start + BATCH), len(AGES))[rows])
        kept["ages"].append(np.tile(ages, BATCH)[rows])
    arrays = {name: np.concatenate(parts) for name, parts in kept.items()}
    if not len(arrays["people"]):
        raise CheckpointError(
            f"none of {drawn} pictures passed ({wrong_age} read as another age, {wrong_person} as another person); "
            "train the generator longer, or widen --max-error and --min-cosine"
        )
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "pairs.npz", **arrays)  # type: ignore[arg-type]  # as in train.data
    manifest = {
        "generator": sha256_of(generator),
        "identity": sha256_of(identity),
        "readers": [sha256_of(file) for file in reader_files],
        "seed": seed,
        "ages": AGES,
        "min_cosine": min_cosine,
        "max_error_years": max_error,
        "pictures_drawn": drawn,
        "wrong_age": wrong_age,
        "wrong_person": wrong_person,
        "pictures": len(arrays["people"]),
        "people": len(np.unique(arrays["people"])),
        "sha256": sha256_of(out / "pairs.npz"),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    click.echo(json.dumps(manifest))
    first = np.unique(arrays["people"])[:8]
    blank = np.zeros_like(arrays["pixels"][0])
    rows_of = [
        dict(zip(arrays["ages"][m].tolist(), arrays["pixels"][m], strict=True))
        for m in arrays["people"] == first[:, None]
    ]
    sheet([to_tensor(np.stack([row.get(float(age), blank) for age in AGES])) for row in rows_of], out / "sheet.png")


if __name__ == "__main__":
    main()
