"""Latent optimization: the step on problems with known answers, and the exported gradient against autograd."""

import numpy as np
import pytest
import torch
from test_device_path import no_waiting

from faceage.agers.age_cgan import latent_program
from faceage.agers.latent import LatentConfig, first_state, optimize_latents
from faceage.engines.store import EngineStore
from faceage.geometry import face_mask
from faceage.models import find_model
from faceage.networks.age_cgan import AgeCGANDims, FoldedGenerator, Generator
from faceage.networks.latent import LatentObjective, LatentStep, gradient_network
from faceage.networks.regressors import IdentityNet, TrunkDims


class Quadratic(torch.nn.Module):
    """Loss and gradient of least + sum(c (z - x)^2) + waves cos(3 (z - x)); x comes where the faces would."""

    def __init__(self, curvature: np.ndarray, *, waves: float = 0.0, least: float = 0.0) -> None:
        super().__init__()
        self.c = torch.from_numpy(curvature.astype(np.float32))
        self.waves, self.least = waves, least

    def forward(self, z, y, x, e, weights):
        off = z - x
        loss = self.least + (self.c * off**2 + self.waves * torch.cos(3 * off)).sum(1)
        return loss, 2 * self.c * off - 3 * self.waves * torch.sin(3 * off)


def run(module: torch.nn.Module, minimum: np.ndarray, config: LatentConfig, root: np.ndarray | None = None, calls=None):
    """Optimize from zero; `calls` collects how many faces each call of the step had."""
    step = LatentStep(module)
    count, width = minimum.shape

    def call(*arrays):
        if calls is not None:
            calls.append(len(arrays[0]))
        return tuple(out.numpy() for out in step(*map(torch.from_numpy, arrays)))

    nothing = np.zeros((count, 1), np.float32)
    root = np.eye(width, dtype=np.float32) if root is None else root
    return optimize_latents(call, np.zeros_like(minimum), (nothing, minimum, nothing), config, root=root)


