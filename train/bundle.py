"""Copy finished checkpoints into the package, in half precision, and write the graphs that run.

python -m train.bundle --runs runs            # all that python -m train makes
python -m train.bundle --runs runs facegan    # one: the hashes of its parents stay those of their runs
python -m train.bundle                        # only the graphs, of all checkpoints that are in the package

Each graph (`faceage/models/*.onnx`) gets a JSON file beside it: the hashes of the graph and of its weights, and how far
it is from torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click

from faceage.agers.base import ModelFiles
from faceage.agers.programs import reader_program
from faceage.agers.registry import ARCHITECTURES, SHARED_ROLES
from faceage.checkpoint import Header, load, save, sha256_of
from faceage.detect import detector_programs
from faceage.engines.base import Program
from faceage.engines.export import write_graph
from faceage.networks.mtcnn import CHECKPOINT, facenet_pytorch_weights
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
    "space-older": "space/older/older.safetensors",
}
TOGETHER = ("identity", "age-estimator", "age-cgan-generator", "age-cgan-encoder", "facegan")
"""What `python -m train` makes, parents first."""
SPACE = ("space", "space-coordinates", "space-hair", "space-older")
"""The space model, which has scripts of its own."""
DETECTOR = "mtcnn"
"""Its weights are facenet-pytorch's."""
TARGET = Path(__file__).parent.parent / "faceage" / "models"


@click.command(cls=Script)
@click.option(
    "--runs", type=click.Path(exists=True, path_type=Path), help="Folder of the run folders; without it only graphs."
)
@click.argument("archs", nargs=-1, type=click.Choice((*TOGETHER, *SPACE, DETECTOR)), metavar="[NETWORK]...")
def main(runs: Path | None, archs: tuple[str, ...]) -> None:
    """Bundle the checkpoints of the named networks, or of all that `python -m train` makes, and write their graphs."""
    chosen = archs or (TOGETHER if runs else (*TOGETHER, *SPACE, DETECTOR))
    if runs:
        bundle_checkpoints(runs, chosen)
    if DETECTOR in chosen:
        header = Header(
            arch=DETECTOR,
            dims={},
            stage="facenet-pytorch",
            images_seen=0,
            input_spec="RGB in about [-1, 1], NCHW; see networks.mtcnn",
            dataset={
                "name": "WIDER FACE, CelebA",
                "licence": "MIT, as part of facenet-pytorch, Copyright (c) 2019 Timothy Esler",
            },
        )
        save(TARGET / f"{DETECTOR}.safetensors", facenet_pytorch_weights(), header)
    for program in bundled_programs():
        if {path.stem for path in program.checkpoints} & set(chosen):
            record = write_graph(program)
            parity = record["parity_with_torch"]
            click.echo(f"{program.graph.name}: {program.graph.stat().st_size / 1e3:.0f} KB, {parity}")


def bundle_checkpoints(runs: Path, archs: tuple[str, ...]) -> None:
    """Copy the checkpoints of networks into the package, in half precision."""
    renamed: dict[str, str] = {}  # hash of a full-precision parent to that of its bundled copy
    for arch in TOGETHER + SPACE:
        if arch not in archs:
            continue
        header, weights = load(runs / FILES[arch], arch)
        parents = {stage: renamed.get(sha, sha) for stage, sha in header.parents.items()}
        path = TARGET / f"{arch}.safetensors"
        sha = save(path, weights, replace(header, parents=parents), half=True)
        renamed[sha256_of(runs / FILES[arch])] = sha
        click.echo(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, sha256 {sha[:12]}, {header.images_seen} images")


def bundled_programs() -> list[Program]:
    """Return the programs, each once, whose checkpoints are in the package."""

    def here(roles: Mapping[str, str]) -> dict[str, Path]:
        return {role: TARGET / f"{arch}.safetensors" for role, arch in roles.items()}

    programs = [reader_program(path) for path in here(SHARED_ROLES).values() if path.exists()]
    for architecture in ARCHITECTURES:
        files = ModelFiles(architecture.name, architecture.name, here({**architecture.roles, **SHARED_ROLES}))
        if all(path.exists() for path in here(architecture.roles).values()):
            programs += architecture.programs(files, files.identity).values()
    return programs + (detector_programs() if CHECKPOINT.parent == TARGET else [])


if __name__ == "__main__":
    main()
