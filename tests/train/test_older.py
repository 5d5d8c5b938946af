"""The network that makes faces older: its colours, its losses, and a run of a few pictures."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from faceage.checkpoint import read_header
from faceage.geometry import TEMPLATES, template_5
from faceage.networks.space import OlderDims, OlderNet
from train.space import older, pairs
from train.space.older import Adversary, Config, change_colours, draw, draw_sheet, draw_young, level_errors, log_colours
from train.space.pairs import CROP_PX, SHOWN, STORED_PX, VERSIONS, Pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs, two of them for validation, of noise and the same noise with lines."""
    out, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    shape = (7, len(VERSIONS), STORED_PX, STORED_PX, 3)
    crops = np.lib.format.open_memmap(out / "crops.npy", "w+", np.uint8, shape)
    crops[:] = random.integers(90, 200, (7, 1, STORED_PX, STORED_PX, 3))
    crops[:, 0, ::12] //= 2
    young = np.lib.format.open_memmap(out / "young.npy", "w+", np.uint8, (SHOWN + 4, STORED_PX, STORED_PX, 3))
    young[:] = 128
    np.savez(
        out / "pairs.npz",
        rows=np.array([0, 1, 2, 3, 5, 6]),
        ages=np.linspace(60, 80, 6, dtype=np.float32),
        validation=np.arange(6) < 2,
        young_ages=np.full(SHOWN + 4, 25, np.float32),
    )
    (out / "manifest.json").write_text(json.dumps({"names": list("abcdefg")}))
    return out


def test_a_change_of_colours_is_what_their_logs_say():
    a, b = (
        torch.from_numpy(np.random.default_rng(i).uniform(0.4, 0.6, (2, 3, 8, 8)).astype(np.float32)) for i in (0, 1)
    )
    made = change_colours(a, log_colours(b) - log_colours(a))
    torch.testing.assert_close(made, b, atol=0.01, rtol=0)  # the logarithm of luma is no sum of logarithms, exactly
    torch.testing.assert_close(change_colours(a, torch.zeros_like(a)), a)


def test_what_is_wanted_has_no_error_and_half_of_it_has_some():
    wanted = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (2, 3, CROP_PX, CROP_PX)).astype(np.float32))
    none, alike = level_errors(wanted, wanted, Config())
    some, half_alike = level_errors(0.5 * wanted, wanted, Config())
    assert none < some
    assert np.allclose(alike, 1, atol=1e-4)
    assert np.allclose(half_alike, 1, atol=1e-4)


def test_the_adversary_sees_no_light():
    adversary = Adversary()
    luma = torch.from_numpy(np.random.default_rng(0).normal(0, 0.2, (1, 1, CROP_PX, CROP_PX)).astype(np.float32))
    slope = torch.linspace(-1, 1, CROP_PX).expand(CROP_PX, -1)
    inner = slice(40, -40)
    seen, lit = (adversary.see(x)[..., inner, inner] for x in (luma, luma + 0.5 + 0.3 * slope))
    torch.testing.assert_close(seen, lit, atol=2e-3, rtol=0)


def test_faces_are_drawn_alike_and_only_the_network_sees_noise(folder):
    loaded, random = Pairs.load(folder), np.random.default_rng(3)
    seen, young, real, source, target = draw(loaded, np.array([0, 4, 5]), random, Config(), plain=True)
    assert seen.shape == young.shape == real.shape == (3, 3, CROP_PX, CROP_PX)
    torch.testing.assert_close((seen + 1) / 2, young)
    margin = (STORED_PX - CROP_PX) // 2
    stored = loaded.crops[5, 0, margin:-margin, margin:-margin]  # the fifth that is used
    torch.testing.assert_close(real[1].permute(1, 2, 0), torch.from_numpy(stored / np.float32(255)), atol=1e-3, rtol=0)
    assert (target > 59).all()
    assert ((source > 20) & (source < 30)).all()
    inputs, faces = draw_young(loaded, np.arange(4), random, Config())
    assert inputs.shape == faces.shape == (4, 3, CROP_PX, CROP_PX)
    assert float(((inputs + 1) / 2 - faces).abs().max()) > 0.01


def test_no_years_change_nothing():
    net = OlderNet(OlderDims(size_px=CROP_PX)).eval()
    x, age = torch.rand(1, 3, CROP_PX, CROP_PX) * 2 - 1, torch.tensor([40.0])
    with torch.inference_mode():
        assert not net(x, age, age).any()
        assert net(x, age, age + 30).any()


def test_a_run_goes_on_where_it_was_and_refuses_other_pairs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(older, "Config", lambda: Config(batch=2, young_batch=2, adversary_from_images=2, tick_images=4))
    out = tmp_path / "older"

    def train(count):
        arguments = ["--pairs", str(folder), "--out", str(out), "--images", str(count)]
        return CliRunner().invoke(older.main, arguments, catch_exceptions=False)

    assert train(4).exit_code == 0
    assert train(8).exit_code == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [4, 8]
    assert {"adversary", "made_young"} <= lines[-1].keys()
    header = read_header(out / "older.safetensors")
    assert (header.arch, header.images_seen, header.dims["size_px"]) == ("space-older", 8, CROP_PX)
    assert (out / "sheet.png").exists()
    manifest = folder / "manifest.json"
    was = manifest.read_text()
    manifest.write_text("{}")
    refused = train(8)
    manifest.write_text(was)
    assert refused.exit_code == 1
    assert "parent pairs" in refused.output


def test_a_crop_of_pairs_is_the_product_s_with_a_margin():
    picture = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    landmarks = template_5(CROP_PX, TEMPLATES["whole face"]) + 60  # moved, neither turned nor zoomed
    margin = (STORED_PX - CROP_PX) // 2
    start = 60 - margin
    assert (pairs.crop(picture, landmarks) == picture[start : start + STORED_PX, start : start + STORED_PX]).all()


def test_pairs_that_are_not_finished_are_not_taken(tmp_path):
    with pytest.raises(Exception, match="run train\\.space\\.pairs to its end"):
        Pairs.load(tmp_path)


def test_the_sheet_shows_three_ages(tmp_path):
    net = OlderNet(OlderDims(size_px=CROP_PX)).eval()
    draw_sheet(net, torch.zeros(2, 3, CROP_PX, CROP_PX), tmp_path / "sheet.png")
    import cv2

    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (4 * CROP_PX, 2 * CROP_PX, 3)
