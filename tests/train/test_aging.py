"""What `train.age_cgan.aging` does to a face is what the product does."""

import numpy as np
import torch

from faceage.agers import age_cgan
from train.age_cgan.aging import calm
from train.losses import read_by_all


def test_training_weakens_the_change_as_the_product_does():
    deltas = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    expected = age_cgan._calm(deltas.copy())
    np.testing.assert_allclose(calm(torch.from_numpy(deltas)), expected, atol=1e-5)


def test_luma_is_kept_on_the_skin_and_weakened_on_eyes_and_teeth():
    half = torch.ones(1, 3, 64, 64)
    half[..., :32] = -1  # no exposure: its mean over the mask is 0
    shares = age_cgan.feature_shares(64)
    np.testing.assert_allclose(calm(half)[0, 0].abs(), shares, atol=1e-5)
    assert shares.max() == 1
    assert shares.min() == np.float32(age_cgan.FEATURE_SHARE)


def test_exposure_is_taken_out():
    assert calm(torch.ones(1, 3, 64, 64)).abs().max() < 1e-5


def test_colour_is_weakened_everywhere():
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1
    made = calm(red)[0, :, 24, 32]
    np.testing.assert_allclose(made, age_cgan.CHROMA_SHARE * (red[0, :, 0, 0] - 0.299), atol=1e-3)


def test_readers_of_any_size_read_the_same_faces():
    class Reader(torch.nn.Module):
        def __init__(self, size_px):
            super().__init__()
            self.trunk = torch.nn.Module()
            self.trunk.dims = type("Dims", (), {"size_px": size_px})

        def forward(self, x):
            assert x.shape[-1] == self.trunk.dims.size_px
            return x.mean((1, 2, 3))

    x = torch.rand(4, 3, 64, 64)
    ages = read_by_all([Reader(64), Reader(32)], x)
    np.testing.assert_allclose(ages[0], ages[1], atol=1e-6)
