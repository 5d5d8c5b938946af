"""The model files: bundled with the package, downloaded by `faceage models fetch`, or imported by the user.

A *model* is a set of checkpoints, one a role. What a set lacks is taken from the bundled one, so an
imported model may be no more than a generator and its encoder.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from faceage.cache import cache_root
from faceage.checkpoint import read_header, sha256_of
from faceage.errors import CheckpointError

DEFAULT_MODEL = "age-cgan"
ROLES = {
    "generator": "age-cgan-generator",
    "encoder": "age-cgan-encoder",
    "age": "age-estimator",
    "identity": "identity",
}
"""Role to the architecture that fills it, which is also the stem of its file."""
_BUNDLED = Path(__file__).parent


@dataclass(frozen=True)
class ModelFiles:
    """One checkpoint a role."""

    name: str
    generator: Path
    encoder: Path
    age: Path
    identity: Path

    def paths(self) -> dict[str, Path]:
        """Return role to file."""
        return {role: getattr(self, role) for role in ROLES}


def user_folder() -> Path:
    """Return the folder of imported and downloaded models: `models` in the cache folder."""
    return cache_root() / "models"


def list_models() -> list[str]:
    """Return the names that `find_model` knows, the bundled one first."""
    folder = user_folder()
    found = sorted(p.parent.name for p in folder.glob(f"*/{ROLES['generator']}.safetensors")) if folder.is_dir() else []
    return [DEFAULT_MODEL, *found]


def find_model(name: str = DEFAULT_MODEL) -> ModelFiles:
    """Return the files of a model, each known to be a checkpoint of its role.

    Raises:
        CheckpointError: if there is no such model, or one of its files is missing or damaged.
    """
    if name not in list_models():
        raise CheckpointError(
            f'unknown model "{name}"; there are {", ".join(list_models())}; add one with `faceage models import`'
        )
    files = {}
    for role, arch in ROLES.items():
        own = user_folder() / name / f"{arch}.safetensors"
        path = own if name != DEFAULT_MODEL and own.exists() else _BUNDLED / f"{arch}.safetensors"
        header = read_header(path)
        if header.arch != arch:
            raise CheckpointError(f"{path} holds {header.arch}, expected {arch}; import the model again")
        files[role] = path
    return ModelFiles(name, **files)


def import_model(name: str, checkpoints: list[Path]) -> ModelFiles:
    """Copy checkpoints into the user's folder as a model of their own.

    Raises:
        CheckpointError: if the name is taken by the bundled model or no folder name, a file is no checkpoint, two have
            the same role, or the generator or its encoder is missing.
    """
    if name == DEFAULT_MODEL or not name.replace("-", "").replace("_", "").isalnum():
        raise CheckpointError(f'"{name}" cannot name a model; use letters, digits and dashes, not "{DEFAULT_MODEL}"')
    by_arch: dict[str, Path] = {}
    for path in checkpoints:
        arch = read_header(path).arch
        if arch not in ROLES.values() or arch in by_arch:
            raise CheckpointError(f"{path} holds {arch}; expected one checkpoint each of {', '.join(ROLES.values())}")
        by_arch[arch] = path
    missing = [arch for arch in (ROLES["generator"], ROLES["encoder"]) if arch not in by_arch]
    if missing:
        raise CheckpointError(f"the model lacks {' and '.join(missing)}; name those checkpoints too")
    generator = by_arch[ROLES["generator"]]
    if read_header(by_arch[ROLES["encoder"]]).parents.get("gan") not in (None, sha256_of(generator)):
        raise CheckpointError(f"the encoder was not trained for {generator}; name the generator it was trained for")
    folder = user_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    for arch, path in by_arch.items():
        shutil.copyfile(path, folder / f"{arch}.safetensors.part")
        os.replace(folder / f"{arch}.safetensors.part", folder / f"{arch}.safetensors")
    return find_model(name)
