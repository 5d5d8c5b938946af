"""FaceNet in place of the compact identity network, with random weights: the real ones are downloaded by users only."""

import numpy as np
import pytest
import torch

from faceage.agers.latent import LatentConfig
from faceage.checkpoint import Header, save
from faceage.engines.registry import choose_runtime
from faceage.errors import CheckpointError
from faceage.geometry import template_5
from faceage.models import facenet_file, find_model, import_model
from faceage.networks.facenet import FaceNet
from faceage.pipeline.request import load_networks
from faceage.types import Crops


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny_model):
    """A cache folder of its own that has the tiny model."""
    files = find_model(tiny_model)
    monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path))
    import_model("tiny", list(files.paths.values()))
    return tmp_path


def test_without_it_the_error_says_how_to_get_it(cache):
    with pytest.raises(CheckpointError, match="faceage models fetch facenet"):
        load_networks(model="tiny", identity="facenet", runtime=choose_runtime(backend="torch", device="cpu"))


def test_latents_are_fitted_through_it(cache):
    torch.manual_seed(0)
    net = FaceNet()
    dims = {"size_px": 160, "outputs": 512}
    save(facenet_file(), net.net.state_dict(), Header(arch="facenet", dims=dims, stage="random", images_seen=0))
    networks = load_networks(
        model="tiny",
        identity="facenet",
        runtime=choose_runtime(backend="torch", device="cpu"),
        latent=LatentConfig(max_evaluations=3, pixel_weight=0),
    )
    (size,) = networks.ager.views[0].sizes_px
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, size, size)).astype(np.float32)
    ages = np.full(2, 30, np.float32)
    fit = networks.ager.fit(pixels, ages)
    assert (fit.losses < fit.first_losses).all()
    landmarks = np.repeat(template_5(size)[None], 2, 0)
    crops = Crops(pixels=pixels, landmarks=landmarks, frame_to_crop=np.zeros((2, 2, 3), np.float32))
    looks = networks.ager.look([], ages, ages)
    keys = networks.ager.observe(looks, [crops], [None, None])
    changes = [networks.ager.draw(look, key, key, 0)[0] for look, key in zip(looks, keys, strict=True)]
    np.testing.assert_allclose([change.delta for change in changes], 0, atol=1e-6)
    np.testing.assert_allclose(networks.measure_identity(crops, changes), 1, atol=1e-4)
