import numpy as np
import pytest

from faceage.ages import AGE_CLASSES, CLASS_CENTRES_YEARS, OLDEST_YEARS, age_to_classes
from faceage.pipeline.request import AgeRequest, resolve_ages


def test_a_centre_is_its_class_alone():
    np.testing.assert_array_equal(age_to_classes(CLASS_CENTRES_YEARS), np.eye(len(AGE_CLASSES), dtype=np.float32))


def test_between_two_centres_the_nearest_two_are_mixed():
    (mix,) = age_to_classes(np.array([30.0], np.float32))
    np.testing.assert_allclose(mix, [0, 0.5, 0.5, 0, 0, 0])


def test_every_age_is_a_mix_of_at_most_two_neighbours_and_grows_with_the_years():
    mixes = age_to_classes(np.linspace(0, 85, 500).astype(np.float32))
    np.testing.assert_allclose(mixes.sum(1), 1, atol=1e-6)
    for mix in mixes:
        used = np.flatnonzero(mix)
        assert len(used) <= 2
        assert used[-1] - used[0] <= 1
    np.testing.assert_allclose(mixes @ CLASS_CENTRES_YEARS, np.linspace(0, 85, 500), atol=1e-3)


def test_beyond_the_end_centres_the_mix_goes_on_as_far_as_training_does():
    np.testing.assert_allclose(age_to_classes(np.array([85.0], np.float32)), [[0, 0, 0, 0, -1, 2]], atol=1e-6)
    np.testing.assert_array_equal(*age_to_classes(np.array([OLDEST_YEARS, 116], np.float32))[:, None])


def test_a_report_says_the_age_that_is_made():
    now = np.array([30, 80], np.float32)
    np.testing.assert_array_equal(resolve_ages(now, AgeRequest(age=95))[1], [OLDEST_YEARS, OLDEST_YEARS])
    np.testing.assert_array_equal(resolve_ages(now, AgeRequest(by=10))[1], [40, OLDEST_YEARS])
    np.testing.assert_array_equal(resolve_ages(now, AgeRequest(by=-40))[1], [0, 40])
    np.testing.assert_array_equal(resolve_ages(now, AgeRequest(by=5))[0], now)
    np.testing.assert_array_equal(resolve_ages(now, AgeRequest(by=5, source_age=20)), [[20, 20], [25, 25]])


@pytest.mark.parametrize("is_given", [True, False])
def test_years_more_never_make_anybody_younger(is_given):
    for age in (84.0, 85.0, 88.0, 100.0):
        estimated = np.array([50 if is_given else age], np.float32)
        request = AgeRequest(by=10, source_age=age if is_given else None)
        source, target = resolve_ages(estimated, request)
        assert source.dtype == target.dtype == np.float32
        assert target[0] == OLDEST_YEARS >= source[0]
    assert resolve_ages(np.float32([88]), AgeRequest(by=-10)) == (OLDEST_YEARS, OLDEST_YEARS - 10)
