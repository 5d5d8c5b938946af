"""Pairs of one face at two ages, turned round: a real old face, and what makes it young.

    python -m train.space.pairs --faces runs/space/faces --archive utkface.tar --archive aaf.tar --out runs/space/pairs

Making faces younger works: the result looks real and knows nothing of its lines any more. So a network that is taught
the way back (`train.space.older`) sees real old skin as its target, and on this very face, in this very light. The
bundled models make each face young, by themselves and one after the other: a network that saw the traces of one alone
would look for them.

Writes `crops.npy`, `found.npy`, `pairs.npz` and real younger faces, which have no pair: `alone.npy`. Started again, it
goes on. `sheet.png` shows some: the real face, then the young ones.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import cv2
import numpy as np

from faceage.errors import CheckpointError
from faceage.geometry import WHOLE_FACE_TEMPLATE_5, similarity_to_template
from faceage.pipeline.request import Networks, load_networks
from train.data import to_tensor
from train.evaluate.composites import age_pictures
from train.run import Script, git_commit, sheet
from train.space.faces import Heads, pictures_of

log = logging.getLogger(__name__)

FIRST_YEARS, LAST_YEARS = 58, 88
"""Ages of the real faces; labels beyond are often wrong."""
YOUNG_YEARS = 25.0
CROP_PX, STORED_PX = 160, 208
"""Side of the crop that a network sees, and of what is stored: wider, for it is turned and moved while training."""
VERSIONS = ("real", "space", "facegan", "facegan of space")
ALONE, ALONE_FACES, SHOWN = (18, 57), 4_500, 24
"""First and last age of real faces that have no pair, how many there are for training, and how many to be shown."""
_BATCH = 64


@dataclass(frozen=True)
class Pairs:
    """Faces at their real age and made young."""

    crops: np.ndarray
    """uint8 [M, 4, 208, 208, 3], a memory map: `VERSIONS` of more faces than are used."""
    rows: np.ndarray
    """int64 [N], of those that are used."""
    ages: np.ndarray
    """float32 [N], of the real ones."""
    validation: np.ndarray
    """bool [N], never trained on."""
    alone: np.ndarray
    """uint8 [4500 + 24, 208, 208, 3], a memory map: real faces that have no pair; the last 24 are for validation."""
    alone_ages: np.ndarray
    """float32 [4500 + 24]."""
    groups: np.ndarray
    """int64 [N]: dataset and gender, so that whoever compares faces compares the like."""
    alone_groups: np.ndarray
    """int64 [4500 + 24]."""

    @classmethod
    def load(cls, folder: Path) -> Pairs:
        """Read what this script wrote.

        Raises:
            CheckpointError: if it is not there, or not all of it.
        """
        if not (folder / "pairs.npz").exists():
            raise CheckpointError(f"{folder} has no pairs.npz; run train.space.pairs to its end, and name its --out")
        with np.load(folder / "pairs.npz", allow_pickle=False) as data:
            values = {name: data[name] for name in data.files}
        crops, alone = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("crops", "alone"))
        return cls(crops=crops, alone=alone, **values)


def crop(picture: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Return what is stored of a face of a picture: uint8 [208, 208, 3]; landmarks [5, 2]."""
    template = WHOLE_FACE_TEMPLATE_5 * CROP_PX - 0.5 + (STORED_PX - CROP_PX) / 2
    (matrix,) = similarity_to_template(landmarks[None], template.astype(np.float32))
    size, border = (STORED_PX, STORED_PX), cv2.BORDER_REPLICATE
    return cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_AREA, borderMode=border)


