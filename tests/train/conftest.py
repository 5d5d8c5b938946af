"""A tiny UTKFace: one public face under many lights, in the archive's layout and with its kinds of mistakes."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # `train` is not installed
sys.path.insert(0, str(Path(__file__).parent))  # `tiny`

FACES = 40
AGES = (1, 16, 25, 26, 31, 38, 47, 55, 63, 80)
SIDE = 200
"""Side of the archive's pictures, px."""
ASTRONAUT = np.array([[204.1, 100.8], [247.5, 104.0], [225.1, 129.0], [201.7, 139.5], [245.5, 142.0]], np.float32)
"""Her eyes, nose and corners of the mouth, in `skimage.data.astronaut()`."""
BAD_NAMES = ("61_1_20170109142408075.jpg.chip.jpg", "44_1_5_20170109142408075.jpg.chip.jpg", "25_0_2_2017.jpg.chip.jpg")
CORRUPT = "33_0_1_20170109142408075.jpg.chip.jpg"
NO_FACE = "34_0_1_20170109142408075.jpg.chip.jpg"


def face_name(index):
    age, gender, race = AGES[index % len(AGES)], index % 2, index % 5
    return f"{age}_{gender}_{race}_2017{index:04d}000000000.jpg.chip.jpg"


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
    return {face_name(i): points for i, points in enumerate(landmarks)}


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """A folder of `FACES` faces and of files to be skipped."""
    import cv2

    folder = tmp_path_factory.mktemp("data") / "utkface" / "UTKFace"
    folder.mkdir(parents=True)

    def write(name, picture):
        assert cv2.imwrite(str(folder / name), picture[:, :, ::-1])

    pictures, _ = draw_faces()
    for i, picture in enumerate(pictures):
        write(face_name(i), picture)
    for name in BAD_NAMES:
        write(name, pictures[0])
    (folder / CORRUPT).write_bytes(b"\xff\xd8\xff\xe0 not a JPEG")
    write(NO_FACE, np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return folder.parent


@pytest.fixture(scope="session", autouse=True)
def validation_file(tmp_path_factory):
    """Put every fifth face of `archive`, of 26 or 63 years, into the validation split."""
    file = tmp_path_factory.mktemp("split") / "validation.txt"
    file.write_text("".join(f"{face_name(i)}\n" for i in range(3, FACES, 5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.data.VALIDATION_FILE", file)
        yield file


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A teacher that knows nothing."""
    import torch

    from train.readers.teacher import MobileFaceNet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    torch.save({"net_state_dict": MobileFaceNet().state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the tests of a session share the aligned faces of `archive`."""
    return tmp_path_factory.mktemp("aligned")


@pytest.fixture(scope="session")
def faces(archive, cache):
    """The archive's faces at 64 px, found on one thread: on some CPUs two add up in another order."""
    import torch

    from train.data import load_faces

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return load_faces(archive, 64, cache)
    finally:
        torch.set_num_threads(threads)
