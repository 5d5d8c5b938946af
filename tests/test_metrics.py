"""The scorecard's metrics, on arrays whose answer is known."""

import math
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # `train` is not installed

from faceage.align import align_faces
from faceage.blend import blend_faces
from faceage.geometry import TEMPLATE_5, face_mask
from faceage.types import RGB, Change, Frame
from train.evaluate import metrics

LANDMARKS = (TEMPLATE_5 * 200 - 0.5).astype(np.float32)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def texture(random):
    """A picture with detail of every size: float32 [160, 160], 0 to 255."""
    layers = [cv2.resize(random.random((n, n)), (160, 160), interpolation=cv2.INTER_CUBIC) for n in (5, 20, 80, 160)]
    return (255 * np.clip(np.mean(layers, 0), 0, 1)).astype(np.float32)


def test_age_figures():
    figures = metrics.age_figures(np.array([20.0, 30, 40, 50]), np.array([25.0, 29, 45, 55]))
    assert figures["n"] == 4
    assert figures["mae"] == 4
    assert figures["bias"] == 3.5
    assert figures["r"] == pytest.approx(np.corrcoef([20, 30, 40, 50], [25, 29, 45, 55])[0, 1])


def test_age_figures_without_a_spread_have_no_correlation():
    assert math.isnan(metrics.age_figures(np.array([20.0, 20, 20]), np.array([1.0, 2, 3]))["r"])
    empty = metrics.age_figures(np.zeros(0), np.zeros(0))
    assert empty["n"] == 0
    assert math.isnan(empty["mae"])


