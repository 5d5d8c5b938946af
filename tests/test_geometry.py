import cv2
import numpy as np
import pytest

from faceage.errors import ShapeError
from faceage.geometry import (
    TEMPLATE_5,
    apply_affine,
    face_mask,
    invert_affine,
    similarity_to_template,
    skin_mask,
    skin_masks,
    template_5,
)


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Umeyama 1991, by SVD, in float64."""
    source, target = source.astype(np.float64), target.astype(np.float64)
    s, t = source - source.mean(0), target - target.mean(0)
    u, singular, vt = np.linalg.svd(t.T @ s / len(s))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (singular * sign).sum() / s.var(0).sum()
    return np.hstack([scale * rotation, (target.mean(0) - scale * rotation @ source.mean(0))[:, None]])


def random_faces(count: int, noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    angle, size = rng.uniform(-np.pi, np.pi, count), rng.uniform(10, 400, count)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    points = (TEMPLATE_5 + rng.normal(0, noise, (count, 5, 2))) @ turn * size[:, None, None]
    return (points + rng.uniform(0, 1920, (count, 1, 2))).astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
def test_similarity_is_umeyamas(noise):
    faces, template = random_faces(200, noise), template_5(128)
    got = similarity_to_template(faces, template)
    want = np.stack([umeyama(face, template) for face in faces])
    assert got.dtype == np.float32
    # Compared by what they do to the face: an offset of 1e3 px has 1e-4 px of float32 rounding on its own.
    mapped = [(faces.astype(np.float64) @ m[..., :2].swapaxes(1, 2) + m[:, None, :, 2]) for m in (got, want)]
    np.testing.assert_allclose(got[..., :2], want[..., :2], atol=1e-4)
    np.testing.assert_allclose(mapped[0], mapped[1], atol=1e-3)


def test_similarity_of_an_exact_face_hits_the_template():
    template = template_5(96)
    mapped = apply_affine(similarity_to_template(random_faces(50, 0.0), template), random_faces(50, 0.0))
    np.testing.assert_allclose(mapped, np.broadcast_to(template, mapped.shape), atol=2e-3)


def test_similarity_of_no_face():
    assert similarity_to_template(np.zeros((0, 5, 2), np.float32), template_5(64)).shape == (0, 2, 3)


def test_similarity_checks_shapes():
    with pytest.raises(ShapeError, match=r"\(2, 4, 2\)"):
        similarity_to_template(np.zeros((2, 4, 2), np.float32), template_5(64))


def test_inverse_round_trip():
    points = random_faces(100, 0.1)
    matrix = similarity_to_template(points, template_5(128))
    back = apply_affine(invert_affine(matrix), apply_affine(matrix, points))
    np.testing.assert_allclose(back, points, atol=5e-3)
    np.testing.assert_allclose(invert_affine(invert_affine(matrix)), matrix, rtol=1e-4, atol=1e-3)


def test_apply_affine_is_the_formula():
    matrix = np.array([[2, 1, 10], [0, 3, -5]], np.float32)
    np.testing.assert_array_equal(apply_affine(matrix, np.array([[1, 2]], np.float32)), [[14, 1]])


def test_scale():
    face = template_5(200)[None]
    (matrix,) = similarity_to_template(face, template_5(100))
    np.testing.assert_allclose(matrix[:, :2], np.eye(2) / 2, atol=1e-6)


def test_template_is_symmetric():
    mirrored = TEMPLATE_5[[1, 0, 2, 4, 3]] * [-1, 1] + [1, 0]
    np.testing.assert_allclose(mirrored, TEMPLATE_5, atol=1e-6)


def test_template_scales_about_the_corner_of_the_first_pixel():
    small, large = template_5(64), template_5(128)
    np.testing.assert_allclose((small + 0.5) * 2 - 0.5, large, atol=1e-4)


def test_skin_is_where_neither_eyes_nor_mouth_are():
    mask = skin_mask(128)
    left, right, nose, *corners = np.rint(template_5(128)).astype(int)
    mouth = np.mean(corners, 0).astype(int)
    assert mask[left[1], left[0]] == mask[right[1], right[0]] == mask[mouth[1], mouth[0]] == 0
    assert mask[nose[1], nose[0]] == mask[left[1] + 12, left[0]] == mask[40, 64] == 1  # nose, eye bag, root of the nose
    np.testing.assert_allclose(mask, mask[:, ::-1], atol=1e-6)
    assert not mask.flags.writeable


def test_skin_masks_follow_the_face():
    template = template_5(128)
    moved = template + np.float32([[6, -3], [6, -3], [0, 0], [-4, 5], [-4, 5]])
    smiling = template + np.float32([[0, 0], [0, 0], [0, 0], [-5, 0], [5, 0]])
    angle = np.deg2rad(8)
    turn = np.float32([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    rolled = (template - 63.5) @ turn + 63.5
    same, after, wide, tilted = skin_masks(np.stack([template, moved, smiling, rolled]), 128)
    np.testing.assert_array_equal(same, skin_mask(128))
    np.testing.assert_allclose(after[:70, 6:], np.roll(same, (-3, 6), (0, 1))[:70, 6:], atol=1e-5)
    np.testing.assert_allclose(after[80:, :-4], np.roll(same, (5, -4), (0, 1))[80:, :-4], atol=1e-5)
    # A smile is wider, and shows more teeth below its corners.
    spans = [np.argwhere(mask[75:] < 0.5) for mask in (same, wide)]
    assert spans[1].max(0)[0] > spans[0].max(0)[0] + 4
    assert np.ptp(spans[1], 0)[1] > np.ptp(spans[0], 0)[1] + 4
    matrix = cv2.getRotationMatrix2D((63.5, 63.5), -8, 1)
    assert np.abs(tilted - cv2.warpAffine(same, matrix, (128, 128), borderValue=1)).max() < 0.12
    assert skin_masks(template[None][:0], 128).shape == (0, 128, 128)


def test_masks_are_the_same_at_every_size():
    for mask in (face_mask, skin_mask):
        small = mask(128).reshape(64, 2, 64, 2).mean((1, 3))
        assert np.abs(small - mask(64))[2:-2, 2:-2].max() < 0.1
