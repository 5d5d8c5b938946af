"""Copy finished checkpoints into the package, in half precision.

python -m train.bundle --runs runs            # all that python -m train makes
python -m train.bundle --runs runs facegan    # one: the hashes of its parents stay those of their runs
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from faceage.checkpoint import load, save, sha256_of
from train.run import Script

FILES = {
    "age-cgan-generator": "aging/generator.safetensors",
    "age-cgan-encoder": "curvature/encoder.safetensors",
    "age-estimator": "age/age-estimator.safetensors",
    "identity": "identity/identity.safetensors",
    "facegan": "facegan/facegan.safetensors",
    "space": "space/model/space.safetensors",
    "space-coordinates": "space/coordinates/coordinates.safetensors",
    "space-hair": "space/hair/hair.safetensors",
}
TOGETHER = ("identity", "age-estimator", "age-cgan-generator", "age-cgan-encoder", "facegan")
"""What `python -m train` makes, parents first."""
SPACE = ("space", "space-coordinates", "space-hair")
"""The space model, which has scripts of its own."""
TARGET = Path(__file__).parent.parent / "faceage" / "models"


@click.command(cls=Script)
@click.option("--runs", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the run folders.")
@click.argument("archs", nargs=-1, type=click.Choice(TOGETHER + SPACE), metavar="[NETWORK]...")
def main(runs: Path, archs: tuple[str, ...]) -> None:
    """Bundle the checkpoints of the named networks, or of all that `python -m train` makes."""
    renamed: dict[str, str] = {}  # hash of a full-precision parent to that of its bundled copy
    for arch in TOGETHER + SPACE:
        if arch not in (archs or TOGETHER):
            continue
        header, weights = load(runs / FILES[arch], arch)
        parents = {stage: renamed.get(sha, sha) for stage, sha in header.parents.items()}
        path = TARGET / f"{arch}.safetensors"
        sha = save(path, weights, replace(header, parents=parents), half=True)
        renamed[sha256_of(runs / FILES[arch])] = sha
        click.echo(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, sha256 {sha[:12]}, {header.images_seen} images")


if __name__ == "__main__":
    main()
