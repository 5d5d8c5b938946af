"""Checkpoints: safetensors files whose header says what they are. Nothing is ever unpickled.

A header is one JSON object under the metadata key "faceage"; `read_header` needs no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors

from faceage.errors import CheckpointError
from faceage.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
LARGEST_DIM = 1 << 14
"""Above what any network's dimensions are: one that is damaged may not fill the memory."""
_KEY = "faceage"
_OWN_HASH = "file_sha256"
"""Beside the header's fields: the hash of the file, with zeros in this place."""
_NO_HASH = "0" * 64
_HASH_PLACE = re.compile(rf'{_OWN_HASH}\\": \\"(.{{64}})'.encode())


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a checkpoint is and where it comes from."""

    arch: str
    """The network: "age-cgan-generator", "age-cgan-encoder", "facegan", "age-estimator", "identity"."""
    dims: dict
    """The fields of the architecture's `*Dims` dataclass."""
    stage: str
    """The training script that made it."""
    images_seen: int
    input_spec: str = "RGB in [-1, 1], NCHW, aligned by faceage.geometry.TEMPLATE_5"
    dataset: dict = field(default_factory=dict)
    """Name, licence and what was used of it."""
    parents: dict = field(default_factory=dict)
    """Stage to SHA-256 of the checkpoints this one was trained from."""
    train_config: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    """Measured on the validation split only."""
    git_commit: str = ""
    format_version: int = FORMAT_VERSION


def save(path: Path, weights: dict[str, Tensor], header: Header, *, half: bool = False) -> str:
    """Write a checkpoint beside its final name, rename it, and return its SHA-256.

    Args:
        path: ends in .safetensors.
        weights: a module's state dict.
        header: written as JSON.
        half: store floating-point weights as float16 (what is bundled).
    """
    import torch
    from safetensors.torch import save as serialize

    tensors = {}
    for name, value in weights.items():
        value = value.detach().cpu().contiguous()
        tensors[name] = value.half() if half and value.dtype == torch.float32 else value.clone()
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(header) | {_OWN_HASH: _NO_HASH})
    data = serialize(tensors, metadata={_KEY: text})
    # save_file would make a file that only its owner can read.
    part.write_bytes(_with_own_hash(data, hashlib.sha256(data).hexdigest()))
    os.replace(part, path)
    return sha256_of(path)


def read_header(path: Path) -> Header:
    """Read a checkpoint's header without loading its weights or importing torch.

    Raises:
        CheckpointError: if the file is missing, damaged, not a faceage checkpoint, or of a newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a .safetensors file; see `faceage models list`")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not safetensors ({error}); restore it by reinstalling faceage, or import it again"
        ) from error
    if text is None:
        raise CheckpointError(f"{path} has no faceage header; expected a checkpoint made by faceage's train/ scripts")
    try:
        fields = json.loads(text)
        fields.pop(_OWN_HASH, None)
        header = Header(**fields)
        _check_header(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header this version cannot read ({error}); update faceage") from error
    if header.format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {header.format_version}, this version reads up to {FORMAT_VERSION}; update faceage"
        )
    return header


def _check_header(header: Header) -> None:
    """Raise ValueError if a header's fields are not of its types, or a dimension is none that a network can have."""
    for each in dataclasses.fields(Header):
        value = getattr(header, each.name)
        if type(value).__name__ != each.type:
            raise ValueError(f"{each.name} is {value!r:.40}, expected {each.type}")
    for name, value in header.dims.items():
        numbers = [each for each in (value if isinstance(value, list) else [value]) if not isinstance(each, str)]
        if not all(isinstance(each, int | float) and 0 <= each <= LARGEST_DIM for each in numbers):
            raise ValueError(f"dims has {name} {value!r:.40}, expected numbers from 0 to {LARGEST_DIM}")


def load(path: Path, arch: str) -> tuple[Header, dict[str, Tensor]]:
    """Load a checkpoint of the given architecture, weights as float32.

    Raises:
        CheckpointError: as `read_header` and `check_whole`, and if the checkpoint holds another network than `arch`.
    """
    from safetensors.torch import load_file

    header = read_header(path)
    check_whole(path)
    if header.arch != arch:
        raise CheckpointError(f"{path} holds {header.arch}, expected {arch}; name the checkpoint of that stage")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it by reinstalling faceage") from error
    return header, {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _own_hash(data: bytes) -> re.Match[bytes] | None:
    """Return the place of a file's own hash in its header, which begins with its length; older files have none."""
    return _HASH_PLACE.search(data, 8, 8 + int.from_bytes(data[:8], "little"))


def _with_own_hash(data: bytes, digest: str) -> bytes:
    place = _own_hash(data)
    assert place
    return data[: place.start(1)] + digest.encode() + data[place.end(1) :]


def check_whole(path: Path) -> None:
    """Raise CheckpointError if a checkpoint is damaged: it is not what the hash in it says. Older ones have no hash."""
    data = path.read_bytes()
    place = _own_hash(data)
    if place and hashlib.sha256(_with_own_hash(data, _NO_HASH)).hexdigest().encode() != place[1]:
        raise CheckpointError(
            f"{path} is damaged: it is not what its hash says; restore it by reinstalling faceage, or import it again"
        )


def read_array(path: Path, name: str) -> FloatArray:
    """Return one tensor of a checkpoint as a float32 array, without importing torch; KeyError if it has none such."""
    with safetensors.safe_open(path, framework="numpy") as file:
        if name not in file.keys():  # noqa: SIM118  it is no dictionary
            raise KeyError(f"{path} has no tensor {name}")
        return file.get_tensor(name).astype(np.float32)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
