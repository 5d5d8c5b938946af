"""The faces of the scorecard: which are drawn, what is asked for, who reads the answers, and the baselines.

Pictures are the archive's own, uint8 [H, W, 3] RGB at full resolution, and landmarks are in their pixels. `size_px` is
the side of an aligned crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from faceage.align import align_faces
from faceage.checkpoint import sha256_of
from faceage.geometry import TEMPLATE_5, face_mask
from faceage.kernels import apply_change
from faceage.types import RGB, Change, FloatArray, Frame, IntArray
from train.data import FaceSet, read_archive, to_tensor, warp_faces
from train.evaluate.metrics import picture_mask
from train.readers.age_estimator import load_reader
from train.readers.judge import JUDGE_PX, load_judge, read_ages
from train.readers.teacher import TEMPLATE_96X112, embed, load_teacher

AGE_GROUPS = ((15, 24), (25, 34), (35, 44), (45, 54), (55, 64), (65, 80))
"""First and last year of each group; faces are drawn evenly over them."""
GENDERS = ("male", "female")
RACES = ("White", "Black", "Asian", "Indian", "Others")
"""UTKFace's own labels, in its order."""
GAPS_YEARS = (10, 20, 30, 40)
OLDEST_JUDGED_YEARS = 85
MEAN_FACE_PX = 64
MEAN_FACE_WITHIN_YEARS = 5
REAL_WITHIN_YEARS = 2
PICTURE_CROP_PX = 200
"""The side of an aligned crop in the archive's own pictures: `TEMPLATE_5` was made from them."""
BLUR_PX = 3.0
"""Standard deviation of the blur that a sound scorecard must notice."""


def age_group(ages: np.ndarray) -> IntArray:
    """Return the index into `AGE_GROUPS` of each age [N]; those outside go to the nearest group."""
    return np.clip(np.searchsorted([first for first, _ in AGE_GROUPS], ages, side="right") - 1, 0, len(AGE_GROUPS) - 1)


def draw_faces(faces: FaceSet, count: int, seed: int) -> IntArray:
    """Return the rows of about `count` faces, spread evenly over `AGE_GROUPS`; a group that is too small gives all."""
    random = np.random.default_rng(seed)
    share = max(1, count // len(AGE_GROUPS))
    rows = []
    for first, last in AGE_GROUPS:
        group = np.flatnonzero((faces.ages >= first) & (faces.ages <= last))
        rows.append(random.permutation(group)[:share])
    return np.sort(np.concatenate(rows))


@dataclass(frozen=True)
class Requests:
    """Which face is to become how old: R of them."""

    faces: IntArray
    """[R], rows of the drawn faces."""
    gaps: IntArray
    """[R], years from the label to the target, negative for younger."""
    targets: FloatArray
    """[R], years."""

    def __len__(self) -> int:
        return len(self.faces)

    def rows(self, which: np.ndarray) -> Requests:
        """Return the requests that a mask or an index array selects."""
        return Requests(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def pooled(self) -> np.ndarray:
        """Which requests [R] have a gap of 20 or 30 years, either way: the headline is about them."""
        return np.isin(np.abs(self.gaps), (20, 30))

    def groups(self) -> dict[str, np.ndarray]:
        """Return name -> bool [R] of what the tables tell apart."""
        named = {f"{sign * gap:+d}": self.gaps == sign * gap for sign in (1, -1) for gap in GAPS_YEARS}
        pooled = {"+20..30": self.pooled & (self.gaps > 0), "-20..30": self.pooled & (self.gaps < 0)}
        return named | pooled | {POOLED: self.pooled}


POOLED = "±20..30"


def make_requests(ages: FloatArray) -> Requests:
    """Ask for every gap of `GAPS_YEARS`, older and younger, that stays within the age groups."""
    low, high = AGE_GROUPS[0][0], AGE_GROUPS[-1][1]
    made = [
        (row, sign * gap, age + sign * gap)
        for row, age in enumerate(ages)
        for sign in (1, -1)
        for gap in GAPS_YEARS
        if low <= age + sign * gap <= high
    ]
    columns = list(zip(*made, strict=True)) or [(), (), ()]
    return Requests(np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], np.float32))


