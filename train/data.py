"""UTKFace as aligned faces: read from the official archive, align, split, cache.

The archive's layout is `UTKFace/[age]_[gender]_[race]_[date&time].jpg.chip.jpg`, in a tar or a folder. Files with
other names are skipped and counted.

Reference: Zhang, Song, Qi: Age Progression/Regression by Conditional Adversarial Autoencoder, CVPR 2017.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from faceage.ages import age_to_classes
from faceage.errors import CheckpointError
from faceage.geometry import TEMPLATE_5, similarity_to_template

log = logging.getLogger(__name__)

DATASET = {"name": "UTKFace", "licence": "non-commercial research only"}
VALIDATION_FILE = Path(__file__).parent / "validation.txt"
"""The names of the pictures that are never trained on; see `train.split`."""
UTKFACE_NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_(\d{14,20})\.jpg\.chip\.jpg")
AAF_NAME = re.compile(r"(\d{5})A(\d{2})\.jpg")
"""File names of All-Age-Faces: number, age. Up to `AAF_LAST_WOMAN` the numbers are women's.

Reference: Cheng et al., Exploiting effective facial patches for robust gender recognition, Tsinghua Science and
Technology 24(3), 2019.
"""
AAF_LAST_WOMAN = 7380
_CACHE_VERSION = 4
_STORED_PX = (128, 192)
"""Faces are cached at the smallest of these sides that will do, of a 200-pixel original, and reduced on loading."""
_MIN_SCORE = 0.9
"""O-Net's confidence below which an archive's picture is dropped: not a face, or one nobody could align."""


@dataclass(frozen=True)
class FaceSet:
    """Aligned faces and their labels."""

    pixels: np.ndarray
    """uint8 [N, S, S, 3], RGB."""
    ages: np.ndarray
    """float32 [N], years."""
    genders: np.ndarray
    """int64 [N], 0 male, 1 female."""
    races: np.ndarray
    """int64 [N], 0 White, 1 Black, 2 Asian, 3 Indian, 4 others: the dataset's own labels."""
    landmarks: np.ndarray
    """float32 [N, 5, 2], in the original 200-pixel picture."""
    names: np.ndarray
    validation: np.ndarray
    """bool [N], the fixed validation split: never trained on."""

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, which: np.ndarray) -> FaceSet:
        """Return the faces that a mask or an index array selects."""
        return FaceSet(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @property
    def train(self) -> FaceSet:
        """The training split."""
        return self.rows(~self.validation)

    def half(self, which: int) -> FaceSet:
        """One of two disjoint halves, 0 or 1, drawn by the names: pictures of one person can be in both."""
        return self.rows(in_half(self.names, which))

    @property
    def val(self) -> FaceSet:
        """The validation split."""
        return self.rows(self.validation)


def in_half(names: Iterable[str], which: int) -> np.ndarray:
    """Return which pictures are in one of two disjoint halves, 0 or 1: bool [N]."""
    return np.array([hashlib.sha256(f"half {name}".encode()).digest()[0] % 2 == which for name in names])


def read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, JPEG bytes) of every picture in a tar or a folder, in the order of their names."""
    if path.is_dir():
        for file in sorted(path.rglob("*.[jJ][pP][gG]"), key=lambda p: p.name):
            yield file.name, file.read_bytes()
        return
    with tarfile.open(path) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and m.name.lower().endswith(".jpg")]
        for member in sorted(members, key=lambda m: m.name.rsplit("/", 1)[-1]):
            stream = tar.extractfile(member)
            if stream is not None:
                yield member.name.rsplit("/", 1)[-1], stream.read()


def archive_names(path: Path) -> list[str]:
    """Return the file names of `read_archive`, without reading the pictures."""
    if path.is_dir():
        return sorted(file.name for file in path.rglob("*.[jJ][pP][gG]"))
    with tarfile.open(path) as tar:
        return sorted(m.name.rsplit("/", 1)[-1] for m in tar.getmembers() if m.name.lower().endswith(".jpg"))


def is_validation(name: str) -> bool:
    """Return whether a picture is for validation, and never trained on.

    UTKFace's by `VALIDATION_FILE`. Of All-Age-Faces' photos, each of another person, an eighth, drawn by the hash of
    the file name.
    """
    if AAF_NAME.fullmatch(name):
        return hashlib.sha256(name.encode()).digest()[0] % 8 == 0
    return name in _validation_names(VALIDATION_FILE)


@cache
def _validation_names(file: Path) -> frozenset[str]:
    return frozenset(file.read_text().split())


def load_faces(archive: Path, size_px: int, cache: Path) -> FaceSet:
    """Return UTKFace's aligned faces at `size_px`, split by `VALIDATION_FILE`.

    Raises:
        CheckpointError: if the archive has none of that file's pictures.
    """
    faces = align_archive(archive, size_px, cache)
    validation = np.array([is_validation(name) for name in faces.names.tolist()])
    if not validation.any():
        raise CheckpointError(
            f"{archive} has none of the pictures that {VALIDATION_FILE.name} keeps for validation; "
            "give the official archive, or split this one with train.split"
        )
    return replace(faces, validation=validation)


def align_archive(archive: Path, size_px: int, cache: Path) -> FaceSet:
    """Return the archive's aligned faces, not split, from the cache if it was made from the same archive."""
    stored_px = min(px for px in _STORED_PX if px >= size_px)
    at = "" if stored_px == _STORED_PX[0] else f"-{stored_px}"
    file = cache / f"utkface-v{_CACHE_VERSION}-{_archive_key(archive)}{at}.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, **_prepare(archive, stored_px))  # type: ignore[arg-type]  # the stubs check allow_pickle against the dict
        part.rename(file)
    with np.load(file, allow_pickle=False) as data:
        arrays = {name: data[name] for name in FaceSet.__dataclass_fields__ if name != "validation"}
    arrays["validation"] = np.zeros(len(arrays["names"]), bool)
    if size_px != stored_px:
        resize = [cv2.resize(p, (size_px, size_px), interpolation=cv2.INTER_AREA) for p in arrays["pixels"]]
        arrays["pixels"] = np.stack(resize)
    return FaceSet(**arrays)


