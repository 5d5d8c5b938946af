import dataclasses
import hashlib
import logging
import random
import shutil
import tarfile

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from faceage.ages import age_to_classes
from faceage.errors import CheckpointError
from faceage.geometry import TEMPLATE_5, apply_affine, similarity_to_template, template_5

FIELDS = ("pixels", "ages", "genders", "races", "landmarks", "names", "validation")


def assert_same(a, b):
    assert len(a) == len(b)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


@pytest.fixture
def no_detection(monkeypatch):
    """Make any run of O-Net fail."""

    def refuse(pictures):
        raise AssertionError(f"O-Net was run on {len(pictures)} pictures")

    monkeypatch.setattr("train.data.find_landmarks", refuse)


def test_a_tar_in_any_order_gives_the_faces_of_the_folder(archive, faces, tmp_path, caplog):
    from train.data import load_faces

    files = sorted(archive.rglob("*.jpg"))
    random.Random(0).shuffle(files)
    with tarfile.open(tmp_path / "utkface.tar", "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(archive))
    caplog.set_level(logging.INFO)
    loaded = load_faces(tmp_path / "utkface.tar", 64, tmp_path / "cache")
    assert_same(loaded, faces)
    assert "41 faces read, 4 bad names or files skipped, 1 without a clear face dropped" in caplog.messages


def test_labels_come_from_the_names(faces):
    assert len(faces) == 40
    assert faces.pixels.shape == (40, 64, 64, 3)
    assert faces.pixels.dtype == np.uint8
    assert faces.ages.dtype == np.float32
    for name, age, gender, race in zip(faces.names, faces.ages, faces.genders, faces.races, strict=True):
        assert name.startswith(f"{age:.0f}_{gender}_{race}_")
    assert set(faces.ages) == {1, 16, 25, 26, 31, 38, 47, 55, 63, 80}
    assert set(faces.genders) == {0, 1}
    assert set(faces.races) == {0, 1, 2, 3, 4}


def test_landmarks_are_where_the_face_was_drawn(faces, true_landmarks):
    truth = np.stack([true_landmarks[name] for name in faces.names])
    distance = np.linalg.norm(faces.landmarks - truth, axis=2)
    assert np.median(distance) < 2.5  # of 200 px
    assert distance.max() < 10


def test_crops_are_aligned_to_the_template(faces):
    template = TEMPLATE_5 * 64 - 0.5
    points = apply_affine(similarity_to_template(faces.landmarks, template_5(64)), faces.landmarks)
    assert np.abs(points - template).max() < 3.5  # a similarity cannot fit her wide smile
    np.testing.assert_allclose(points.mean(1), np.tile(template.mean(0), (40, 1)), atol=1e-3)
    assert np.abs(points[:, :2] - template[:2]).mean() < 1
    # The eyes' pixels lie there too: pupils and lashes are the darkest of their row.
    mean = faces.pixels.astype(np.float32).mean((0, 3))
    mean = (mean + mean[:, ::-1]) / 2
    eye_y, eye_x = np.round(template[0, ::-1]).astype(int)
    assert mean[eye_y, eye_x] < mean[eye_y + 8, eye_x] - 20  # the cheek below


def test_rows_and_splits(faces):
    assert len(faces.train) + len(faces.val) == len(faces)
    assert len(faces.val) == 8
    assert set(faces.train.names).isdisjoint(faces.val.names)
    assert list(faces.rows(np.array([3, 1])).names) == [faces.names[3], faces.names[1]]
    assert tuple(field.name for field in dataclasses.fields(faces)) == FIELDS


def test_the_cache_is_used_again_at_any_size(archive, cache, faces, no_detection):
    from train.data import load_faces

    assert_same(load_faces(archive, 64, cache), faces)
    assert load_faces(archive, 128, cache).pixels.shape == (40, 128, 128, 3)


def test_another_archive_is_not_read_from_the_cache(archive, cache, faces, no_detection, tmp_path):
    from train.data import load_faces

    shutil.copytree(archive, tmp_path / "copy")
    with pytest.raises(AssertionError, match="O-Net was run on 41"):
        load_faces(tmp_path / "copy", 64, cache)


def test_nothing_is_cached_when_preparing_fails(archive, no_detection, tmp_path):
    from train.data import load_faces

    with pytest.raises(AssertionError, match="O-Net"):
        load_faces(archive, 64, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def split(archive, cache, faces, teacher, tmp_path, monkeypatch):
    """Run train.split on the tiny archive; with the teacher's embeddings given, returns the validation names."""
    from train import split

    monkeypatch.setattr(split, "VALIDATION_FILE", tmp_path / "validation.txt")

    def run(embeddings):
        monkeypatch.setattr(split, "teacher_embeddings", lambda *_: torch.from_numpy(embeddings).expand(2, -1, -1))
        args = ["--data", archive, "--teacher", teacher, "--cache", cache]
        CliRunner().invoke(split.main, [str(arg) for arg in args], catch_exceptions=False)
        return set((tmp_path / "validation.txt").read_text().split())

    return run


def by_name(name):
    """Where a shoot of one picture is drawn: validation below 0.1."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def test_the_split_draws_shoots_by_name_and_leaves_straddling_people_to_training(faces, split, monkeypatch):
    monkeypatch.setattr("train.split.SAME_SHOOT_CORRELATION", 2.0)  # every picture is a shoot of its own
    drawn = {name for name in faces.names if by_name(name) < 0.1}
    assert 0 < len(drawn) < 12
    strangers = np.eye(len(faces), dtype=np.float32)
    assert split(strangers) == drawn
    people = strangers.copy()
    twice = sorted(drawn)[0]
    people[list(faces.names).index(sorted(set(faces.names) - drawn)[0])] = people[list(faces.names).index(twice)]
    assert split(people) == drawn - {twice}


def test_clusters_link_what_is_close_by_a_chain():
    from train.split import clusters

    angles = np.deg2rad([0, 90, 20, 200, 40, 95])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert list(clusters(vectors, np.cos(np.deg2rad(25)))) == [0, 1, 0, 3, 0, 1]  # 0 and 40 degrees by way of 20


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
def test_balanced_weights_give_a_bin_of_n_its_power_of_the_mass(power):
    from train.data import balanced_weights

    ages = np.array([21] * 90 + [72] * 9 + [3], np.float32)
    weights = balanced_weights(ages, power)
    assert weights.sum() == pytest.approx(1)
    mass = np.array([weights[ages == age].sum() for age in (21, 72, 3)])
    np.testing.assert_allclose(mass, mass[2] * np.array([90, 9, 1.0]) ** (1 - power))


def test_the_very_old_share_the_last_bin():
    from train.data import balanced_weights

    weights = balanced_weights(np.array([96, 100, 116], np.float32), 1.0)
    np.testing.assert_allclose(weights, 1 / 3)


@pytest.fixture
def labelled():
    """A thousand faces without a face: each pixel tells its row, its column and its face."""
    from train.data import FaceSet

    ages = np.array([22] * 900 + [71] * 100, np.float32)
    pixels = np.zeros((1000, 4, 4, 3), np.uint8)
    pixels[..., 0] = np.arange(4) * 60
    pixels[..., 1] = np.arange(4)[:, None] * 60
    pixels[..., 2] = np.where(ages == 71, 255, 0)[:, None, None]
    none = np.zeros(1000, np.int64)
    return FaceSet(pixels, ages, none, none, np.zeros((1000, 5, 2)), none.astype(str), none.astype(bool))


def test_batches_lift_rare_ages_and_keep_labels_with_faces(labelled):
    from train.data import Sampler

    before = labelled.pixels.copy()
    x, y, ages = Sampler(labelled, 2000, seed=0, power=0.5)()
    assert x.shape == (2000, 3, 4, 4)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(x[:, 2, 0, 0] > 0, ages == 71)
    np.testing.assert_array_equal(y, age_to_classes(ages))
    assert (ages == 71).mean() == pytest.approx(0.25, abs=0.04)  # sqrt(100) of sqrt(100) + sqrt(900), not a tenth
    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(x[mirrored, 0].flip(2), x[~mirrored][:1, 0].expand(int(mirrored.sum()), 4, 4))
    assert (x[:, 1].diff(dim=1) > 0).all()  # never upside down
    np.testing.assert_array_equal(labelled.pixels, before)


def test_a_seed_is_one_sequence_of_batches(labelled):
    from train.data import Sampler

    a, b, c = Sampler(labelled, 16, 5), Sampler(labelled, 16, 5), Sampler(labelled, 16, 6)
    first, second = a.indices(), a.indices()
    np.testing.assert_array_equal(first, b.indices())
    assert (first != second).any()
    assert (first != c.indices()).any()


@pytest.mark.parametrize("count", [3, 8, 21])
def test_shift_and_jitter_is_differentiable(count):
    from train.augment import shift_and_jitter

    torch.manual_seed(0)
    x = torch.rand(count, 3, 16, 16, requires_grad=True)
    out = shift_and_jitter(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum((1, 2, 3)) > 0).all()


def test_a_shift_moves_pixels_and_repeats_the_rim():
    from train.augment import shift_and_jitter

    torch.manual_seed(0)
    x = torch.rand(64, 3, 16, 16)
    out = shift_and_jitter(x, shift_px=2, colour=0)
    padded = torch.nn.functional.pad(x, [2] * 4, mode="replicate")
    moves = set()
    for picture, source in zip(out, padded, strict=True):
        found = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.allclose(picture, source[:, dy : dy + 16, dx : dx + 16], atol=1e-5)
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) > 4


def test_jitter_changes_brightness_and_contrast_within_bounds():
    from train.augment import shift_and_jitter

    torch.manual_seed(0)
    x = torch.rand(256, 3, 16, 16)
    out = shift_and_jitter(x, shift_px=0, colour=0.2)
    contrast = out.std((2, 3)) / x.std((2, 3))
    np.testing.assert_allclose(contrast, contrast[:, :1].expand(-1, 3), rtol=1e-3)  # one gain for all channels
    assert 0.8 <= float(contrast.min()) < 0.83 < 1.17 < float(contrast.max()) <= 1.2
    moved = (out - x).mean((2, 3)).abs()
    assert 0.2 < float(moved.max()) <= 0.3  # colour * 1.5
    np.testing.assert_allclose(shift_and_jitter(x, shift_px=0, colour=0), x, atol=1e-5)


def test_warped_faces_reach_any_template(archive, faces):
    from train.data import read_archive, warp_faces
    from train.readers.teacher import TEMPLATE_96X112

    data = dict(read_archive(archive))
    pictures = [cv2.imdecode(np.frombuffer(data[name], np.uint8), cv2.IMREAD_COLOR) for name in faces.names[:3]]
    warped = warp_faces(pictures, faces.landmarks[:3], TEMPLATE_96X112, 96, 112)
    assert warped.shape == (3, 112, 96, 3)
    x, y = TEMPLATE_96X112[0].round().astype(int)
    gray = warped.astype(np.float32).mean((0, 3))
    assert gray[y, x] < gray[y + 12, x] - 20  # eye and cheek


def test_an_archive_of_another_layout_is_refused(tmp_path):
    from train.data import load_faces

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "25_0_0_20170101000000000.jpg").write_bytes(b"not the official name")
    with pytest.raises(CheckpointError, match=r"no face of UTKFace's layout.*\(1 other names"):
        load_faces(tmp_path / "photos", 64, tmp_path / "cache")


def test_faces_without_a_split_are_refused(archive, cache, tmp_path, monkeypatch):
    from train.data import load_faces

    (tmp_path / "validation.txt").write_text("1_0_0_20170101000000000.jpg.chip.jpg\n")
    monkeypatch.setattr("train.data.VALIDATION_FILE", tmp_path / "validation.txt")
    with pytest.raises(CheckpointError, match=r"none of the pictures that validation\.txt keeps"):
        load_faces(archive, 64, cache)


def test_photos_of_all_age_faces_are_split_by_the_hash_of_their_name():
    from train.data import is_validation

    names = [f"{number:05d}A{20 + number % 60}.jpg" for number in range(4000)]
    kept = [name for name in names if is_validation(name)]
    assert len(kept) / len(names) == pytest.approx(1 / 8, abs=0.02)
    assert is_validation("00013A33.jpg") == (hashlib.sha256(b"00013A33.jpg").digest()[0] % 8 == 0)
    assert not is_validation("1_0_0_20170101000000000.jpg.chip.jpg")
