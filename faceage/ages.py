"""The six age classes of Age-cGAN, and the mix of two of them that stands for an age in years.

Reference: Antipov et al. 2017, arXiv:1702.01983, section 3 (the classes).
"""

from __future__ import annotations

import numpy as np

from faceage.types import FloatArray

AGE_CLASSES = ("0-18", "19-29", "30-39", "40-49", "50-59", "60+")
CLASS_CENTRES_YEARS = np.array([8, 25, 35, 45, 55, 70], np.float32)
"""The age that each class stands for. Younger and older ages are those of the first and last class."""


def age_to_classes(age_years: FloatArray) -> FloatArray:
    """Return the convex mix of the two nearest classes for each age.

    Args:
        age_years: float [F].

    Returns:
        float32 [F, 6], rows sum to 1.
    """
    position = np.interp(age_years, CLASS_CENTRES_YEARS, np.arange(len(CLASS_CENTRES_YEARS)))
    distance = np.abs(position[:, None] - np.arange(len(CLASS_CENTRES_YEARS)))
    return np.maximum(0, 1 - distance).astype(np.float32)