def _archive_key(archive: Path) -> str:
    size = archive.stat().st_size if archive.is_file() else sum(1 for _ in archive.rglob("*.jpg"))
    return hashlib.sha256(f"{archive.resolve()} {size}".encode()).hexdigest()[:12]


def _prepare(archive: Path, stored_px: int) -> dict[str, np.ndarray]:
    pictures, labels, names, bad_names = [], [], [], 0
    for name, data in read_archive(archive):
        match = UTKFACE_NAME.fullmatch(name)
        if match is None:
            bad_names += 1
            continue
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            bad_names += 1
            continue
        pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        labels.append([int(match[i]) for i in (1, 2, 3)])
        names.append(name)
    landmarks, scores = find_landmarks(pictures)
    kept = np.flatnonzero(scores >= _MIN_SCORE)
    if not len(kept):
        raise CheckpointError(
            f"{archive} holds no face of UTKFace's layout, [age]_[gender]_[race]_[date&time].jpg.chip.jpg "
            f"({bad_names} other names or damaged files); give the official archive"
        )
    log.info(
        "%d faces read, %d bad names or files skipped, %d without a clear face dropped",
        len(pictures),
        bad_names,
        len(pictures) - len(kept),
    )
    pixels = warp_faces(
        [pictures[i] for i in kept], landmarks[kept], TEMPLATE_5 * stored_px - 0.5, stored_px, stored_px
    )
    label = np.array(labels)[kept]
    return {
        "pixels": pixels,
        "ages": label[:, 0].astype(np.float32),
        "genders": label[:, 1],
        "races": label[:, 2],
        "landmarks": landmarks[kept],
        "names": np.array(names)[kept],
    }


def warp_faces(
    pictures: list[np.ndarray], landmarks: np.ndarray, template: np.ndarray, width: int, height: int
) -> np.ndarray:
    """Align uint8 pictures [H, W, 3] to a template (in output pixels); returns uint8 [N, height, width, 3]."""
    matrices = similarity_to_template(landmarks.astype(np.float32), template.astype(np.float32))
    warped = [
        cv2.warpAffine(p, m, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT_101)
        for p, m in zip(pictures, matrices, strict=True)
    ]
    return np.stack(warped)


