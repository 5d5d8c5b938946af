"""The model files: bundled with the package, downloaded by `faceage models fetch`, or imported by the user.

A *model* is a set of checkpoints, one a role, of one of two architectures. What a set lacks is taken from the bundled
one, so an imported model may be no more than a generator and its encoder, or a FaceGAN alone.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from faceage.cache import cache_root
from faceage.checkpoint import read_header, sha256_of
from faceage.errors import CheckpointError

DEFAULT_MODEL = "facegan"
"""The bundled model that is used where none is named: the scorecard's choice, see MODEL_CARD.md."""
ROLES = {
    "age-cgan": {
        "generator": "age-cgan-generator",
        "encoder": "age-cgan-encoder",
        "age": "age-estimator",
        "identity": "identity",
    },
    "facegan": {"generator": "facegan", "age": "age-estimator", "identity": "identity"},
}
"""Architecture of a model, which is also the bundled model's name -> role -> architecture of the checkpoint that fills
it, which is also the stem of its file."""
SHARED = ("age", "identity")
"""Roles of the networks that only look: a model that lacks them takes the bundled ones."""
_BUNDLED = Path(__file__).parent


@dataclass(frozen=True)
class ModelFiles:
    """One checkpoint a role."""

    name: str
    architecture: str
    """A key of `ROLES`."""
    paths: dict[str, Path]
    """Role to file."""

    @property
    def generator(self) -> Path:
        """What draws the aged face."""
        return self.paths["generator"]

    @property
    def encoder(self) -> Path:
        """Of Age-cGAN alone."""
        return self.paths["encoder"]

    @property
    def age(self) -> Path:
        """What reads ages."""
        return self.paths["age"]

    @property
    def identity(self) -> Path:
        """What tells people apart."""
        return self.paths["identity"]


def user_folder() -> Path:
    """Return the folder of imported and downloaded models: `models` in the cache folder."""
    return cache_root() / "models"


def list_models() -> list[str]:
    """Return the names that `find_model` knows, the bundled ones first."""
    own = {roles["generator"] for roles in ROLES.values()}
    found = {path.parent.name for stem in own for path in user_folder().glob(f"*/{stem}.safetensors")}
    return [*ROLES, *sorted(found)]


def find_model(name: str = DEFAULT_MODEL) -> ModelFiles:
    """Return the files of a model, each known to be a checkpoint of its role.

    Raises:
        CheckpointError: if there is no such model, or one of its files is missing or damaged.
    """
    if name not in list_models():
        raise CheckpointError(
            f'unknown model "{name}"; there are {", ".join(list_models())}; add one with `faceage models import`'
        )
    folder = _BUNDLED if name in ROLES else user_folder() / name
    generators = {arch: _file(folder, roles["generator"]) for arch, roles in ROLES.items()}
    architecture = name if name in ROLES else next(arch for arch, path in generators.items() if path.exists())
    paths = {}
    for role, arch in ROLES[architecture].items():
        path = _file(folder, arch)
        if not path.exists() and role in SHARED:
            path = _file(_BUNDLED, arch)
        header = read_header(path)
        if header.arch != arch:
            raise CheckpointError(f"{path} holds {header.arch}, expected {arch}; import the model again")
        paths[role] = path
    return ModelFiles(name, architecture, paths)


def _file(folder: Path, arch: str) -> Path:
    return folder / f"{arch}.safetensors"


def import_model(name: str, checkpoints: list[Path]) -> ModelFiles:
    """Copy checkpoints into the user's folder as a model of their own, in the place of an earlier one of that name.

    Its architecture is that of its generator.

    Raises:
        CheckpointError: if the name is taken by a bundled model or no folder name, a file is no checkpoint, two have
            the same role, one has no role beside the generator, the generator or its encoder is missing, or the
            user's folder cannot be written.
    """
    if name in ROLES or not name.replace("-", "").replace("_", "").isalnum():
        taken = " or ".join(f'"{bundled}"' for bundled in ROLES)
        raise CheckpointError(f'"{name}" cannot name a model; use letters, digits and dashes, not {taken}')
    archs = [read_header(path).arch for path in checkpoints]
    architecture = "facegan" if ROLES["facegan"]["generator"] in archs else "age-cgan"
    known = ROLES[architecture].values()
    by_arch: dict[str, Path] = {}
    for arch, path in zip(archs, checkpoints, strict=True):
        if arch not in known or arch in by_arch:
            raise CheckpointError(f"{path} holds {arch}; expected one checkpoint each of {', '.join(known)}")
        by_arch[arch] = path
    missing = [arch for role, arch in ROLES[architecture].items() if role not in SHARED and arch not in by_arch]
    if missing:
        raise CheckpointError(f"the model lacks {' and '.join(missing)}; name those checkpoints too")
    if architecture == "age-cgan":
        generator, encoder = (by_arch[ROLES[architecture][role]] for role in ("generator", "encoder"))
        if read_header(encoder).parents.get("gan") not in (None, sha256_of(generator)):
            raise CheckpointError(f"the encoder was not trained for {generator}; name the generator it was trained for")
    folder = user_folder() / name
    others = {arch for roles in ROLES.values() for arch in roles.values()} - set(by_arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for arch, path in by_arch.items():
            part = folder / f"{arch}.safetensors.part"
            shutil.copyfile(path, part)
            os.replace(part, _file(folder, arch))
        for arch in others:
            _file(folder, arch).unlink(missing_ok=True)  # of the earlier model
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be stored in {folder} ({error.strerror or error}); "
            "set FACEAGE_CACHE to a folder that can be written"
        ) from error
    return find_model(name)
