"""Landmarks, the alignment template, and affine maps of the plane.

Convention: points are (x, y) pixels, centres at integers, y down; left and right are the viewer's.
A 2x3 matrix A maps a point p to A[:, :2] @ p + A[:, 2].
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from faceage.errors import ShapeError
from faceage.kernels import beside, maps
from faceage.types import FloatArray, Samples

LANDMARKS_5 = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
"""The order of the five landmarks: MTCNN's, left and right as the viewer sees them."""

TEMPLATE_5 = np.array([[0.305, 0.293], [0.695, 0.293], [0.5, 0.523], [0.325, 0.695], [0.675, 0.695]], np.float32)
"""float32 [5, 2], where an aligned crop has its landmarks, as fractions of its side.

The mean of MTCNN's landmarks over UTKFace's own 200-pixel crops, made symmetric, so that those crops and
ours frame a face alike: forehead to chin fills the crop."""


WHOLE_FACE_TEMPLATE_5 = ((TEMPLATE_5 - 0.5) * 0.8 + (0.5, 0.55)).astype(np.float32)
"""The same for a crop that holds the whole face, from the hairline to the chin."""

HEAD_TEMPLATE_5 = ((TEMPLATE_5 - 0.5) * 0.36 + (0.5, 0.47)).astype(np.float32)
"""The same for a crop that holds the head with its hair."""

TEMPLATES = {"face": TEMPLATE_5, "whole face": WHOLE_FACE_TEMPLATE_5, "head": HEAD_TEMPLATE_5}
"""The templates that there are, by the name in a checkpoint's header."""


def template_5(size_px: int, template: FloatArray = TEMPLATE_5) -> FloatArray:
    """Return an alignment template in pixels of a crop: float32 [5, 2]."""
    return template * size_px - 0.5


def similarity_to_template(landmarks: FloatArray, template: FloatArray) -> FloatArray:
    """Return the least-squares similarity that maps each face onto the template.

    Rotation, uniform scale and translation only, so a crop is never sheared or mirrored. In the plane
    the problem is linear in one complex number a: with both point sets centred, a = <s, t> / <s, s>.

    Args:
        landmarks: float32 [F, 5, 2], frame pixels, ordered as `LANDMARKS_5`. F may be 0.
        template: float32 [5, 2], crop pixels, from `template_5`.

    Returns:
        float32 [F, 2, 3], frame to crop. A face whose points coincide gives NaN; `detect` drops such faces.

    Raises:
        ShapeError: if either shape differs from the above.

    Reference: Umeyama, TPAMI 1991, eqs. 40-42, with det(R) = +1.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2) or template.shape != (5, 2):
        raise ShapeError(f"expected landmarks [F, 5, 2], template [5, 2], got {landmarks.shape}, {template.shape}")
    source = landmarks[..., 0].astype(np.float64) + 1j * landmarks[..., 1]  # [F, 5]
    target = template[:, 0].astype(np.float64) + 1j * template[:, 1]
    source_mean = source.mean(1, keepdims=True)
    centred = source - source_mean
    with np.errstate(invalid="ignore", divide="ignore"):
        a = (centred.conj() * (target - target.mean())).sum(1) / (np.abs(centred) ** 2).sum(1)
    offset = target.mean() - a * source_mean[:, 0]
    rows = [np.stack([a.real, -a.imag, offset.real], -1), np.stack([a.imag, a.real, offset.imag], -1)]
    return np.stack(rows, 1).astype(np.float32)


def invert_affine(matrix: FloatArray) -> FloatArray:
    """Return the inverse maps of float32 [..., 2, 3] matrices."""
    linear = np.linalg.inv(matrix[..., :2].astype(np.float64))
    offset = -(linear @ matrix[..., 2:])
    return np.concatenate([linear, offset], -1).astype(np.float32)


def apply_affine(matrix: FloatArray, points: FloatArray) -> FloatArray:
    """Map points [..., N, 2] by matrices [..., 2, 3]."""
    return (points @ np.swapaxes(matrix[..., :2], -1, -2) + matrix[..., None, :, 2]).astype(np.float32)


@cache
def face_mask(size_px: int) -> FloatArray:
    """Return the blend mask of an aligned crop: 1 over the features, falling smoothly to 0 at the face's outline.

    An ellipse from the hairline to below the chin. The outer two pixels of the crop are exactly 0, so a bicubic warp of
    anything multiplied by it writes nothing outside the crop.

    Returns:
        float32 [size_px, size_px], in [0, 1].
    """
    mask = _soft_ellipse(size_px, np.array([*_MASK_CENTRE, *_MASK_RADII, 1.0, 0.0]), _MASK_CORE)
    mask[:2], mask[-2:], mask[:, :2], mask[:, -2:] = 0, 0, 0, 0
    mask.flags.writeable = False  # it is made once a size and shared
    return mask


@cache
def skin_mask(size_px: int) -> FloatArray:
    """Return `skin_masks` of a face whose landmarks are the template's: float32 [size_px, size_px]."""
    (mask,) = skin_masks(template_5(size_px)[None], size_px)
    mask.flags.writeable = False
    return mask


