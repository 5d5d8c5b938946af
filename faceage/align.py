"""How a face is framed for the networks, and how strongly it is aged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from faceage.errors import ShapeError
from faceage.geometry import TEMPLATE_5, apply_affine, similarity_to_template, template_5
from faceage.kernels import gather_crops, maps, to_host
from faceage.types import Crops, FloatArray, Frame, IntArray, View

FRONTAL_TURN = 0.6
"""A face turned less than this (see `head_turn`; about 30 degrees) is aged in full."""
PROFILE_TURN = 1.1
"""A face turned more than this (about 50 degrees: the nose is over the far eye) is left alone: the networks
have learned faces that look at the camera."""
UNSURE_SCORE = 0.6
"""A face that the detector gives this probability or less is left alone: it may be none."""
SURE_SCORE = 0.9
"""A face that it gives this probability or more is aged in full."""
FADE_S = 0.36
"""How long a change from nothing to full strength takes at least: long enough not to be seen as a pop."""
MIN_FADE_FRAMES = 9
"""The same in frames, for low frame rates: no step is larger than 0.2."""
FINENESS = 0.8
"""A crop has at least this many pixels along a pixel of the picture, where an ager takes crops of several sizes: a
crop of twice the side takes four times as long to age."""


def align_faces(landmarks: FloatArray, size_px: int, template: FloatArray = TEMPLATE_5) -> FloatArray:
    """Return the map from the frame to each face's aligned crop.

    Args:
        landmarks: float32 [F, 5, 2], frame pixels. F may be 0.
        size_px: side of the crop in pixels.
        template: float32 [5, 2], where the crop has the landmarks, as fractions of its side.

    Returns:
        float32 [F, 2, 3], frame pixels to crop pixels.
    """
    return similarity_to_template(landmarks, template_5(size_px, template))


def prepare_crops(
    frames: Sequence[Frame], frame_index: IntArray, landmarks: FloatArray, view: View, size_px: int
) -> Crops:
    """Align faces and gather their crops in one view, on the host; see `prepare_views`.

    Args:
        frames: the pictures.
        frame_index: int64 [F], the position of each face's picture. F may be 0.
        landmarks: float32 [F, 5, 2], frame pixels.
        view: how the faces are framed.
        size_px: one of the view's sizes.
    """
    (crops,) = prepare_views(frames, frame_index, landmarks, [view], [size_px])
    return replace(crops, pixels=to_host(crops.pixels))


def prepare_views(
    frames: Sequence[Frame],
    frame_index: IntArray,
    landmarks: FloatArray,
    views: Sequence[View],
    sizes_px: Sequence[int],
) -> list[Crops]:
    """Align faces and gather their crops in several views, where the frames live.

    Args:
        frames: the pictures.
        frame_index: int64 [F], the position of each face's picture. F may be 0.
        landmarks: float32 [F, 5, 2], frame pixels.
        views: how the faces are framed.
        sizes_px: a size of each view.
    """
    prepared = []
    for view, size in zip(views, sizes_px, strict=True):
        matrices = align_faces(landmarks, size, view.template)
        pixels = gather_crops(frames, frame_index, matrices, size)
        prepared.append(Crops(pixels=pixels, landmarks=apply_affine(matrices, landmarks), frame_to_crop=matrices))
    return prepared


def choose_size(landmarks: FloatArray, view: View) -> int:
    """Return the side of the crops in which a person is to be aged, one for all the given frames of one face.

    The smallest of the sizes that has `FINENESS` of the picture's own resolution, or else the largest. The median frame
    decides: in a track, a size that changed with the face would be seen as a pop, and one that fits the largest frame's
    would be too fine for most frames.

    Args:
        landmarks: float32 [T, 5, 2], frame pixels; T is 1 or more.
        view: its sizes are there to choose from.
    """
    scales = np.linalg.norm(align_faces(landmarks, 1, view.template)[:, 0, :2], axis=-1)
    side = 1 / float(maps.median_of(scales))  # of the aligned crop, in pixels of the picture
    return next((size for size in view.sizes_px if size >= FINENESS * side), view.sizes_px[-1])


def head_turn(landmarks: FloatArray) -> FloatArray:
    """Return how far each head is turned to a side: about the tangent of its yaw, 0 for a frontal face.

    The nose's distance from the face's midline, in half widths of the face at the eyes and the mouth: the
    nose stands out of the face's plane about as far as the eyes and mouth corners are from its middle.

    Args:
        landmarks: float32 [F, 5, 2], frame pixels.

    Returns:
        float32 [F], not negative. A face whose eyes and mouth coincide counts as turned away: large.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise ShapeError(f"expected landmarks [F, 5, 2], got {landmarks.shape}")
    left = (landmarks[:, 0] + landmarks[:, 3]) / 2
    right = (landmarks[:, 1] + landmarks[:, 4]) / 2
    down = (landmarks[:, 3] + landmarks[:, 4] - landmarks[:, 0] - landmarks[:, 1]) / 2
    down = down / np.maximum(np.linalg.norm(down, axis=-1, keepdims=True), 1e-6)
    across = np.stack([down[:, 1], -down[:, 0]], -1)  # unit vector to the viewer's right, normal to the midline
    half_width = ((right - left) * across).sum(-1) / 2
    offset = ((landmarks[:, 2] - (left + right) / 2) * across).sum(-1)
    return np.abs(offset) / np.maximum(half_width, 1e-6)


