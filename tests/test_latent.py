"""Latent optimization: the optimizer on problems with known answers, and the exported gradient against autograd."""

import numpy as np
import pytest
import torch

from faceage.agers.latent import LatentConfig, optimize_latents
from faceage.agers.programs import latent_program
from faceage.engines.store import EngineStore
from faceage.geometry import face_mask
from faceage.models import find_model
from faceage.networks.age_cgan import AgeCGANDims, Generator
from faceage.networks.latent import LatentObjective, gradient_network
from faceage.networks.regressors import IdentityNet, TrunkDims


def quadratics(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Curvatures from 1 to 30 along the axes, and a minimum for each face."""
    random = np.random.default_rng(0)
    return np.geomspace(1, 30, width).astype(np.float32), random.normal(size=(count, width)).astype(np.float32)


def test_finds_the_minimum_of_quadratics():
    curvature, minimum = quadratics(7, 20)

    def objective(z, rows):
        error = z - minimum[rows]
        return (curvature * error**2).sum(1), 2 * curvature * error

    config = LatentConfig(max_evaluations=80, tolerance=1e-4)
    fit = optimize_latents(objective, np.zeros_like(minimum), config)
    assert np.abs(fit.latents - minimum).max() < 0.02
    assert (fit.losses < 1e-3 * fit.first_losses).all()


def test_knowing_the_curvature_saves_evaluations():
    curvature, minimum = quadratics(7, 20)

    def objective(z, rows):
        error = z - minimum[rows]
        return (curvature * error**2).sum(1), 2 * curvature * error

    config = LatentConfig(max_evaluations=6, tolerance=0)
    plain = optimize_latents(objective, np.zeros_like(minimum), config)
    shaped = optimize_latents(objective, np.zeros_like(minimum), config, root=np.diag(curvature**-0.5))
    np.testing.assert_allclose(shaped.first_losses, plain.first_losses, rtol=1e-5)
    assert (shaped.losses < 0.1 * plain.losses).all()
    np.testing.assert_allclose(objective(shaped.latents, np.arange(7))[0], shaped.losses, atol=1e-3)


def test_a_batch_gives_what_its_faces_give_alone():
    curvature, minimum = quadratics(5, 12)

    def objective(z, rows):
        error = z - minimum[rows]
        loss = (curvature * error**2).sum(1) + np.cos(3 * error).sum(1)
        return loss, 2 * curvature * error - 3 * np.sin(3 * error)

    together = optimize_latents(objective, np.zeros_like(minimum), LatentConfig())
    for i in range(len(minimum)):
        alone = optimize_latents(
            lambda z, rows, i=i: objective(z, rows + i), np.zeros((1, 12), np.float32), LatentConfig()
        )
        np.testing.assert_allclose(alone.latents[0], together.latents[i], atol=1e-4)
        assert alone.evaluations[0] == together.evaluations[i]


def test_each_face_stops_by_itself():
    asked = []

    def objective(z, rows):
        asked.append(len(rows))
        scale = np.array([1e-9, 1.0], np.float32)[rows]  # the first face is flat: it has converged where it starts
        slow = z**2 * np.geomspace(1, 300, z.shape[1])
        return 1 + scale * slow.sum(1), scale[:, None] * 2 * z * np.geomspace(1, 300, z.shape[1])

    fit = optimize_latents(objective, np.ones((2, 10), np.float32), LatentConfig(tolerance=1e-3))
    assert fit.evaluations[0] == 2
    assert fit.evaluations[1] > 5
    assert asked[:2] == [2, 2]
    assert set(asked[2:]) == {1}


def test_never_ends_above_its_start():
    random = np.random.default_rng(1)

    def objective(z, rows):  # a gradient that lies
        return (z**2).sum(1), random.normal(size=z.shape).astype(np.float32)

    fit = optimize_latents(objective, np.ones((4, 8), np.float32), LatentConfig())
    assert (fit.losses <= fit.first_losses).all()
    np.testing.assert_allclose((fit.latents**2).sum(1), fit.losses, rtol=1e-5)


def test_no_face_at_all():
    fit = optimize_latents(lambda z, rows: (z.sum(1), z), np.zeros((0, 100), np.float32), LatentConfig())
    assert fit.latents.shape == (0, 100)
    assert fit.evaluations.shape == (0,)


def test_evaluations_are_bounded():
    calls = []

    def objective(z, rows):
        calls.append(1)
        return (z**4).sum(1), 4 * z**3

    optimize_latents(objective, np.ones((1, 4), np.float32), LatentConfig(max_evaluations=3, tolerance=0))
    assert len(calls) == 3


@pytest.mark.parametrize("setting", [{"max_evaluations": 0}, {"tolerance": 1.0}, {"history": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match="must be positive"):
        LatentConfig(**setting)


@pytest.fixture(scope="module")
def objective() -> LatentObjective:
    torch.manual_seed(0)
    dims = AgeCGANDims(generator_channels=(16, 16, 8, 8, 8))
    generator, identity = (
        Generator(dims),
        IdentityNet(TrunkDims(widths=(8, 8, 16, 16), blocks=(1, 1, 1, 1), outputs=32)),
    )
    for module in generator.modules():  # running statistics that folding must respect
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return LatentObjective(generator, identity, torch.tensor(face_mask(64))).eval()


def inputs(count: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(count)
    return (
        torch.randn(count, 100),
        torch.softmax(torch.randn(count, 6), 1),
        torch.rand(count, 3, 64, 64) * 2 - 1,
        torch.nn.functional.normalize(torch.randn(count, 32), dim=1),
        torch.tensor([1.0, 4.0, 0.02]),
    )


def test_the_traced_gradient_is_autograds_for_any_batch(objective):
    expected = []
    for count in (1, 2, 7):
        z, *rest = inputs(count)
        z.requires_grad_()
        losses = objective(z, *rest)
        expected.append((losses.detach(), torch.autograd.grad(losses.sum(), z)[0]))
    network = gradient_network(objective, inputs(5))
    for count, (losses, gradient) in zip((1, 2, 7), expected, strict=True):
        got_losses, got_gradient = network(*inputs(count))
        torch.testing.assert_close(got_losses, losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_gradient, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_the_latent_engine_lowers_the_loss_of_faces(tiny_model, tmp_path):
    files = find_model(tiny_model)
    engine = EngineStore(tmp_path).load(latent_program(files.generator, files.identity))
    _, y, x, _, weights = (t.numpy() for t in inputs(3))
    e = np.zeros((3, 128), np.float32)
    e[:, 0] = 1

    def objective(z, rows):
        return engine(z, y[rows], x[rows], e[rows], weights)

    fit = optimize_latents(objective, np.zeros((3, 100), np.float32), LatentConfig())
    assert (fit.losses < fit.first_losses).all()
