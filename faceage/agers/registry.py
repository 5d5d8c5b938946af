"""The architectures that there are. A new one is a module with an `ARCHITECTURE`, and one line here."""

from __future__ import annotations

from pathlib import Path

from faceage.agers import age_cgan, facegan, space
from faceage.agers.base import Architecture, ModelFiles
from faceage.agers.programs import reader_program
from faceage.checkpoint import read_header
from faceage.engines.base import Program

ARCHITECTURES: tuple[Architecture, ...] = (age_cgan.ARCHITECTURE, facegan.ARCHITECTURE, space.ARCHITECTURE)
SHARED_ROLES = {"age": "age-estimator", "identity": "identity"}
"""Roles of the networks that only measure, and the architectures of their checkpoints: a model that lacks them takes
the bundled ones."""


def architecture_of(name: str) -> Architecture:
    """Return the architecture of that name; there must be one."""
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def model_programs(files: ModelFiles, identity: Path | None = None) -> dict[str, Program]:
    """Return all programs of a model, the detector's aside, by name.

    Args:
        files: its checkpoints.
        identity: the checkpoint of another identity network than the model's own: FaceNet's.
    """
    who = identity or files.identity
    own = architecture_of(files.architecture).programs(files, who)
    # FaceNet takes faces of any side: it gets what the model's own identity network would.
    size_px = read_header(files.identity).dims["size_px"]
    return own | {"identity": reader_program(who, size_px), "age": reader_program(files.age)}
