"""The space model's parameters: what is fitted in closed form, and what is taken for a crease."""

import cv2
import numpy as np
import torch

from faceage.kernels import RGB_LUMA
from train.space.coordinate_maps import Shapes, fit, identity_map
from train.space.coordinates import read_map
from train.space.hair import recolour
from train.space.model import EXPOSURE_PX, EXPOSURE_TAKEN, LUMA_PX, blur, change_maps, creases


def test_a_map_that_is_linear_in_its_weights_is_found():
    random = np.random.default_rng(0)
    identity = identity_map(16)
    linear = random.normal(0, 0.3, (12, 2, 1, 1)) * np.ones((1, 1, 16, 16))
    weights = random.normal(0, 1, (600, 12)) * ([0.05] * 10 + [1, 1])  # landmarks and shapes
    linear[10:] *= 0.05
    expected = identity + np.einsum("nk,kcij->ncij", weights, linear)
    maps = expected.copy()
    maps[::3, :, :3] = np.nan  # pixels that some faces do not cover
    maps[:, :, :, -1] = np.nan  # and that none does
    bias, found = fit(maps, weights)
    np.testing.assert_allclose(bias + np.einsum("nk,kcij->ncij", weights, found), expected, atol=0.01)


def test_shapes_say_what_landmarks_do_not():
    random = np.random.default_rng(0)
    offsets, shapes = random.normal(0, 0.05, (800, 10)), random.normal(0, 1, (800, 3))
    by_landmarks, by_shapes = random.normal(0, 30, (10, 936)), random.normal(0, 1, (3, 936))
    meshes = 64 + offsets @ by_landmarks + shapes @ by_shapes
    model = Shapes.of(meshes.reshape(800, 468, 2), offsets, 3)
    read = model(meshes.reshape(800, 468, 2), offsets)
    assert np.allclose(read.std(0), 1, atol=0.1)
    made = model.mean + offsets @ model.linear + read @ model.directions
    np.testing.assert_allclose(made, meshes, atol=0.05)


def test_a_map_is_read_between_its_samples():
    points = torch.tensor([[[10.0, 20.0], [31.25, 7.5]]])
    axis = torch.arange(32.0)
    own = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None]
    read = read_map(own, points, 64)
    assert torch.allclose(read[0], (points[0] + 0.5) / 2 - 0.5, atol=1e-4)


def test_a_few_maps_make_every_change():
    random = np.random.default_rng(0)
    basis = np.stack([cv2.GaussianBlur(random.normal(size=(64, 64, 3)), (0, 0), 2) for _ in range(5)]).astype(
        np.float32
    )
    coefficients = np.tensordot(random.normal(size=(30, 5)).astype(np.float32), basis, 1)
    features = random.normal(size=(200, 30)).astype(np.float32)
    inside = np.ones((64, 64), np.float32)
    made = change_maps(coefficients, features, inside)
    difference = features[1] - features[0]
    luma = np.tensordot(made["mixing"] @ difference, made["luma"], 1)
    whole = np.tensordot(difference, coefficients, 1) @ RGB_LUMA
    whole = whole - EXPOSURE_TAKEN * blur(whole, EXPOSURE_PX, inside)
    expected = cv2.resize(whole, (LUMA_PX, LUMA_PX), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(luma, expected, atol=1e-3 * np.abs(expected).max())


def test_a_line_is_a_crease_and_a_blotch_is_not():
    inside = np.ones((256, 256), np.float32)
    prototype = np.full((256, 256, 3), np.log(0.5 + 0.04), np.float32)
    face = np.full((256, 256, 3), 128, np.uint8)
    cv2.line(face, (60, 100), (120, 110), (90, 90, 90), 2)
    cv2.circle(face, (180, 180), 7, (90, 90, 90), -1)
    found = creases(face, prototype, inside)
    line = np.abs(found[95:115, 70:110]).max(1).mean()
    assert found[104:108, 85:95].min() < -0.1
    assert np.abs(found[178:183, 178:183]).mean() < 0.3 * line


def test_hair_is_recoloured_and_skin_is_not():
    head = np.full((64, 64, 3), 150, np.uint8)
    head[:20] = 30
    mask = np.zeros((64, 64), np.float32)
    mask[:20] = 1
    made = recolour(head, mask, np.random.default_rng(1))
    assert (made[20:] == head[20:]).all()
    assert np.abs(made[:20].astype(int) - 30).mean() > 10
