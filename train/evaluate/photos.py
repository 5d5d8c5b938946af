"""Labelled photos of one face each, read from the data sets that the product is measured on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np

from faceage.detect import Detector
from faceage.errors import MediaError
from faceage.types import RGB, FloatArray, Frame, IntArray
from train.data import (
    AAF_LAST_WOMAN,
    AAF_NAME,
    UTKFACE_NAME,
    archive_names,
    find_landmarks,
    is_validation,
    read_archive,
)

UNKNOWN = -1
MIN_SCORE = 0.9
"""Probability of a face below which a photo is left out."""
_FGNET_NAME = re.compile(r"(\d{3})[Aa](\d{2})[A-Za-z]?\.jpg", re.IGNORECASE)
_BATCH = 32


@dataclass(frozen=True)
class Photos:
    """N photos and their labels."""

    names: np.ndarray
    pictures: np.ndarray
    """object [N], each uint8 [H, W, 3], RGB."""
    ages: FloatArray
    """[N], years."""
    genders: IntArray
    """[N], 0 male, 1 female, `UNKNOWN`: the data set's own labels."""
    races: IntArray
    """[N], UTKFace's labels, or `UNKNOWN`."""
    landmarks: FloatArray
    """float32 [N, 5, 2], picture pixels."""

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, which: np.ndarray) -> Photos:
        """Return the photos that a mask or an index array selects."""
        return Photos(*(getattr(self, field.name)[which] for field in fields(self)))

    def aged(self, first: float, last: float) -> IntArray:
        """Return the rows of people of these ages, both included."""
        return np.flatnonzero((self.ages >= first) & (self.ages <= last))


Label = tuple[int, int, int]
"""Age, gender, race."""
Ages = Sequence[tuple[int, int]]
"""Ranges of ages, first and last."""


def read_utkface(archive: Path, ages: Ages) -> Photos:
    """Read UTKFace's validation pictures of some ages; the landmarks are O-Net's, as in training."""
    return _read_utkface(archive, lambda name, age: is_validation(name) and _within(age, ages))


def read_utkface_sample(archive: Path, ages: tuple[int, int], count: int) -> Photos:
    """Read about `count` pictures of all of UTKFace, training ones too, for the mean of an age."""
    names = [name for name in archive_names(archive) if (label := _utkface_label(name)) and _within(label[0], [ages])]
    chosen = set(np.random.default_rng(0).permutation(sorted(names))[:count].tolist())
    return _read_utkface(archive, lambda name, _: name in chosen)


def _utkface_label(name: str) -> Label | None:
    match = UTKFACE_NAME.fullmatch(name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _within(age: int, ages: Ages) -> bool:
    return any(first <= age <= last for first, last in ages)


def _read_utkface(archive: Path, keep: Callable[[str, int], bool]) -> Photos:
    def label(name: str) -> Label | None:
        its = _utkface_label(name)
        return its if its and keep(name, its[0]) else None

    names, pictures, labels = _read(read_archive(archive), label, f"such pictures of UTKFace in {archive}")
    return _photos(names, pictures, labels, *find_landmarks(pictures))


def read_aaf(archive: Path, detector: Detector, ages: Ages) -> Photos:
    """Read the validation photos of All-Age-Faces of some ages: whole heads."""

    def label(name: str) -> Label | None:
        match = AAF_NAME.fullmatch(name)
        if not match or not is_validation(name) or not _within(int(match[2]), ages):
            return None
        return int(match[2]), int(int(match[1]) <= AAF_LAST_WOMAN), UNKNOWN

    names, pictures, labels = _read(read_archive(archive), label, f"validation photos of All-Age-Faces in {archive}")
    return _photos(names, pictures, labels, *largest_faces(detector, pictures))


def read_fgnet(archive: Path, detector: Detector, first_age: int) -> tuple[Photos, IntArray]:
    """Read FG-NET's photos from an age on.

    Returns:
        The photos, and the person that each shows: int64 [N].
    """

    def label(name: str) -> Label | None:
        match = _FGNET_NAME.fullmatch(name)
        return (int(match[2]), UNKNOWN, UNKNOWN) if match and int(match[2]) >= first_age else None

    names, pictures, labels = _read(read_archive(archive), label, f"photos of FG-NET in {archive}")
    photos = _photos(names, pictures, labels, *largest_faces(detector, pictures))
    return photos, np.array([int(name[:3]) for name in photos.names.tolist()])


def largest_faces(detector: Detector, pictures: list[np.ndarray]) -> tuple[FloatArray, FloatArray]:
    """Find the largest face of each picture.

    Returns:
        landmarks float32 [N, 5, 2] in picture pixels, and scores float32 [N], 0 where no face was found.
    """
    landmarks, scores = np.zeros((len(pictures), 5, 2), np.float32), np.zeros(len(pictures), np.float32)
    for start in range(0, len(pictures), _BATCH):
        some = pictures[start : start + _BATCH]
        faces = detector.detect([Frame(planes=(picture,), pixel_format="rgb24", color=RGB) for picture in some])
        area = np.prod(faces.boxes[:, 2:] - faces.boxes[:, :2], axis=1)
        for face in np.argsort(area):  # the largest is written last
            landmarks[start + faces.frame_index[face]] = faces.landmarks[face]
            scores[start + faces.frame_index[face]] = faces.scores[face]
    return landmarks, scores


def _read(
    files: Iterator[tuple[str, bytes]], label: Callable[[str], Label | None], what: str
) -> tuple[list[str], list[np.ndarray], list[Label]]:
    names, pictures, labels = [], [], []
    for name, data in files:
        its = label(name)
        picture = None if its is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if its is not None and picture is not None:
            names.append(name)
            pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
            labels.append(its)
    if not names:
        raise MediaError(f"found no {what}; give the archive as it is published, a tar or a folder")
    return names, pictures, labels


def _photos(
    names: list[str], pictures: list[np.ndarray], labels: list[Label], landmarks: FloatArray, scores: FloatArray
) -> Photos:
    boxed = np.empty(len(pictures), object)
    boxed[:] = pictures
    ages, genders, races = np.array(labels).T
    every = Photos(np.array(names), boxed, ages.astype(np.float32), genders, races, landmarks.astype(np.float32))
    return every.rows(np.flatnonzero(scores >= MIN_SCORE))


def draw_alike(labels: np.ndarray, wanted: np.ndarray, count: int, random: np.random.Generator) -> IntArray:
    """Draw rows whose labels are mixed as those of another set, so that only age tells the two sets apart.

    Args:
        labels: int [N], one label a row to draw from.
        wanted: int [M], the labels of the other set.
        count: rows to draw; fewer where a label has too few.
        random: draws.
    """
    rows = []
    for label, number in zip(*np.unique(wanted, return_counts=True), strict=True):
        pool = random.permutation(np.flatnonzero(labels == label))
        rows.append(pool[: round(count * number / len(wanted))])
    return np.sort(np.concatenate(rows))