def find_landmarks(pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Run MTCNN's O-Net twice on every picture: the archive's crops are centred, so no search is needed."""
    from facenet_pytorch.models.mtcnn import ONet

    with torch.random.fork_rng([]):  # a run that finds the cache must draw the same numbers as the first
        net = ONet().eval()
    landmarks = np.zeros((len(pictures), 5, 2), np.float32)
    scores = np.zeros(len(pictures), np.float32)
    for start in range(0, len(pictures), 256):
        batch = pictures[start : start + 256]
        side = batch[0].shape[0]
        boxes = np.tile(np.array([0.2, 0.2, 0.8, 0.8], np.float32) * side, (len(batch), 1))
        for _ in range(2):
            boxes, points, score = _onet(net, batch, boxes)
        landmarks[start : start + len(batch)] = points
        scores[start : start + len(batch)] = score
    return landmarks, scores


@torch.inference_mode()
def _onet(
    net: torch.nn.Module, pictures: list[np.ndarray], boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    crops = []
    for picture, box in zip(pictures, boxes, strict=True):
        scale = (box[2] - box[0]) / 48
        pull = np.array([[scale, 0, box[0] + scale / 2 - 0.5], [0, scale, box[1] + scale / 2 - 0.5]], np.float32)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        crops.append(cv2.warpAffine(picture, pull, (48, 48), flags=flags, borderMode=cv2.BORDER_REPLICATE))
    x = (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() - 127.5) / 128
    regression, points, probability = (t.numpy() for t in net(x))
    side = (boxes[:, 2] - boxes[:, 0])[:, None]
    points = np.stack([boxes[:, :1] + points[:, :5] * side, boxes[:, 1:2] + points[:, 5:] * side], -1)
    refined = boxes + regression * side
    centre = (refined[:, :2] + refined[:, 2:]) / 2
    half = np.maximum(refined[:, 2] - refined[:, 0], refined[:, 3] - refined[:, 1])[:, None] / 2
    return np.concatenate([centre - half, centre + half], 1), points, probability[:, 1]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Turn uint8 [N, S, S, 3] into float32 [N, 3, S, S] in [-1, 1], channels last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def balanced_weights(ages: np.ndarray, power: float = 0.5) -> np.ndarray:
    """Return sampling probabilities that lift rare ages: a five-year bin of n faces gets n^(1 - power) of the mass."""
    bins = np.minimum(ages // 5, 19).astype(int)
    weights = np.bincount(bins, minlength=20).astype(np.float64)[bins] ** -power
    return weights / weights.sum()


class Sampler:
    """Endless random batches, flipped at random. A resumed run goes on in the sequence."""

    def __init__(self, faces: FaceSet, batch: int, seed: int, power: float = 0.5) -> None:
        self.faces, self.batch = faces, batch
        self.weights = balanced_weights(faces.ages, power)
        self.random = np.random.default_rng(seed)

    def indices(self) -> np.ndarray:
        """Return the rows of the next batch."""
        return self.random.choice(len(self.faces), self.batch, p=self.weights)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the next batch, half of it mirrored: uint8 [N, S, S, 3], ages [N]."""
        rows = self.indices()
        pixels = self.faces.pixels[rows]
        flip = self.random.random(len(rows)) < 0.5
        pixels[flip] = pixels[flip, :, ::-1]
        return pixels, self.faces.ages[rows]

    def __call__(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """Return (faces [N, 3, S, S], age classes [N, 6], ages [N])."""
        pixels, ages = self.draw()
        return to_tensor(pixels), torch.from_numpy(age_to_classes(ages)), ages

    def state_dict(self) -> dict[str, str]:
        """Return where the sequence is, and the faces that it is of."""
        names = hashlib.sha256(" ".join(self.faces.names).encode()).hexdigest()
        return {
            "random": json.dumps(self.random.bit_generator.state),
            "faces": f"{len(self.faces)}, names {names[:12]}",
        }

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on in the sequence of another sampler.

        Raises:
            CheckpointError: if that one drew from other faces.
        """
        faces = self.state_dict()["faces"]
        if state["faces"] != faces:
            raise CheckpointError(
                f"the run was trained on other faces ({state['faces']}) than it is given now ({faces}); "
                "give it the same archive and split, or name another --out"
            )
        self.random.bit_generator.state = json.loads(state["random"])
