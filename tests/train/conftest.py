"""A tiny UTKFace: one public face under many lights, in the archive's layout and with its kinds of mistakes."""

import hashlib
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # `train` is not installed

FACES = 40
AGES = (1, 16, 25, 26, 31, 38, 47, 55, 63, 80)
SIDE = 200
"""Side of the archive's pictures, px."""
ASTRONAUT = np.array([[204.1, 100.8], [247.5, 104.0], [225.1, 129.0], [201.7, 139.5], [245.5, 142.0]], np.float32)
"""Her eyes, nose and corners of the mouth, in `skimage.data.astronaut()`."""
BAD_NAMES = ("61_1_20170109142408075.jpg.chip.jpg", "44_1_5_20170109142408075.jpg.chip.jpg", "25_0_2_2017.jpg.chip.jpg")
CORRUPT = "33_0_1_20170109142408075.jpg.chip.jpg"
NO_FACE = "34_0_1_20170109142408075.jpg.chip.jpg"


def share(name):
    """Where the split puts a face that is like no other, by its name alone: validation below 0.1."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def face_name(index, *, validation):
    age, gender, race = AGES[index % len(AGES)], index % 2, index % 5
    names = (f"{age}_{gender}_{race}_2017{index:04d}{n:09d}.jpg.chip.jpg" for n in count())
    return next(name for name in names if (share(name) < 0.1) == validation)


def draw_faces():
    """Return UTKFace-like crops, uint8 [N, 200, 200, 3], and their landmarks [N, 5, 2]."""
    import cv2

    from faceage.geometry import TEMPLATE_5, apply_affine, similarity_to_template

    photo = pytest.importorskip("skimage.data").astronaut()
    random = np.random.default_rng(0)
    pictures, landmarks = [], []
    template = (TEMPLATE_5 * SIDE).astype(np.float32)
    centre = template.mean(0)
    for _ in range(FACES):
        turn, scale = np.deg2rad(random.uniform(-8, 8)), random.uniform(0.92, 1.06)
        matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        target = (template - centre) @ matrix.T + centre + random.uniform(-5, 5, 2)
        to_crop = similarity_to_template(ASTRONAUT[None], target.astype(np.float32))
        picture = cv2.warpAffine(photo, to_crop[0], (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT_101)
        light = cv2.resize(random.normal(0, 22, (6, 6)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        picture = np.clip(picture * random.uniform(0.8, 1.1) + light[..., None], 0, 255).astype(np.uint8)
        points = apply_affine(to_crop, ASTRONAUT[None])[0]
        if random.random() < 0.5:
            picture = np.ascontiguousarray(picture[:, ::-1])
            points = (points * [-1, 1] + [SIDE - 1, 0])[[1, 0, 2, 4, 3]]
        pictures.append(picture)
        landmarks.append(points)
    return np.stack(pictures), np.stack(landmarks)


@pytest.fixture(scope="session")
def true_landmarks():
    """The landmarks that `archive` was drawn with, by file name."""
    _, landmarks = draw_faces()
    return {face_name(i, validation=i % 5 == 0): points for i, points in enumerate(landmarks)}


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """A folder of `FACES` faces, every fifth in the validation split, and of files to be skipped."""
    import cv2

    folder = tmp_path_factory.mktemp("data") / "utkface" / "UTKFace"
    folder.mkdir(parents=True)

    def write(name, picture):
        assert cv2.imwrite(str(folder / name), picture[:, :, ::-1])

    pictures, _ = draw_faces()
    for i, picture in enumerate(pictures):
        write(face_name(i, validation=i % 5 == 0), picture)
    for name in BAD_NAMES:
        write(name, pictures[0])
    (folder / CORRUPT).write_bytes(b"\xff\xd8\xff\xe0 not a JPEG")
    write(NO_FACE, np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return folder.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the tests of a session share the aligned faces of `archive`."""
    return tmp_path_factory.mktemp("aligned")


@pytest.fixture(scope="session")
def faces(archive, cache):
    """The archive's faces at 64 px."""
    from train.data import load_faces

    return load_faces(archive, 64, cache)
