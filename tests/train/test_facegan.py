"""FaceGAN's three steps: the conditional StyleGAN, the pairs that it makes, and the U-Net that learns from them."""

import importlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import (
    BATCH,
    FILES,
    TICK_IMAGES,
    draw_nothing,
    module_name,
    shrink_networks,
    small_facegan,
    small_gan,
    small_styles,
)

from faceage.checkpoint import Header, load, read_header, save, sha256_of
from faceage.geometry import face_mask
from faceage.networks.age_cgan import Discriminator, Encoder, Generator
from faceage.networks.facegan import FaceGANDims, PatchDiscriminator, UNet
from faceage.networks.regressors import AgeEstimator, IdentityNet, TrunkDims
from faceage.networks.stylegan import StyleDiscriminator, StyleGANDims, StyleGenerator
from train.facegan.facegan import Teacher, age_faces, pair_losses, random_motion, view, weights_of
from train.facegan.make_pairs import AGES, PairSampler, load_pairs


def invoke(script, *args):
    module = importlib.import_module(module_name(script))
    return CliRunner().invoke(module.main, [str(arg) for arg in args], catch_exceptions=False)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Small networks, small batches, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_networks(patch)
        draw_nothing(patch)
        for script in ("stylegan", "facegan"):
            config = importlib.import_module(module_name(script)).Config
            patch.setattr(f"{module_name(script)}.Config", partial(config, batch=BATCH, tick_images=TICK_IMAGES))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def helpers(tmp_path_factory):
    """Options that name an identity network and an estimator that know nothing."""
    folder = tmp_path_factory.mktemp("helpers")
    torch.manual_seed(0)
    small = {"widths": (8, 8, 12, 16), "blocks": (1, 1, 1, 1)}
    for name, arch, net, outputs in (
        ("identity", "identity", IdentityNet, 128),
        ("reader", "age-estimator", AgeEstimator, 101),
    ):
        dims = TrunkDims(**small, outputs=outputs)
        header = Header(arch=arch, dims=dims.__dict__, stage="test", images_seen=0, train_config={"half": 0})
        save(folder / f"{name}.safetensors", net(dims).state_dict(), header)
    return ("--identity", folder / "identity.safetensors", "--reader", folder / "reader.safetensors")


@pytest.fixture(scope="module")
def aging(tmp_path_factory):
    """The run folder of an Age-cGAN that knows nothing."""
    folder = tmp_path_factory.mktemp("aging")
    torch.manual_seed(0)
    for name, net in (("generator", Generator), ("encoder", Encoder)):
        header = Header(arch=f"age-cgan-{name}", dims=small_gan().__dict__, stage="test", images_seen=0)
        save(folder / f"{name}.safetensors", net(small_gan()).state_dict(), header)
    torch.save({"D": Discriminator(small_gan()).state_dict()}, folder / "resume.pt")
    return folder