def make_young(
    models: tuple[Networks, Networks], pictures: list[np.ndarray], landmarks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return crops uint8 [N, 4, 208, 208, 3] of N pictures, and which faces were found and changed, bool [N]."""
    targets = np.full(len(pictures), YOUNG_YEARS, np.float32)
    by_space, by_facegan = (age_pictures(model, pictures, landmarks, targets) for model in models)
    by_both = age_pictures(models[1], by_space.pictures, landmarks, targets)
    versions = (pictures, by_space.pictures, by_facegan.pictures, by_both.pictures)
    crops = [[crop(p, points) for p in row] for *row, points in zip(*versions, landmarks, strict=True)]
    changed = (np.nan_to_num(by_space.shares) > 0.5) & (np.nan_to_num(by_facegan.shares) > 0.5)
    return np.array(crops, np.uint8), changed


def _groups(heads: Heads) -> np.ndarray:
    return 2 * heads.dataset + heads.genders


def _choose_alone(heads: Heads) -> np.ndarray:
    """Return the rows of real faces that have no pair, those for validation last."""
    is_younger = (heads.ages >= ALONE[0]) & (heads.ages <= ALONE[1])
    rows = []
    for wanted, count in ((~heads.validation, ALONE_FACES), (heads.validation, SHOWN)):
        there = np.flatnonzero(is_younger & wanted)
        rows.append(there[np.linspace(0, len(there) - 1, min(count, len(there))).astype(int)])
    return np.concatenate(rows)


@click.command(cls=Script)
@click.option("--faces", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--archive", "archives", type=click.Path(exists=True, path_type=Path), multiple=True, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--limit", type=click.IntRange(1), help="Take so many faces only.")
def main(folder: Path, archives: tuple[Path, ...], out: Path, limit: int | None) -> None:
    """Make old faces young."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    heads = Heads.load(folder)
    alone = heads.rows(_choose_alone(heads))
    heads = heads.rows(np.flatnonzero((heads.ages >= FIRST_YEARS) & (heads.ages <= LAST_YEARS))[:limit])
    models = (load_networks(model="space", hair=False), load_networks(model="facegan"))
    made_by = {role: models[0].fingerprints[role] for role in ("generator", "coordinates", "younger")}

    out.mkdir(parents=True, exist_ok=True)
    shape = (len(heads), len(VERSIONS), STORED_PX, STORED_PX, 3)
    manifest = {"names": heads.names.tolist(), "versions": VERSIONS, "made_by": made_by, "shape": shape}
    manifest = json.loads(json.dumps(manifest))
    file = out / "manifest.json"
    if file.exists() and {**json.loads(file.read_text()), "git_commit": None} != manifest | {"git_commit": None}:
        raise CheckpointError(f"{out} holds pairs of other faces or models; name another --out")
    is_new = not file.exists()
    crops = np.lib.format.open_memmap(out / "crops.npy", "w+" if is_new else "r+", np.uint8, shape if is_new else None)
    found = np.lib.format.open_memmap(
        out / "found.npy", "w+" if is_new else "r+", np.int8, (len(heads),) if is_new else None
    )
    if is_new:
        found[:] = -1
        file.write_text(json.dumps(manifest | {"git_commit": git_commit()}))
    rows = {name: i for i, name in enumerate(heads.names) if found[i] < 0}
    log.info("%d of %d faces are to be done", len(rows), len(heads))
    pictures = pictures_of(list(archives), set(rows))
    while some := list(islice(pictures, _BATCH)):
        chosen = [rows[name] for name, _ in some]
        crops[chosen], found[chosen] = make_young(models, [picture for _, picture in some], heads.landmarks[chosen])
        log.info("%d done", (found >= 0).sum())
    faces = np.lib.format.open_memmap(out / "alone.npy", "w+", np.uint8, (len(alone), STORED_PX, STORED_PX, 3))
    rows = {name: i for i, name in enumerate(alone.names)}
    for name, picture in pictures_of(list(archives), set(rows)):
        faces[rows[name]] = crop(picture, alone.landmarks[rows[name]])
    good = np.flatnonzero(found == 1)
    np.savez(
        out / "pairs.npz",
        rows=good,
        ages=heads.ages[good],
        validation=heads.validation[good],
        alone_ages=alone.ages,
        groups=_groups(heads)[good],
        alone_groups=_groups(alone),
    )
    some = crops[good[np.linspace(0, len(good) - 1, min(20, len(good))).astype(int)]]
    sheet([to_tensor(np.ascontiguousarray(some[:, i])) for i in range(len(VERSIONS))], out / "sheet.png")
    log.info("%d faces, %d of them for validation", len(good), heads.validation[good].sum())


if __name__ == "__main__":
    main()