def minima(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


CURVATURE = np.geomspace(1, 30, 20).astype(np.float32)


def test_finds_the_minimum_of_quadratics():
    minimum = minima(7, 20)
    fit = run(Quadratic(CURVATURE), minimum, LatentConfig(max_evaluations=150, tolerance=1e-5))
    assert np.abs(fit.latents - minimum).max() < 0.02
    assert (fit.losses < 1e-3 * fit.first_losses).all()


@pytest.mark.parametrize("waves", [0.0, 2.0])
def test_on_a_device_the_host_waits_once(waves):
    """Faces that stop early and late, some whose budget is smaller."""
    minimum, config = minima(7, 20), LatentConfig(max_evaluations=25, tolerance=0.02)
    step, nothing = LatentStep(Quadratic(CURVATURE, waves=waves, least=1)), np.zeros((7, 1), np.float32)
    problem, root = (nothing, minimum, nothing), np.eye(20, dtype=np.float32)

    def arrays_in_and_out(*arrays):
        return tuple(out.numpy() for out in step(*map(torch.from_numpy, arrays)))

    options = {"root": root, "budget": np.array([25, 3, 25, 25, 1, 25, 25])}
    want = optimize_latents(arrays_in_and_out, np.zeros_like(minimum), problem, config, **options)
    with no_waiting() as waited:
        got = optimize_latents(step, np.zeros_like(minimum), problem, config, **options, device="cpu")
    assert waited == ["cpu", "numpy"]
    np.testing.assert_array_equal(got.evaluations, want.evaluations)
    assert len(set(want.evaluations.tolist())) > 2
    np.testing.assert_allclose(got.latents, want.latents, atol=1e-5)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    np.testing.assert_allclose(got.first_losses, want.first_losses, rtol=1e-5)
    none = optimize_latents(
        step, minimum[:0], tuple(p[:0] for p in problem), config, root=options["root"], device="cpu"
    )
    assert none.latents.shape == (0, 20)


def test_knowing_the_curvature_saves_evaluations():
    minimum = minima(7, 20)
    config = LatentConfig(max_evaluations=6, tolerance=0)
    plain = run(Quadratic(CURVATURE), minimum, config)
    shaped = run(Quadratic(CURVATURE), minimum, config, np.diag((2 * CURVATURE) ** -0.5))
    np.testing.assert_allclose(shaped.first_losses, plain.first_losses, rtol=1e-5)
    assert (shaped.losses < 0.3 * plain.losses).all()
    np.testing.assert_allclose((CURVATURE * (shaped.latents - minimum) ** 2).sum(1), shaped.losses, atol=1e-3)


def test_a_batch_gives_what_its_faces_give_alone():
    minimum = minima(5, 20)
    module = Quadratic(CURVATURE, waves=1.0)
    together = run(module, minimum, LatentConfig())
    for i in range(len(minimum)):
        alone = run(module, minimum[i : i + 1], LatentConfig())
        np.testing.assert_allclose(alone.latents[0], together.latents[i], atol=1e-4)
        assert alone.evaluations[0] == together.evaluations[i]


def test_each_face_stops_by_itself_and_then_costs_nothing():
    calls = []
    minimum = minima(2, 20)
    minimum[0] *= 1e-6  # the first face is there, as far as float32 goes
    config = LatentConfig(max_evaluations=12, tolerance=1e-3)
    fit = run(Quadratic(CURVATURE, least=1.0), minimum, config, calls=calls)
    assert fit.evaluations[0] == 3  # its start, a guess, and a step that gains nothing
    assert fit.evaluations[1] > 5
    assert calls == [2] * 3 + [1] * (fit.evaluations[1] - 3)


def test_a_stopped_face_stays_as_it_is_in_steps_of_a_fixed_shape():
    minimum = torch.from_numpy(minima(2, 20))
    step, none = LatentStep(Quadratic(CURVATURE)), torch.zeros(2, 1)
    problem = torch.zeros(2, 20), none, minimum, none, torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.eye(20)
    state = tuple(map(torch.from_numpy, first_state(2, 20, np.array([2, 5]))))
    history = [state := step(*state, *problem) for _ in range(6)]
    assert [[int(left) for left in state[-1]] for state in history] == [[1, 4], [0, 3], [0, 2], [0, 1], [0, 0], [0, 0]]
    for part, later in zip(history[1], history[-1], strict=True):
        assert torch.equal(part[0], later[0])
    assert history[-1][1][1] < history[1][1][1]
    assert all(torch.equal(a, b) for a, b in zip(history[4], history[5], strict=True))


def test_never_ends_above_its_start():
    class Liar(torch.nn.Module):
        def forward(self, z, y, x, e, weights):
            return (z - x).square().sum(1), torch.randn(z.shape, generator=seeded)

    seeded = torch.Generator().manual_seed(1)
    minimum = minima(4, 8)
    fit = run(Liar(), minimum, LatentConfig())
    assert (fit.losses <= fit.first_losses).all()
    np.testing.assert_allclose(((fit.latents - minimum) ** 2).sum(1), fit.losses, rtol=1e-5)


def test_no_face_at_all():
    fit = run(Quadratic(CURVATURE), np.zeros((0, 20), np.float32), LatentConfig())
    assert fit.latents.shape == (0, 20)
    assert fit.first_losses.shape == fit.evaluations.shape == (0,)


def test_evaluations_are_bounded():
    calls = []
    run(Quadratic(CURVATURE), minima(1, 20), LatentConfig(max_evaluations=3, tolerance=0), calls=calls)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("setting", [{"max_evaluations": 0}, {"tolerance": 1.0}, {"max_evaluations_known": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match="must be positive"):
        LatentConfig(**setting)


@pytest.fixture
def networks_of():
    """Makes the same small generator and identity network each time."""

    def make() -> tuple[Generator, IdentityNet]:
        torch.manual_seed(0)
        generator = Generator(AgeCGANDims(generator_channels=(16, 16, 8, 8, 8)))
        identity = IdentityNet(TrunkDims(widths=(8, 8, 16, 16), blocks=(1, 1, 1, 1), outputs=32))
        for network in (generator, identity):  # running statistics that folding must respect
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2)
        return generator.eval().requires_grad_(False), identity.eval().requires_grad_(False)

    return make


def inputs(count: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(count)
    return (
        torch.randn(count, 100),
        torch.softmax(torch.randn(count, 6), 1),
        torch.rand(count, 3, 64, 64) * 2 - 1,
        torch.nn.functional.normalize(torch.randn(count, 32), dim=1),
        torch.tensor([1.0, 4.0, 0.02]),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_the_traced_gradient_is_autograds(networks_of, dtype, tolerance):
    generator, identity = (network.to(dtype) for network in networks_of())
    mask = torch.tensor(face_mask(64), dtype=dtype)
    plain = LatentObjective(generator, identity, mask).eval()
    cases = []
    for count in (1, 2, 7):
        for weights in ([0.0, 4.0, 0.02], [1.0, 0.0, 0.02], [1.0, 4.0, 0.02]):  # pixel-wise, identity-preserving, both
            z, *rest = (*(t.to(dtype) for t in inputs(count)[:-1]), torch.tensor(weights, dtype=dtype))
            z.requires_grad_()
            losses = plain(z, *rest)
            cases.append(((z.detach(), *rest), losses.detach(), torch.autograd.grad(losses.sum(), z)[0]))
    fast = LatentObjective(FoldedGenerator(generator).to(dtype), identity, mask).eval()
    network = gradient_network(fast, tuple(t.to(dtype) for t in inputs(5)))
    for arguments, losses, gradient in cases:
        got_losses, got_gradient = network(*arguments)
        torch.testing.assert_close(got_losses, losses, rtol=tolerance, atol=0)
        torch.testing.assert_close(got_gradient, gradient, rtol=0, atol=tolerance * float(gradient.abs().max()))


def test_the_folded_generator_makes_the_same_faces(networks_of):
    generator, _ = networks_of()
    z, y, *_ = inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(FoldedGenerator(generator)(z, y), generator(z, y), rtol=0, atol=1e-5)


def test_the_latent_engine_steps_as_torch_does_with_autograd(tiny_model, tmp_path):
    files = find_model(tiny_model)
    engine = EngineStore(tmp_path).load(latent_program(files.generator, files.identity))
    step = latent_program(files.generator, files.identity, autograd=True).network(True)
    _, y, x, *_ = (t.numpy() for t in inputs(3))
    e = np.zeros((3, 128), np.float32)
    e[:, 0] = 1

    def eager(*arrays):
        with torch.inference_mode():
            return tuple(out.numpy() for out in step(*map(torch.from_numpy, arrays)))

    start, root = np.zeros((3, 100), np.float32), np.eye(100, dtype=np.float32)
    config = LatentConfig(max_evaluations=4)
    fit, want = (optimize_latents(each, start, (y, x, e), config, root=root) for each in (engine, eager))
    assert (fit.losses < fit.first_losses).all()
    np.testing.assert_allclose(fit.losses, want.losses, rtol=1e-4)
    np.testing.assert_allclose(fit.latents, want.latents, atol=1e-3)