def read_pictures(archive: Path, names: np.ndarray) -> list[np.ndarray]:
    """Return the pictures of the given names, as stored in the archive, in that order."""
    wanted = set(names.tolist())
    found = {}
    for name, data in read_archive(archive):
        if name in wanted:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None, name  # `load_faces` has decoded it before
            found[name] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    return [found[name] for name in names.tolist()]


@dataclass(frozen=True)
class Looks:
    """What the panel says of N pictures."""

    ages: FloatArray
    """[N], years, by the judge."""
    readers: FloatArray
    """[N], years, the mean of the estimators that were in a loss; NaN where none was given."""
    embeddings: FloatArray
    """[N, 128], unit vectors, by the teacher."""
    features: FloatArray
    """[N, 160], the judge's."""

    def rows(self, which: np.ndarray) -> Looks:
        """Return the pictures that a mask or an index array selects."""
        return Looks(*(getattr(self, f.name)[which] for f in fields(self)))


class Panel:
    """The networks that judge: one reads ages, one tells people apart.

    Neither is in a loss, but the second taught the identity network that is.
    """

    def __init__(self, judge: Path, teacher: Path, readers: Sequence[Path] = ()) -> None:
        self._judge, self._teacher = load_judge(judge), load_teacher(teacher)
        self._readers = [load_reader(path) for path in readers]
        paths = (judge, teacher, *readers)
        self.files = {f"{path.parent.name}/{path.name}": sha256_of(path)[:12] for path in paths}
        """Name to hash of what is read."""

    @property
    def has_readers(self) -> bool:
        """Whether estimators that were in a loss were given."""
        return bool(self._readers)

    def look(self, pictures: list[np.ndarray], landmarks: FloatArray) -> Looks:
        """Read pictures, each aligned anew by its landmarks [N, 5, 2]."""
        parts = []
        for start in range(0, len(pictures), 256):
            some, points = pictures[start : start + 256], landmarks[start : start + 256]
            crops = warp_faces(some, points, TEMPLATE_5 * JUDGE_PX - 0.5, JUDGE_PX, JUDGE_PX)
            readings = [_in_batches(reader, _shrink(crops, reader.trunk.dims.size_px)) for reader in self._readers]
            parts.append(
                Looks(
                    ages=self.ages(crops),
                    readers=np.mean(readings, 0) if readings else np.full(len(crops), np.nan, np.float32),
                    embeddings=self.embed(warp_faces(some, points, TEMPLATE_96X112, 96, 112)),
                    features=self.features(crops),
                )
            )
        return Looks(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Looks)))

    def ages(self, crops: np.ndarray) -> FloatArray:
        """Return the ages [N], years, that the judge reads off aligned faces, uint8 [N, 128, 128, 3]."""
        return read_ages(self._judge, crops)

    def features(self, crops: np.ndarray) -> FloatArray:
        """Return the judge's features [N, 160] of aligned faces, uint8 [N, 128, 128, 3]."""
        return _in_batches(self._judge.features, crops)

    def embed(self, crops: np.ndarray) -> FloatArray:
        """Return the teacher's embeddings [N, 128] of faces aligned to its template, uint8 [N, 112, 96, 3]."""
        return embed(self._teacher, crops).numpy()


def _shrink(crops: np.ndarray, size_px: int) -> np.ndarray:
    return np.stack([cv2.resize(crop, (size_px, size_px), interpolation=cv2.INTER_AREA) for crop in crops])


@torch.inference_mode()
def _in_batches(function: Callable[[Tensor], Tensor], pixels: np.ndarray) -> FloatArray:
    parts = []
    for start in range(0, len(pixels), 128):
        x = to_tensor(pixels[start : start + 128]).contiguous(memory_format=torch.channels_last)
        parts.append(function(x))
    return torch.cat(parts).numpy()


