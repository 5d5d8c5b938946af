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
    assert_same(maps.halve, noise(12, 20, *channels))
    for sigma in (0.3, 1.0, 3.2):
        assert_same(lambda m, sigma=sigma: maps.blur(m, sigma), noise(40, 30, *channels))


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
    assert_same(lambda m: maps.transform(m, two_rows), rgb)
    assert_same(lambda a, b: maps.mix(a, b, 0.3), values, values[::-1].copy())
    assert_same(maps.clear_rim, noise(3, 9, 9))
    assert_same(lambda m: maps.zeros(2, 3, like=m), values)
    assert_same(lambda m: maps.constant(face_mask, 16, like=m), values)


def test_a_constant_goes_to_a_device_once():
    beside = torch.zeros(1)
    assert maps.constant(face_mask, 32, like=beside) is maps.constant(face_mask, 32, like=beside)
    assert maps.constant(face_mask, 32, like=beside) is not maps.constant(face_mask, 16, like=beside)
