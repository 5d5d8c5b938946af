import numpy as np
import pytest

from faceage.align import (
    MIN_FADE_FRAMES,
    align_faces,
    choose_size,
    face_weights,
    head_turn,
    pose_weights,
    prepare_crops,
)  # fmt: skip
from faceage.errors import ShapeError
from faceage.geometry import TEMPLATE_5, apply_affine, invert_affine, template_5
from faceage.types import RGB, Frame, View

FACE = template_5(200)[None]
FACE_VIEW = View("face", TEMPLATE_5, (128, 256, 512))

# A head, in millimetres: eyes, nose tip, mouth corners; x right, y down, z towards the camera.
HEAD = np.array([[-31, -30, 0], [31, -30, 0], [0, 5, 28], [-25, 35, 2], [25, 35, 2]], np.float64)


def turned(yaw_deg: float, roll_deg: float = 0.0) -> np.ndarray:
    """The landmarks of a turned head, by parallel projection."""
    yaw, roll = np.deg2rad([yaw_deg, roll_deg])
    x = HEAD[:, 0] * np.cos(yaw) + HEAD[:, 2] * np.sin(yaw)
    y = HEAD[:, 1]
    points = np.stack([x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll)], -1)
    return (points + 300).astype(np.float32)[None]


def still(count: int) -> np.ndarray:
    return np.repeat(FACE, count, 0)


def weights(landmarks, scores=None, *, fade_in=False, fade_out=False, frame_rate=25.0):
    scores = np.ones(len(landmarks), np.float32) if scores is None else scores
    return face_weights(landmarks, scores, fade_in=fade_in, fade_out=fade_out, frame_rate=frame_rate)


def test_align_puts_the_landmarks_on_the_template():
    matrix = align_faces(FACE * 1.7 + 40, 96)
    np.testing.assert_allclose(apply_affine(matrix, FACE * 1.7 + 40)[0], template_5(96), atol=1e-3)


def test_a_face_gets_the_smallest_size_that_is_fine_enough():
    sides = np.array([20, 128, 159, 161, 200, 319, 321, 500, 3000])
    chosen = [choose_size(template_5(side)[None] + 40, FACE_VIEW) for side in sides]
    assert chosen == [128, 128, 128, 256, 256, 256, 512, 512, 512]
    assert choose_size(template_5(3000)[None], View("face", TEMPLATE_5, (64,))) == 64


def test_the_median_frame_decides_for_a_track():
    frames = np.stack([template_5(side) for side in (40, 60, 200, 210, 900)])
    assert choose_size(frames, FACE_VIEW) == 256


def test_a_wider_view_has_more_of_the_picture_and_takes_a_larger_size():
    head = View("head", 0.25 + TEMPLATE_5 / 2, (128, 256, 512))
    points = template_5(200)[None] + 100
    assert choose_size(points, FACE_VIEW) == 256
    assert choose_size(points, head) == 512
    picture = np.arange(400, dtype=np.uint8)[None, :, None].repeat(400, 0).repeat(3, 2)
    frame = Frame(planes=(picture,), pixel_format="rgb24", color=RGB)
    crops = prepare_crops([frame], np.zeros(1, np.int64), points, head, 128)
    assert crops.size_px == 128
    np.testing.assert_allclose(crops.landmarks[0], template_5(128, head.template), atol=1e-3)
    np.testing.assert_allclose(apply_affine(crops.frame_to_crop, points), crops.landmarks, atol=1e-3)
    outline = invert_affine(crops.frame_to_crop)[0] @ np.float32([[-0.5, 127.5], [-0.5, 127.5], [1, 1]])
    np.testing.assert_allclose(outline, [[-0.5, 399.5], [-0.5, 399.5]], atol=0.05)
    assert len(crops[:0]) == 0


def test_align_of_no_face():
    assert align_faces(np.zeros((0, 5, 2), np.float32), 96).shape == (0, 2, 3)


def test_turn_grows_with_yaw_and_ignores_roll():
    turns = [head_turn(turned(yaw))[0] for yaw in (0, 15, 30, 45, 60)]
    assert turns[0] == pytest.approx(0, abs=1e-4)
    assert np.all(np.diff(turns) > 0.1)
    for yaw in (0, 30, -45):
        assert head_turn(turned(yaw, 25))[0] == pytest.approx(head_turn(turned(yaw))[0], abs=1e-3)
        assert head_turn(turned(-yaw))[0] == pytest.approx(head_turn(turned(yaw))[0], abs=1e-3)


def test_turn_checks_shape():
    with pytest.raises(ShapeError, match=r"\(5, 2\)"):
        head_turn(FACE[0])


def test_pose_weights_fall_from_frontal_to_profile():
    sure = np.ones(1, np.float32)
    values = [pose_weights(turned(yaw), sure)[0] for yaw in range(0, 85, 5)]
    assert values[0] == 1
    assert values[4] == 1  # 20 degrees
    assert values[-3] == 0  # 70 degrees
    assert np.all(np.diff(values) <= 0)


def test_profile_whose_eyes_coincide_has_no_weight():
    assert pose_weights(turned(90), np.ones(1, np.float32))[0] == 0


def test_pose_weights_fall_with_the_score():
    scores = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], np.float32)
    values = pose_weights(still(6), scores)
    assert values[0] == values[1] == 0
    assert values[-2] == values[-1] == 1
    assert np.all(np.diff(values) >= 0)


def test_steady_face_has_full_weight_without_fades():
    np.testing.assert_allclose(weights(still(30)), 1, atol=1e-6)


@pytest.mark.parametrize("frame_rate", [8.0, 25.0, 60.0])
def test_fades_begin_and_end_at_zero_without_pops(frame_rate):
    got = weights(still(120), fade_in=True, fade_out=True, frame_rate=frame_rate)
    assert got[0] == got[-1] == 0
    assert got[60] == pytest.approx(1, abs=1e-6)
    assert np.abs(np.diff(got)).max() <= 0.2 + 1e-6
    np.testing.assert_allclose(got, got[::-1], atol=1e-6)


def test_fade_takes_its_frames():
    got = weights(still(60), fade_in=True)
    assert got[0] == 0
    assert got[MIN_FADE_FRAMES] == pytest.approx(1, abs=1e-6)
    assert got[-1] == pytest.approx(1, abs=1e-6)


def test_sudden_changes_are_softened():
    scores = np.ones(60, np.float32)
    scores[20:30] = 0
    landmarks = still(60)
    landmarks[40:] = turned(75)
    got = weights(landmarks, scores)
    assert np.abs(np.diff(got)).max() <= 0.2 + 1e-6
    assert got[25] == pytest.approx(0, abs=1e-6)
    assert got[-1] == pytest.approx(0, abs=1e-6)
    assert got.min() >= 0
    assert got.max() <= 1 + 1e-6


def test_short_tracks():
    assert weights(still(1))[0] == pytest.approx(1)
    assert weights(still(3), fade_in=True, fade_out=True).max() < 0.2
    assert weights(still(0)).shape == (0,)
