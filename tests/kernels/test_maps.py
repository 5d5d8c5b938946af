import cv2
import numpy as np
import pytest
import torch

from faceage.geometry import face_mask
from faceage.kernels import maps

ATOL = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def noise(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def assert_same(operation, *arrays, atol=ATOL):
    """Of tensors an operation gives tensors, with the same values as of arrays."""
    of_tensors = operation(*(torch.from_numpy(array.copy()).to(DEVICE) for array in arrays))
    of_arrays = operation(*arrays)
    assert isinstance(of_arrays, np.ndarray)
    assert isinstance(of_tensors, torch.Tensor)
    assert of_tensors.shape == of_arrays.shape
    np.testing.assert_allclose(of_tensors.cpu().numpy(), of_arrays, atol=atol)


@pytest.mark.parametrize("channels", [(), (2,), (3,), (4,)], ids=str)
def test_maps_are_resized_halved_and_blurred(channels):
    for shape, size in (((12, 20), (31, 50)), ((24, 20), (24, 20)), ((24, 20), (12, 10)), ((16, 16), (128, 128))):
        assert_same(lambda m, size=size: maps.resize(m, *size), noise(*shape, *channels))
    assert_same(lambda m: maps.resize(m, 40, 33, is_cubic=True), noise(24, 20, *channels))
    assert_same(maps.halve, noise(12, 20, *channels))
    for size in (9, 12, 16, 31):
        assert_same(lambda m, size=size: maps.shrink(m, size), noise(36, 36, *channels))
    for sigma in (0.3, 1.0, 3.2):
        assert_same(lambda m, sigma=sigma: maps.blur(m, sigma), noise(40, 30, *channels))


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.31, 1.0, 3.2])
def test_a_blur_whose_width_a_device_knows_is_that_of_a_known_width(sigma):
    def blurred(m):
        known = isinstance(m, np.ndarray)
        return maps.blur_within(m, sigma if known else torch.tensor(sigma, device=m.device), 0.3, 3.2)

    assert_same(blurred, noise(40, 30, 4))


@pytest.mark.parametrize("channels", [(), (3,)], ids=str)
@pytest.mark.parametrize("is_replicated", [False, True])
def test_maps_are_moved(channels, is_replicated):
    matrix = np.array([[0.8, 0.3, -4], [-0.3, 0.8, 9]], np.float32)
    for size in (20, 60):
        assert_same(
            lambda m, size=size: maps.warp(m, matrix, size, is_replicated=is_replicated), noise(40, 30, *channels)
        )


@pytest.mark.parametrize("is_replicated", [False, True])
def test_filters_of_what_is_around_a_pixel(is_replicated):
    assert_same(lambda m: maps.mean_around(m, 7, is_replicated=is_replicated), noise(40, 30))
    for side in (3, 9):
        assert_same(lambda m, side=side: maps.dilate(m, side), noise(40, 30))
        assert_same(lambda m, side=side: maps.erode(m, side), noise(40, 30))
    for diameter, sigma in ((3, 3.0), (-1, 2.8)):
        assert_same(
            lambda m, diameter=diameter, sigma=sigma: maps.bilateral(m, diameter, 0.3, sigma), noise(40, 30), atol=1e-4
        )


def test_what_is_connected_is_found_around_corners():
    rng = np.random.default_rng(1)
    walls = np.zeros((60, 70), np.float32)
    walls[::6], walls[:, ::9] = 1, 1
    walls[rng.random(walls.shape) < 0.12] = 0
    diagonal = np.eye(60, 70, 1, dtype=np.float32)
    seeds = np.zeros(walls.shape, bool)
    seeds[28:32, 33:36] = True
    for mask in (walls, diagonal, 0 * walls, 0 * walls + 1):
        assert_same(lambda m: maps.connected(m, maps.constant(lambda: seeds, like=m)), mask)
    found = maps.connected(walls, seeds)
    assert 0 < found.sum() < walls.sum()


@pytest.mark.parametrize("channels", [(), (3,), (4,)], ids=str)
def test_maps_are_read_where_they_are_told(channels):
    values = cv2.GaussianBlur(noise(40, 30, *channels), (0, 0), 1.5)
    where = noise(25, 27, 2) * (20, 25) + (15, 20)  # over the rims, where zeros are
    steps = max(float(np.abs(np.diff(values, axis=axis)).max()) for axis in (0, 1))
    # OpenCV reads one and three channels exactly, others at steps of 1/32 of a pixel.
    atol = 2 * steps / 64 if channels == (4,) else ATOL
    assert_same(maps.remap, values, where.astype(np.float32), atol=atol)


def two_rows():
    return np.arange(6, dtype=np.float32).reshape(2, 3)


def test_values_are_computed_alike():
    values, rgb = noise(9, 7), noise(9, 7, 3)
    assert_same(maps.exp, values)
    assert_same(maps.luma_of, rgb)
    assert_same(maps.by_planes, rgb)
    assert_same(lambda m: maps.channel(m, 1), rgb)
    assert_same(lambda m: maps.channels(m)[2], rgb)
    assert_same(lambda m: maps.stacked([m, 2 * m, m]), values)
    assert_same(maps.times, rgb, values)
    assert_same(lambda m: maps.transform(m, two_rows), rgb)
    assert_same(lambda a, b: maps.mix(a, b, 0.3), values, values[::-1].copy())
    assert_same(maps.clear_rim, noise(3, 9, 9))
    assert_same(lambda m: maps.zeros(2, 3, like=m), values)
    assert_same(lambda m: maps.constant(face_mask, 16, like=m), values)
    assert_same(maps.luma_of_planes, noise(3, 9, 7))
    assert_same(maps.by_pixels, noise(3, 9, 7))
    assert_same(lambda m: maps.weighted_sum(np.float32([0.2, 3]), m), noise(2, 5, 6))
    assert_same(lambda m: maps.weighted_sum(np.float32([0.2, 3]), [m[4], m[1]]), noise(5, 4, 6))
    assert_same(lambda m: maps.median(m), rgb)


def test_numbers_stay_where_maps_are():
    values = noise(9, 8)
    for array, want in ((values, float(np.median(values[values > 0.2]))), (values - 2, 0.0)):
        tensor = torch.from_numpy(array).to(DEVICE)
        assert maps.median_where(array, array > 0.2) == want
        assert maps.median_where(tensor, tensor > 0.2).item() == pytest.approx(want)
    for array in (values, noise(1)[0]):
        assert isinstance(maps.number(array.mean()), float)
    tensor = torch.tensor(3.0)
    assert maps.number(tensor) is tensor
    assert maps.single(2.0).dtype == np.float32
    assert maps.single(tensor.double()).dtype == torch.float32
    for value, want in ((3.0, 2.0), (-1.0, 0.5), (1.0, 1.0)):
        assert maps.limit(value, 0.5, 2.0) == maps.limit(torch.tensor(value), 0.5, 2.0).item() == want


def test_a_constant_goes_to_a_device_once():
    beside = torch.zeros(1)
    assert maps.constant(face_mask, 32, like=beside) is maps.constant(face_mask, 32, like=beside)
    assert maps.constant(face_mask, 32, like=beside) is not maps.constant(face_mask, 16, like=beside)
