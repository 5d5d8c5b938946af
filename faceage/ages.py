"""The six age classes of Age-cGAN, and the mix of two of them that stands for an age in years.

Reference: Antipov et al. 2017, arXiv:1702.01983, section 3 (the classes).
"""

from __future__ import annotations

import numpy as np

from faceage.types import FloatArray

AGE_CLASSES = ("0-18", "19-29", "30-39", "40-49", "50-59", "60+")
CLASS_CENTRES_YEARS = np.array([8, 25, 35, 45, 55, 70], np.float32)
"""The age that each class stands for."""
OLDEST_YEARS = 85.0
"""Older ages are taken for this one: training has hardly a face beyond it."""


def age_to_classes(age_years: FloatArray) -> FloatArray:
    """Return the mix of the two nearest classes for each age.

    Before the first centre and after the last the mix goes on in a straight line: at 85 it is minus one of 50-59 and
    two of 60+.

    Args:
        age_years: float [F].

    Returns:
        float32 [F, 6], rows sum to 1.
    """
    age = np.clip(age_years, 0, OLDEST_YEARS).astype(np.float32)
    lower = np.clip(np.searchsorted(CLASS_CENTRES_YEARS, age, side="right") - 1, 0, len(CLASS_CENTRES_YEARS) - 2)
    below, above = CLASS_CENTRES_YEARS[lower], CLASS_CENTRES_YEARS[lower + 1]
    share = (age - below) / (above - below)
    mix = np.zeros((len(age), len(CLASS_CENTRES_YEARS)), np.float32)
    rows = np.arange(len(age))
    mix[rows, lower] = 1 - share
    mix[rows, lower + 1] = share
    return mix
