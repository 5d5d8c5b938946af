"""The model files: bundled with the package, downloaded by `faceage models fetch`, or imported by the user.

A *model* is a set of checkpoints, one a role, of one of `agers.registry.ARCHITECTURES`. The networks that measure are
taken from the bundled set where a model lacks them, so an imported model may be its ager's own checkpoints alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from faceage.agers.base import Architecture, ModelFiles
from faceage.agers.registry import ARCHITECTURES, SHARED_ROLES, architecture_of, model_programs
from faceage.cache import cache_root
from faceage.checkpoint import read_header
from faceage.engines.base import Program, sha256_of_file
from faceage.errors import CheckpointError, EngineError
from faceage.extras import missing

DEFAULT_MODEL = "space"
"""The bundled model that is used where none is named: the scorecard's choice, see MODEL_CARD.md."""
BUNDLED_MODELS = tuple(architecture.name for architecture in ARCHITECTURES)
"""Each architecture has one, of its own name."""
_BUNDLED = Path(__file__).parent
FACENET_ARCH = "facenet"


def user_folder() -> Path:
    """Return the folder of imported and downloaded models: `models` in the cache folder."""
    return cache_root() / "models"


def facenet_file() -> Path:
    """Return where the FaceNet checkpoint is once it has been fetched."""
    return user_folder() / FACENET_ARCH / f"{FACENET_ARCH}.safetensors"


def list_models() -> list[str]:
    """Return the names that `find_model` knows, the bundled ones first."""
    found = {
        path.parent.name
        for architecture in ARCHITECTURES
        for path in user_folder().glob(f"[!.]*/{architecture.roles['generator']}.safetensors")
    }
    return [*BUNDLED_MODELS, *sorted(found)]


def find_model(name: str = DEFAULT_MODEL) -> ModelFiles:
    """Return the files of a model, each known to be a checkpoint of its role.

    Raises:
        CheckpointError: if there is no such model, or one of its files is missing or damaged.
    """
    if name not in list_models():
        raise CheckpointError(
            f'unknown model "{name}"; there are {", ".join(list_models())}; add one with `faceage models import`'
        )
    if name in BUNDLED_MODELS:
        folder, architecture = _BUNDLED, architecture_of(name)
    else:
        folder = user_folder() / name
        architecture = _architecture([path.stem for path in folder.iterdir()])
    return _files_in(folder, name, architecture)


def _architecture(archs: Collection[str]) -> Architecture:
    """Return the architecture that a model of these checkpoints has: that of its generator.

    One architecture's generator may have a part in another's: then it is the one of more parts. Without any generator
    it is the first one: what that lacks is named to the user.
    """
    found = [architecture for architecture in ARCHITECTURES if architecture.roles["generator"] in archs]
    return max(found, key=lambda architecture: len(architecture.roles), default=ARCHITECTURES[0])


def _roles(architecture: Architecture) -> dict[str, str]:
    """Return role -> checkpoint's architecture, the shared ones too."""
    return {**architecture.roles, **SHARED_ROLES}


def _file(folder: Path, arch: str) -> Path:
    return folder / f"{arch}.safetensors"


def import_model(name: str, checkpoints: list[Path]) -> ModelFiles:
    """Copy checkpoints into the user's folder as a model of their own, in the place of an earlier one of that name.

    Its architecture is that of its generator. The graphs of its networks are written beside them, which needs torch.

    Raises:
        CheckpointError: if the name is taken by a bundled model or no folder name, a file is no checkpoint, two have
            the same role, one has no role beside the generator, one is missing, they do not belong together, or the
            user's folder cannot be written.
        EngineError: if torch is not installed, or a graph differs from torch.
    """
    if reason := missing("torch", "importing a model"):
        raise EngineError(reason)
    if name in BUNDLED_MODELS or not name.replace("-", "").replace("_", "").isalnum():
        taken = " or ".join(f'"{bundled}"' for bundled in BUNDLED_MODELS)
        raise CheckpointError(f'"{name}" cannot name a model; use letters, digits and dashes, not {taken}')
    archs = [read_header(path).arch for path in checkpoints]
    architecture = _architecture(archs)
    known = _roles(architecture).values()
    by_arch: dict[str, Path] = {}
    for arch, path in zip(archs, checkpoints, strict=True):
        if arch not in known or arch in by_arch:
            raise CheckpointError(f"{path} holds {arch}; expected one checkpoint each of {', '.join(known)}")
        by_arch[arch] = path
    lacking = [arch for arch in architecture.roles.values() if arch not in by_arch]
    if lacking:
        raise CheckpointError(f"the model lacks {' and '.join(lacking)}; name those checkpoints too")
    architecture.check({role: by_arch[arch] for role, arch in architecture.roles.items()})
    folder = user_folder() / name
    new = user_folder() / f".{name}.{os.getpid()}.part"
    try:
        new.mkdir(parents=True)
        try:
            for arch, path in by_arch.items():
                shutil.copyfile(path, _file(new, arch))
            _check_networks(name, architecture, new, checkpoints)
            _write_graphs(name, architecture, new)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be stored in {folder} ({error.strerror or error}); "
            "set FACEAGE_CACHE to a folder that can be written"
        ) from error
    return find_model(name)


def _check_networks(name: str, architecture: Architecture, folder: Path, given: list[Path]) -> None:
    """Raise CheckpointError if the headers of a model's checkpoints describe no networks that can be made."""
    files = _files_in(folder, name, architecture)
    try:
        for program in architecture.programs(files, files.identity).values():
            program.network(True)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise CheckpointError(
            f"the dims of {', '.join(map(str, given))} describe no network that this version can make ({reason}); "
            "export them again"
        ) from error


def _write_graphs(name: str, architecture: Architecture, folder: Path) -> None:
    """Write the graphs of a model's own networks beside its checkpoints; those of bundled weights are bundled too."""
    from faceage.engines.export import write_graph

    files = _files_in(folder, name, architecture)
    for program in architecture.programs(files, files.identity).values():
        for path in program.checkpoints:
            if path.parent != folder:  # a graph's weights lie beside it
                shutil.copyfile(path, folder / path.name)
    bundled = model_programs(_files_in(_BUNDLED, name, architecture))
    for role, program in model_programs(_files_in(folder, name, architecture)).items():
        if program.graph.parent != folder:
            continue
        if role in bundled and _have_same_weights(program, bundled[role]):
            for path in (bundled[role].graph, bundled[role].sidecar):
                shutil.copyfile(path, folder / path.name)
        else:
            write_graph(program)


def _have_same_weights(program: Program, other: Program) -> bool:
    names, others = ({path.name: sha256_of_file(path) for path in each.checkpoints} for each in (program, other))
    return program.name == other.name and names == others


def _files_in(folder: Path, name: str, architecture: Architecture) -> ModelFiles:
    """Return the files of a model in a folder, the shared ones that it lacks from the bundled set."""
    paths = {}
    for role, arch in _roles(architecture).items():
        path = _file(folder, arch)
        if not path.exists() and role in SHARED_ROLES:
            path = _file(_BUNDLED, arch)
        header = read_header(path)
        if header.arch != arch:
            raise CheckpointError(f"{path} holds {header.arch}, expected {arch}; import the model again")
        paths[role] = path
    return ModelFiles(name, architecture.name, paths)