def skin_masks(landmarks: FloatArray, size_px: int, home: Samples | None = None) -> Samples:
    """Return 1 over the skin of aligned crops, falling smoothly to 0 over the eyeballs and between the lips.

    Each feature is a soft ellipse that lies and is as wide as the face's own landmarks say.

    Args:
        landmarks: float32 [F, 5, 2], crop pixels, ordered as `LANDMARKS_5`. F may be 0.
        size_px: side of the crops.
        home: samples beside which the masks are to live; None: they are arrays.

    Returns:
        float32 [F, size_px, size_px], in [0, 1].
    """
    ellipses = _features(landmarks, size_px)
    ellipses = ellipses if home is None else beside(home, ellipses)
    masks = maps.zeros(len(ellipses), size_px, size_px, like=ellipses if home is None else home) + 1
    for mask, features in zip(masks, ellipses, strict=True):
        for ellipse in features:
            mask *= 1 - _soft_ellipse(size_px, ellipse, _FEATURE_CORE)
    return masks


def _features(landmarks: FloatArray, size_px: int) -> npt.NDArray[np.float64]:
    """Return the ellipses of the eyes and the teeth of faces: float64 [F, 3, 6], see `_soft_ellipse`."""
    ellipses = np.empty((len(landmarks), 3, 6))
    for mine, points in zip(ellipses, (landmarks + 0.5) / size_px, strict=True):
        left, right, _, mouth_left, mouth_right = points
        eyes, mouth = right - left, mouth_right - mouth_left
        apart, width = float(np.hypot(*eyes)), float(np.hypot(*mouth))
        # A mouth smiles as far as it is wider than most: then its corners are up, and it shows more teeth.
        smile = max(0, width - _MOUTH_WIDTH)
        down = np.array([-mouth[1], mouth[0]]) / max(width, 1e-6)
        teeth = (mouth_left + mouth_right) / 2 + (_TEETH_BELOW_CORNERS + _SMILE_LOWERS * smile) * down
        mouth_radii = (_MOUTH_RADII[0] * width / _MOUTH_WIDTH, _MOUTH_RADII[1] + _SMILE_OPENS * smile)
        # Heights do not shrink with widths, on a face that is turned to a side.
        eye_radii = (_EYE_RADII[0] * apart / _EYES_APART, _EYE_RADII[1])
        features = ((left, eyes, eye_radii), (right, eyes, eye_radii), (teeth, mouth, mouth_radii))
        for row, (centre, along, radii) in zip(mine, features, strict=True):
            row[:2], row[2:4] = centre, np.maximum(radii, 1e-6)
            row[4:] = np.asarray(along, np.float64) / max(np.hypot(*along), 1e-6)
    return ellipses


def _soft_ellipse(size_px: int, ellipse: Samples, core: float) -> Samples:
    """Return 1 inside `core` of the half axes of an ellipse, falling smoothly to 0 at them: float32 [S, S].

    Args:
        size_px: S, the side of the crop.
        ellipse: float64 [6], fractions of the crop: x and y of the centre, both half axes, and the direction of the
            first one, of length 1. Half axes of nearly 0 draw nothing.
        core: share of the half axes.
    """
    centre_x, centre_y, half_u, half_v, cos, sin = ellipse
    pixels = maps.constant(_pixel_centres, size_px, like=ellipse)
    x, y = (pixels - centre_x)[None, :], (pixels - centre_y)[:, None]
    u, v = (cos * x + sin * y) / half_u, (cos * y - sin * x) / half_v
    ramp = ((1 - maps.namespace(ellipse).hypot(u, v)) / (1 - core)).clip(0, 1)
    return maps.single(ramp * ramp * (3 - 2 * ramp))


def _pixel_centres(size_px: int) -> npt.NDArray[np.float64]:
    return (np.arange(size_px) + 0.5) / size_px


_MASK_CENTRE = (0.5, 0.515)
_MASK_RADII = (0.45, 0.45)
"""Half axes of the ellipse, as fractions of the crop: UTKFace's faces fill it from ear to ear."""
_MASK_CORE = 0.62
"""Share of the radius inside which the mask is 1."""
_EYE_RADII = (0.10, 0.055)
_MOUTH_RADII = (0.165, 0.07)
"""Half axes of an eye between its lids and of an open mouth between its lips, each with its soft rim."""
_FEATURE_CORE = 0.4
_TEETH_BELOW_CORNERS = 0.012
_EYES_APART, _MOUTH_WIDTH = (float(TEMPLATE_5[i + 1, 0] - TEMPLATE_5[i, 0]) for i in (0, 3))
_SMILE_LOWERS, _SMILE_OPENS = 0.4, 0.3
"""How much lower the middle of the teeth is, and how much higher the mouth, for each unit that it is wider. From a look
at sixty faces: mouths are 0.32 to 0.34 wide without a smile, up to 0.42 with one."""