class MeanFaces:
    """The simplest ager there is: it adds the difference of two mean faces."""

    def __init__(self, faces: FaceSet, rows: IntArray) -> None:
        """Average over the faces `rows`, those of the training split."""
        self._faces, self._rows, self._ages = faces, rows, faces.ages[rows]
        self._means: dict[float, FloatArray] = {}

    def age(self, picture: np.ndarray, landmarks: FloatArray, source: float, target: float, times: float) -> np.ndarray:
        """Return the picture with the masked difference of the mean faces of two ages added, `times` over."""
        delta = times * (self._mean(target) - self._mean(source)) * face_mask(MEAN_FACE_PX)
        made = picture.copy()
        frame = Frame(planes=(made,), pixel_format="rgb24", color=RGB)
        apply_change(frame, Change(delta=delta), align_faces(landmarks[None], MEAN_FACE_PX)[0])
        return made

    def _mean(self, age: float) -> FloatArray:
        """Return the mean face around an age: float32 [3, S, S] in [-1, 1]."""
        if age not in self._means:
            off = np.abs(self._ages - age)
            near = self._rows[off <= max(MEAN_FACE_WITHIN_YEARS, off.min())]
            mean = self._faces.pixels[near].mean(0, dtype=np.float32) / 127.5 - 1
            small = cv2.resize(mean, (MEAN_FACE_PX, MEAN_FACE_PX), interpolation=cv2.INTER_AREA)
            self._means[age] = np.ascontiguousarray(small.transpose(2, 0, 1))
        return self._means[age]


def mask_in_picture(picture: np.ndarray, landmarks: FloatArray) -> FloatArray:
    """Return the blend mask in a picture, by the landmarks [5, 2] that all judging uses: float32 [H, W]."""
    height, width = picture.shape[:2]
    return picture_mask(align_faces(landmarks[None], PICTURE_CROP_PX)[0], PICTURE_CROP_PX, (height, width))


def paste_face(
    picture: np.ndarray, landmarks: FloatArray, donor: np.ndarray, donor_landmarks: FloatArray
) -> np.ndarray:
    """Return the picture with another person's face in the mask, at full resolution."""
    to_crop = align_faces(np.stack([donor_landmarks, landmarks]), PICTURE_CROP_PX)
    crop = cv2.warpAffine(donor, to_crop[0], (PICTURE_CROP_PX, PICTURE_CROP_PX), borderMode=cv2.BORDER_REFLECT_101)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    theirs = cv2.warpAffine(crop, to_crop[1], picture.shape[1::-1], flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return _mix(picture, theirs, mask_in_picture(picture, landmarks))


def blur_face(picture: np.ndarray, landmarks: FloatArray) -> np.ndarray:
    """Return the picture with the face in the mask blurred."""
    return _mix(picture, blur(picture), mask_in_picture(picture, landmarks))


def blur(picture: np.ndarray) -> np.ndarray:
    """Return the whole picture blurred."""
    return cv2.GaussianBlur(picture, (0, 0), BLUR_PX)


def _mix(ours: np.ndarray, theirs: np.ndarray, mask: FloatArray) -> np.ndarray:
    share = mask[..., None]
    return np.clip(np.rint((1 - share) * ours + share * theirs), 0, 255).astype(np.uint8)


def real_pictures(faces: FaceSet, requests: Requests, own: IntArray, seed: int) -> IntArray:
    """Return for each request another validation picture of its target age: rows of `faces` [R].

    Args:
        faces: the validation pictures to choose from.
        requests: for whose targets.
        own: rows of `faces` [F], where the drawn faces are: nobody is given his own picture.
        seed: of the choice.
    """
    random = np.random.default_rng(seed)
    rows = []
    for face, target in zip(requests.faces, requests.targets, strict=True):
        off = np.abs(faces.ages - target)
        off[own[face]] = np.inf
        near = np.flatnonzero(off <= max(REAL_WITHIN_YEARS, off.min()))
        rows.append(random.choice(near))
    return np.array(rows, np.int64)


def unlike_faces(faces: FaceSet, count: int, seed: int) -> list[int]:
    """Return rows of faces that differ in gender, race and age, as far as there are such."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(faces.ages <= AGE_GROUPS[-1][1]))
    chosen: list[int] = []
    for i in range(count):
        fits = (
            (faces.genders[order] == i % len(GENDERS)).astype(int)
            + (faces.races[order] == i // len(GENDERS) % len(RACES))
            + (age_group(faces.ages[order]) == i % len(AGE_GROUPS))
            - 9 * np.isin(order, chosen)
        )
        chosen.append(int(order[fits.argmax()]))
    return chosen
