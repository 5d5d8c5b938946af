import numpy as np

from faceage.ages import AGE_CLASSES, CLASS_CENTRES_YEARS, age_to_classes


def test_a_centre_is_its_class_alone():
    np.testing.assert_array_equal(age_to_classes(CLASS_CENTRES_YEARS), np.eye(len(AGE_CLASSES), dtype=np.float32))


def test_between_two_centres_the_nearest_two_are_mixed():
    (mix,) = age_to_classes(np.array([30.0], np.float32))
    np.testing.assert_allclose(mix, [0, 0.5, 0.5, 0, 0, 0])


def test_every_age_is_a_convex_mix_of_at_most_two_neighbours():
    mixes = age_to_classes(np.linspace(0, 116, 500).astype(np.float32))
    np.testing.assert_allclose(mixes.sum(1), 1, atol=1e-6)
    assert (mixes >= 0).all()
    for mix in mixes:
        used = np.flatnonzero(mix)
        assert len(used) <= 2
        assert used[-1] - used[0] <= 1
    assert (np.diff(mixes @ CLASS_CENTRES_YEARS) >= -1e-4).all()


def test_ages_beyond_the_ends_are_the_end_classes():
    np.testing.assert_array_equal(age_to_classes(np.array([0, 100], np.float32)), np.eye(6, dtype=np.float32)[[0, 5]])