def test_thresholds_let_through_as_much_as_is_allowed(random):
    vectors = random.standard_normal((60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (strict, loose), pairs = metrics.match_thresholds(vectors, [0.001, 0.01])
    assert pairs == 60 * 59 // 2
    cosines = [float(vectors[i] @ vectors[j]) for i in range(60) for j in range(i)]
    assert sum(c > strict + 1e-6 for c in cosines) == math.floor(0.001 * pairs)
    assert sum(c > loose + 1e-6 for c in cosines) == math.floor(0.01 * pairs)


def test_kid_is_nothing_for_one_distribution_and_something_for_two(random):
    def draw(n, mean=0.0):
        return random.standard_normal((n, 16)) + mean

    same = [metrics.kid(draw(200), draw(300)) for _ in range(10)]
    assert abs(np.mean(same)) < 0.01
    assert min(same) < 0 < max(same)  # unbiased, so to both sides
    assert metrics.kid(draw(200), draw(300, 0.5)) > 0.2
    assert metrics.kid(draw(200), draw(300, 1.0)) > metrics.kid(draw(200), draw(300, 0.5))


def test_kid_is_the_formula():
    a, b = np.array([[1.0, 0], [0, 2]]), np.array([[1.0, 1], [2, 0], [0, 0]])

    def k(x, y):
        return (x @ y / 2 + 1) ** 3

    within_a = k(a[0], a[1])
    within_b = np.mean([k(b[i], b[j]) for i in range(3) for j in range(3) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert metrics.kid(a, b) == pytest.approx(within_a + within_b - 2 * between)
    assert math.isnan(metrics.kid(a[:1], b))


def test_sharpness(texture):
    everywhere = np.ones(texture.shape, bool)
    same = metrics.sharpness_ratios(texture, texture, everywhere)
    assert same == {"laplacian": 1, "gradient": 1}
    blurred = metrics.sharpness_ratios(cv2.GaussianBlur(texture, (0, 0), 2), texture, everywhere)
    assert blurred["laplacian"] < blurred["gradient"] < 0.8
    harsher = metrics.sharpness_ratios(2 * texture, texture, everywhere)
    assert harsher == pytest.approx({"laplacian": 2, "gradient": 2})


def test_sharpness_looks_inside_only(texture):
    inside = np.zeros(texture.shape, bool)
    inside[40:80, 40:80] = True
    changed = cv2.GaussianBlur(texture, (0, 0), 2)
    changed[35:85, 35:85] = texture[35:85, 35:85]
    assert metrics.sharpness_ratios(changed, texture, inside) == {"laplacian": 1, "gradient": 1}


@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("angle", [0, 20])
@pytest.mark.parametrize("size", [64, 128])
def test_touchable_is_where_the_blend_writes_and_not_much_more(random, scale, angle, size):
    shape = (360, 380)
    turn = scale * np.exp(1j * np.deg2rad(angle))
    points = (LANDMARKS[:, 0] - 100 + 1j * (LANDMARKS[:, 1] - 100)) * turn
    landmarks = np.stack([points.real + 181.3, points.imag + 170.8], -1).astype(np.float32)
    (matrix,) = align_faces(landmarks[None], size)
    before = random.integers(60, 190, (*shape, 3), np.uint8)
    after = before.copy()
    delta = random.choice([-1.0, 1.0], (3, size, size)).astype(np.float32)
    change = Change(delta=delta * face_mask(size))
    blend_faces(Frame(planes=(after,), pixel_format="rgb24", color=RGB), [change], [1.0], [matrix])
    where = metrics.touchable(matrix, size, shape)
    assert metrics.largest_change(after, before, ~where) == 0
    assert metrics.largest_change(after, before, where) > 30
    mask = metrics.picture_mask(matrix, size, shape) > 0
    ring = cv2.dilate(
        mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=math.ceil(6 * 200 * scale / size) + 1
    )
    assert not (where & (ring == 0)).any()


def test_picture_mask_is_the_crop_s_in_place():
    from faceage.geometry import face_mask

    (matrix,) = align_faces(LANDMARKS[None], 200)
    mask = metrics.picture_mask(matrix, 200, (200, 200))
    np.testing.assert_allclose(mask, face_mask(200), atol=0.02)


def test_largest_change_does_not_wrap_around():
    after, before = np.full((2, 2, 3), 250, np.uint8), np.full((2, 2, 3), 5, np.uint8)
    everywhere = np.ones((2, 2), bool)
    assert metrics.largest_change(after, before, everywhere) == 245
    assert metrics.largest_change(before, after, everywhere) == 245
    assert metrics.largest_change(before, after, ~everywhere) == 0


def shifted(picture, x, y):
    return np.roll(picture, (y, x), (0, 1))


def test_a_change_that_moves_with_the_picture_has_no_warp_error(texture, random):
    delta = cv2.GaussianBlur(random.standard_normal((160, 160)).astype(np.float32), (0, 0), 4)
    flow = np.full((160, 160, 2), (-3, -2), np.float32)  # where a pixel was
    inside = np.zeros((160, 160), bool)
    inside[20:140, 20:140] = True
    residual, change = metrics.warp_residual(shifted(delta, 3, 2), delta, flow, inside)
    assert residual == pytest.approx(0, abs=1e-4 * change)
    stuck, change = metrics.warp_residual(delta, delta, flow, inside)
    assert stuck > 0.3 * change


def test_optical_flow_points_back(texture):
    before = texture.astype(np.uint8)
    flow = metrics.optical_flow(shifted(before, 3, 2), before)[30:130, 30:130]
    np.testing.assert_allclose(np.median(flow, (0, 1)), (-3, -2), atol=0.2)


def test_a_straight_motion_is_no_jitter():
    track = LANDMARKS + np.arange(20, dtype=np.float32)[:, None, None] * [2, 1]
    assert metrics.landmark_jitter(track) == pytest.approx(0, abs=1e-5)


def test_jitter_is_the_second_difference_in_eye_distances(random):
    noise = random.normal(0, 0.5, (4000, 5, 2))
    eyes = LANDMARKS[1, 0] - LANDMARKS[0, 0]
    expected = 0.5 * math.sqrt(2 * 6) / eyes  # variance of x - 2y + z is 6, in two directions
    assert metrics.landmark_jitter(LANDMARKS + noise) == pytest.approx(expected, rel=0.05)


def test_jitter_passes_over_holes():
    track = np.repeat(LANDMARKS[None], 9, 0)
    track[4] += 50
    track[3:6] = np.nan
    assert metrics.landmark_jitter(track) == 0
    assert math.isnan(metrics.landmark_jitter(track[2:5]))
    assert math.isnan(metrics.landmark_jitter(track[:2]))