@pytest.fixture(scope="module")
def runs(archive, cache, helpers, aging, tmp_path_factory):
    """The folder of the three steps, one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    common = ("--data", archive, "--cache", cache, "--images", 2 * TICK_IMAGES, *helpers)
    assert invoke("stylegan", *common, "--size", 64, "--out", folder / "stylegan").exit_code == 0
    assert make_pairs(folder, folder / "pairs", helpers).exit_code == 0
    parents = ("--aging", aging, "--pairs", folder / "pairs")
    assert invoke("facegan", *common, *parents, "--out", folder / "facegan").exit_code == 0
    return folder


def make_pairs(runs, out, helpers, *more):
    everything = ("--people", 20, "--min-cosine", -1, "--max-error", 1000)
    generator = ("--generator", runs / "stylegan" / FILES["stylegan"])
    return invoke("make_pairs", *generator, *helpers, "--out", out, *everything, *more)


def test_the_unet_keeps_to_its_budget():
    from torch.utils.flop_counter import FlopCounterMode

    net = UNet(FaceGANDims())
    for side, limit in ((128, 0.7e9), (256, 2.5e9)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 3, side, side), torch.tensor([30.0]), torch.tensor([60.0]))
        assert 0.3 * limit < counter.get_total_flops() <= limit


def stirred_unet(dims=None):
    """A U-Net whose last layer, zero before training, says something."""
    torch.manual_seed(1)
    net = UNet(dims or small_facegan())
    with torch.no_grad():
        net.to_luma.weight.normal_(0, 0.2)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("side", [64, 96, 128])
def test_a_face_at_its_own_age_is_not_changed(side):
    net, x = stirred_unet(), torch.rand(3, 3, side, side) * 2 - 1
    age = torch.tensor([20.0, 45.0, 70.0])
    assert net(x, age, age + 30).abs().amin((1, 2, 3)).shape == (3,)
    assert net(x, age, age + 30).abs().mean() > 1e-3
    assert not net(x, age, age).any()


def test_the_change_has_no_colour_and_no_exposure():
    net, x = stirred_unet(), torch.rand(2, 3, 128, 128) * 2 - 1
    delta = net(x, torch.tensor([20.0, 60.0]), torch.tensor([70.0, 20.0]))
    assert torch.equal(delta[:, 0], delta[:, 1])
    assert torch.equal(delta[:, 0], delta[:, 2])
    mask = torch.from_numpy(face_mask(128).copy())
    assert (delta * mask).sum((2, 3)).abs().max() / mask.sum() < 1e-5
    assert delta.abs().mean() > 1e-3


def test_the_change_brings_no_light_from_a_side():
    net, x = stirred_unet(), torch.rand(2, 3, 128, 128) * 2 - 1
    delta = net(x, torch.tensor([20.0, 60.0]), torch.tensor([70.0, 20.0]))
    left, right = delta[..., :64].mean((2, 3)), delta[..., 64:].mean((2, 3))
    assert (left - right).abs().max() < 0.02 * delta.abs().mean()
    assert (delta - delta.flip(3)).abs().mean() > 0.1 * delta.abs().mean()  # folds may differ


def test_the_change_is_limited():
    torch.manual_seed(0)
    network = UNet(FaceGANDims()).eval()
    x, ages = torch.rand(2, 3, 128, 128) * 2 - 1, torch.tensor([20.0, 60.0])
    changes = []
    with torch.no_grad():
        for strength in (0.03, 0.06, 100.0):
            network.to_luma.weight.normal_(std=strength, generator=torch.Generator().manual_seed(1))
            changes.append(network(x, ages, ages.flip(0)))
    assert 0.01 < changes[1].abs().max() < 0.2
    torch.testing.assert_close(changes[1], 2 * changes[0], rtol=1e-5, atol=1e-6)  # small ones are as they were drawn
    assert float(changes[2].abs().max()) == pytest.approx(0.35, abs=1e-3)


def test_who_z_is_does_not_depend_on_age_in_the_coarse_layers():
    torch.manual_seed(0)
    dims = StyleGANDims(size_px=16, widths=(8, 8, 8), latent=8, style=8, identity_px=16)
    z, y = torch.randn(2, 8), torch.eye(6)[:2]
    same = StyleGenerator(dims)
    np.testing.assert_array_equal(same(z, y).detach(), same(z, y.flip(0)).detach())
    differs = StyleGenerator(StyleGANDims(size_px=16, widths=(8, 8, 8), latent=8, style=8, identity_px=8))
    assert (differs(z, y) - differs(z, y.flip(0))).abs().max() > 1e-2


def test_both_discriminators_look_at_the_age():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 64, 64), torch.eye(6)[:4]
    for net in (StyleDiscriminator(small_styles(size_px=64, widths=(8,) * 5)), PatchDiscriminator(small_facegan())):
        scores = net(x, y)
        assert scores.shape[0] == 4
        assert (scores - net(x, y.flip(0))).abs().max() > 1e-4


def test_demodulation_keeps_the_variance():
    from faceage.networks.stylegan import _StyledConv

    torch.manual_seed(0)
    conv = _StyledConv(64, 64, 16, demodulate=True)
    x = torch.randn(8, 64, 16, 16)
    for size in (0.1, 10):
        assert float(conv(x, size * torch.randn(8, 16)).detach().std()) == pytest.approx(2**0.5 * 0.6, rel=0.2)


def test_every_step_leaves_its_files(runs):
    for script in ("stylegan", "facegan"):
        header, weights = load(runs / script / FILES[script], script)
        net = (
            StyleGenerator(small_styles(**header.dims)) if script == "stylegan" else UNet(small_facegan(**header.dims))
        )
        net.load_state_dict(weights)
        assert all(tensor.isfinite().all() for tensor in weights.values())
        assert header.images_seen == 2 * TICK_IMAGES
        assert (runs / script / "sheet.png").read_bytes().startswith(b"\x89PNG")
    parents = read_header(runs / "facegan" / FILES["facegan"]).parents
    assert parents["pairs"] == sha256_of(runs / "pairs" / "pairs.npz")


def test_pairs_are_of_one_person_and_two_ages(runs):
    pairs = load_pairs(runs / "pairs")
    assert len(pairs.pixels) == 20 * len(AGES)
    assert pairs.pixels.dtype == np.uint8
    young, old, young_age, old_age = PairSampler(pairs, 64, seed=0)()
    assert young.shape == old.shape == (64, 3, 64, 64)
    assert (young_age != old_age).all()
    pictures = {
        pixels.tobytes(): (who, age) for pixels, who, age in zip(pairs.pixels, pairs.people, pairs.ages, strict=True)
    }

    def known(x, age):
        pixels = ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        who = next(pictures[p.tobytes()] for p in (pixels, pixels[:, ::-1]) if p.tobytes() in pictures)
        assert who[1] == age
        return who[0]

    for row in range(64):
        assert known(young[row], young_age[row]) == known(old[row], old_age[row])


def test_pairs_follow_from_the_seed(runs, helpers, tmp_path):
    manifests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert make_pairs(runs, tmp_path / name, helpers, "--seed", seed).exit_code == 0
        manifests.append(json.loads((tmp_path / name / "manifest.json").read_text()))
    pixels = [load_pairs(tmp_path / name).pixels for name in "abc"]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert (pixels[0] != pixels[2]).any()
    assert manifests[0]["pictures"] == 160
    assert manifests[0]["generator"] == sha256_of(runs / "stylegan" / FILES["stylegan"])


def test_the_filter_leaves_out_what_is_read_as_another_age(runs, helpers, tmp_path):
    assert make_pairs(runs, tmp_path / "pairs", helpers, "--max-error", 20).exit_code == 0
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    pairs = load_pairs(tmp_path / "pairs")
    # An estimator that knows nothing reads much the same age off all.
    assert 0 < manifest["wrong_age"] < manifest["pictures_drawn"] == 160
    assert manifest["wrong_person"] == 0
    assert np.ptp(pairs.ages) <= 2 * 20
    assert np.unique(pairs.people, return_counts=True)[1].min() >= 2


def test_a_filter_that_leaves_nothing_says_so(runs, helpers, tmp_path):
    result = make_pairs(runs, tmp_path / "pairs", helpers, "--min-cosine", 1)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: none of 160 pictures passed (0 read as another age, ")
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("pairs", "has no pairs.npz; name the --out of train.facegan.make_pairs"),
        ("aging", "has no resume.pt, which holds the adversary; name the run folder of train.age_cgan.aging"),
    ],
)
def test_a_folder_without_what_is_needed_is_refused(runs, archive, cache, helpers, aging, tmp_path, option, message):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("generator", "encoder"):
        shutil.copy(aging / f"{name}.safetensors", bare)
    folders = {"aging": aging, "pairs": runs / "pairs"} | {option: bare}
    parents = (f"--{name}={folder}" for name, folder in folders.items())
    common = ("--data", archive, "--cache", cache, *helpers, "--out", tmp_path / "out")
    result = invoke("facegan", *common, *parents)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_starts_from_another_with_its_adversaries(runs, archive, cache, helpers, aging, tmp_path):
    common = ("--data", archive, "--cache", cache, "--images", BATCH, *helpers, "--aging", aging)
    result = invoke("facegan", *common, "--start", runs / "facegan", "--out", tmp_path / "out")
    assert result.exit_code == 0
    parents = read_header(tmp_path / "out" / FILES["facegan"]).parents
    assert parents["start"] == sha256_of(runs / "facegan" / FILES["facegan"])
    assert "pairs" not in parents
    before, after = (torch.load(path / "resume.pt", weights_only=True) for path in (runs / "facegan", tmp_path / "out"))
    for part, most in (("U", 0.01), ("fine", 0.01), ("coarse", 0.2)):  # one step; a spectral norm's vectors turn more
        moved = max(float((after[part][name] - value).abs().max()) for name, value in before[part].items())
        assert 0 < moved < most


def test_the_teacher_is_what_the_product_does(aging):
    from faceage.agers import age_cgan
    from faceage.ages import age_to_classes

    teacher = Teacher(aging / "encoder.safetensors", aging / "generator.safetensors")
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    x[1] *= 1e-5  # a face in fog gets a smaller change
    source, target = torch.tensor([20.0, 30.0, 60.0]), torch.tensor([50.0, 70.0, 20.0])
    z = teacher.encoder(x)
    made = [teacher.generator(z, torch.from_numpy(age_to_classes(age.numpy()))).numpy() for age in (source, target)]
    contrast = age_cgan._contrast(x.numpy(), made[0])
    assert contrast[1] < 0.5 < contrast[0]
    expected = age_cgan.CHANGE_GAIN * age_cgan._calm(made[1] - made[0]) * contrast
    np.testing.assert_allclose(teacher(x, source, target), expected, atol=1e-5)


def test_two_views_are_brought_together_by_their_motions():
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8), 192, mode="bicubic")
    first, second = random_motion(4, x.device), random_motion(4, x.device)
    onto = view(view(x, first, 128), torch.linalg.solve(first, second), 128)
    inner = (..., slice(24, -24), slice(24, -24))
    np.testing.assert_allclose(onto[inner], view(x, second, 128)[inner], atol=0.02)
    assert (view(x, first, 128)[inner] - view(x, second, 128)[inner]).abs().max() > 0.1


def test_a_known_change_costs_nothing():
    torch.manual_seed(0)

    class Knows(torch.nn.Module):
        def forward(self, x, source, target):
            known = torch.nn.functional.interpolate(change, x.shape[-1], mode="nearest")
            return known

    mask = torch.from_numpy(face_mask(64).copy())
    change = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8), 64, mode="bilinear")
    weights = weights_of(64, torch.device("cpu"))
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    change -= ((change * luma).sum(1, keepdim=True) * weights).sum((2, 3), keepdim=True) / weights.sum()
    young = torch.rand(2, 3, 64, 64) - 0.5
    identity = IdentityNet(TrunkDims(widths=(8, 8, 12, 16), blocks=(1, 1, 1, 1), outputs=16)).eval()
    ages = torch.tensor([20.0, 30.0])
    brighter = young + change + 0.3  # exposure is no part of age
    error, features = pair_losses(Knows(), identity, young, brighter, ages, ages + 40, 128)
    assert float(error.detach()) < 1e-5
    assert float(features.detach()) < 0.05
    wrong, _ = pair_losses(Knows(), identity, young, young, ages, ages + 40, 128)
    assert float(wrong.detach()) > 0.1
    assert mask.max() == 1


def test_aging_changes_nothing_outside_the_mask():
    x = torch.rand(2, 3, 64, 64)
    aged, _ = age_faces(stirred_unet(), x, torch.tensor([20.0, 30.0]), torch.tensor([70.0, 80.0]))
    outside = torch.from_numpy(face_mask(64) == 0)
    assert not (aged - x)[..., outside].any()
    assert (aged - x).abs().max() > 1e-3


GOLDEN = {
    "stylegan": {"loss_D": 1.38289, "loss_G": 0.75234, "identity": 0.011, "age": 2.55833},
    "facegan": {"loss_coarse": 1.99828, "loss_fine": 1.98869, "age": 1.13016, "pair": 0.09562, "teacher": 0.00153},
}
"""The last logged losses of `runs`. A change of the recipe changes them: write the new ones down with it."""


@pytest.mark.parametrize("script", GOLDEN)
def test_losses_are_the_golden_ones(runs, script):
    last = json.loads((runs / script / "log.jsonl").read_text().splitlines()[-1])
    got = {name: last[name] for name in GOLDEN[script]}
    assert got == pytest.approx(GOLDEN[script], rel=0.02, abs=0.0005)