def pose_weights(landmarks: FloatArray, scores: FloatArray) -> FloatArray:
    """Return how strongly each face is to be aged, each on its own: stills need no more.

    Args:
        landmarks: float32 [F, 5, 2], frame pixels.
        scores: float32 [F], the detector's confidence in [0, 1].

    Returns:
        float32 [F], in [0, 1]: 1 for a sure face that looks towards the camera, 0 for a profile or a doubt.
    """
    frontal = _smoothstep((PROFILE_TURN - head_turn(landmarks)) / (PROFILE_TURN - FRONTAL_TURN))
    return frontal * _smoothstep((scores - UNSURE_SCORE) / (SURE_SCORE - UNSURE_SCORE))


def face_quality(landmarks: FloatArray, scores: FloatArray) -> FloatArray:
    """Return how good each face is to look at, to choose one of several: float32 [F]; arguments as `pose_weights`.

    Among those of equal weight, and where all are profiles, the detector's confidence decides.
    """
    return pose_weights(landmarks, scores) + 1e-3 * scores


def face_weights(
    landmarks: FloatArray, scores: FloatArray, *, fade_in: bool, fade_out: bool, frame_rate: float
) -> FloatArray:
    """Return how strongly the face of one track is to be aged in each frame.

    `pose_weights`, averaged over time by a Hann window, so that nothing pops. A fade is the same window
    sliding off zeros: half a window of them from the end of the track inwards.

    Args:
        landmarks: float32 [T, 5, 2], frame pixels, one row per consecutive frame.
        scores: float32 [T], in [0, 1].
        fade_in: whether to begin at 0: yes, unless the track begins with its shot (`Track.starts_shot`).
        fade_out: whether to end at 0.
        frame_rate: frames per second.

    Returns:
        float32 [T], in [0, 1]; steps are at most 0.2.
    """
    weights = pose_weights(landmarks, scores)
    if not len(weights):
        return weights
    half = max(MIN_FADE_FRAMES, round(FADE_S * frame_rate)) // 2
    weights[: half + 1] *= not fade_in
    weights[max(len(weights) - half - 1, 0) :] *= not fade_out
    window = np.hanning(2 * half + 3)[1:-1]
    padded = np.pad(weights, half, mode="edge")
    return np.convolve(padded, window / window.sum(), mode="valid").astype(np.float32)


def _smoothstep(x: FloatArray) -> FloatArray:
    """Return 0 below 0, 1 above 1, and 3x^2 - 2x^3 between."""
    x = np.clip(x, 0, 1)
    return (x * x * (3 - 2 * x)).astype(np.float32)
