import numpy as np
import pytest
from torch import from_numpy

from faceage.kernels import candidates, select_candidates


@pytest.mark.parametrize("at_once", [50, 4096], ids=["more than come at once", "all at once"])
def test_tensors_and_arrays_give_the_same_cells_in_the_same_order(monkeypatch, at_once):
    monkeypatch.setattr(candidates, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    shapes = [(2, 30, 41), (2, 13, 7), (2, 1, 1), (2, 5, 6)]
    scores = [rng.random(shape).astype(np.float32) for shape in shapes]
    scores[3][:] = 0  # a map of which nothing passes
    values = [rng.normal(size=(n, 4, h, w)).astype(np.float32) for n, h, w in shapes]
    arrays = select_candidates(scores, values, 0.9)
    tensors = select_candidates([from_numpy(s) for s in scores], [from_numpy(v) for v in values], 0.9)
    assert len(arrays[0].scores) > 100
    assert len(arrays[3].scores) == 0
    for array, tensor, score, value in zip(arrays, tensors, scores, values, strict=True):
        for a, b in zip((*array.places, array.scores, array.values), (*tensor.places, *tensor[1:]), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        n, row, column = array.places
        np.testing.assert_array_equal(array.scores, score[n, row, column])
        np.testing.assert_array_equal(array.values, value[n, :, row, column])
        assert (score >= 0.9).sum() == len(n)
