"""The network that makes faces older: its colours, its losses, and a run of a few pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from faceage.checkpoint import Header, read_header, save
from faceage.geometry import TEMPLATES, template_5
from faceage.networks.space import OlderDims, OlderNet
from train.readers.age_estimator import LOSS_HALF
from train.space import older, pairs
from train.space.older import (
    Config,
    Critics,
    change_colours,
    draw,
    draw_alone,
    draw_sheet,
    drift,
    level_errors,
    log_colours,
)
from train.space.pairs import CROP_PX, SHOWN, STORED_PX, VERSIONS, Pairs
from train.space.skin import SkinDims, SkinReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs, two of them for validation, of noise and the same noise with lines."""
    out, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    shape = (7, len(VERSIONS), STORED_PX, STORED_PX, 3)
    crops = np.lib.format.open_memmap(out / "crops.npy", "w+", np.uint8, shape)
    crops[:] = random.integers(90, 200, (7, 1, STORED_PX, STORED_PX, 3))
    crops[:, 0, ::12] //= 2
    young = np.lib.format.open_memmap(out / "alone.npy", "w+", np.uint8, (SHOWN + 4, STORED_PX, STORED_PX, 3))
    young[:] = 128
    np.savez(
        out / "pairs.npz",
        rows=np.array([0, 1, 2, 3, 5, 6]),
        ages=np.linspace(60, 80, 6, dtype=np.float32),
        validation=np.arange(6) < 2,
        alone_ages=np.full(SHOWN + 4, 25, np.float32),
        groups=np.arange(6) % 2,
        alone_groups=np.arange(SHOWN + 4) % 2,
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


@pytest.fixture(scope="module")
def skin(tmp_path_factory):
    """A reader of skin that has learned nothing."""
    torch.manual_seed(0)
    header = Header(
        arch="skin", dims=dataclasses.asdict(SkinDims()), stage="skin", images_seen=0, train_config={"half": LOSS_HALF}
    )
    file = tmp_path_factory.mktemp("skin") / "skin.safetensors"
    save(file, SkinReader(SkinDims()).state_dict(), header)
    return file


def test_the_adversary_learns_what_real_faces_have_and_faces_gain_by_having_it():
    torch.manual_seed(0)
    config, random = Config(adversary_kept=8, adversary_noise=0.02), np.random.default_rng(0)
    critics = Critics(SkinReader(SkinDims()).eval().requires_grad_(False), config)
    smooth = torch.zeros(6, 3, CROP_PX, CROP_PX)
    lined = smooth.clone()
    lined[:, 0, ::6] = -0.2
    told = [float(critics.learn(smooth, lined, random)["told"]) for _ in range(8)]
    assert told[-1] > 0.95
    years = torch.full((6,), 70.0)
    unreal = [float(critics.judge(share * lined, years)[0]) for share in (0.0, 1.0)]
    assert unreal[1] < unreal[0]
    made = smooth.clone().requires_grad_()
    critics.judge(made, years)[0].backward()
    assert float(made.grad[:, 0].abs().sum()) > 0
    assert not made.grad[:, 1:].any()  # it sees no colour
    assert all(each.requires_grad for each in critics.adversary.parameters())


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
    inputs, faces = draw_alone(list(loaded.alone[:4]), random, Config())
    assert inputs.shape == faces.shape == (4, 3, CROP_PX, CROP_PX)
    assert float(((inputs + 1) / 2 - faces).abs().max()) > 0.01


def test_no_years_change_nothing():
    net = OlderNet(OlderDims(size_px=CROP_PX)).eval()
    x, age = torch.rand(1, 3, CROP_PX, CROP_PX) * 2 - 1, torch.tensor([40.0])
    with torch.inference_mode():
        assert not net(x, age, age).any()
        assert net(x, age, age + 30).any()


def test_a_run_goes_on_where_it_was_and_refuses_other_pairs(folder, skin, tmp_path, monkeypatch):
    monkeypatch.setattr(older, "Config", lambda: Config(batch=2, alone_batch=2, tick_images=4))
    monkeypatch.setattr(older, "SHEET_AGES", (70,))

    def train(out, count, *more):
        arguments = ["--pairs", str(folder), "--out", str(tmp_path / out), "--images", str(count)]
        return CliRunner().invoke(older.main, [*arguments, *more], catch_exceptions=False)

    more = ["--skin", str(skin), "--start", str(tmp_path / "first")]
    assert train("first", 4).exit_code == 0
    alone = train("second", 4, *more[:2])
    assert alone.exit_code == 2
    assert "--start and --skin go together" in alone.output
    for count in (4, 8):
        assert train("second", count, *more).exit_code == 0
    logs = ((tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("first", "second"))
    first, *second = (json.loads(line) for lines in logs for line in lines)
    assert [line["images"] for line in second] == [4, 8]
    assert not {"adversary", "years", "drift"} & first.keys()  # pairs alone
    assert {"adversary", "years", "drift"} <= second[-1].keys()
    header = read_header(tmp_path / "second" / "older.safetensors")
    assert (header.arch, header.images_seen, header.dims["size_px"]) == ("space-older", 8, CROP_PX)
    assert header.parents.keys() == {"pairs", "skin", "start"}
    assert (tmp_path / "second" / "sheet.png").exists()
    manifest = folder / "manifest.json"
    was = manifest.read_text()
    manifest.write_text("{}")
    refused = train("second", 8, *more)
    manifest.write_text(was)
    assert refused.exit_code == 1
    assert "parent pairs" in refused.output


def test_what_no_loss_sees_stays_as_it_was_and_folds_are_redder_than_skin():
    random = np.random.default_rng(0)
    first = torch.from_numpy(random.normal(0, 0.1, (2, 3, CROP_PX, CROP_PX)).astype(np.float32))
    first = torch.nn.functional.avg_pool2d(first, 33, 1, 16)
    y = torch.arange(CROP_PX).float()
    folds = torch.zeros_like(first)
    folds[:, 0] = 0.2 * torch.cos(np.pi * y)[:, None]  # as fine as can be
    config = Config()
    reddish = folds.clone()
    reddish[:, 1], reddish[:, 2] = (share * folds[:, 0] for share in config.red_of_dark)
    none, grey, red = (float(drift(first + x, first, config)) for x in (torch.zeros_like(first), folds, reddish))
    assert red < 0.3 * grey
    assert float(drift(first + 0.1, first, config)) > none + 1  # light is held


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
    draw_sheet(net, torch.zeros(2, 3, CROP_PX, CROP_PX), torch.tensor([25.0, 50.0]), tmp_path / "sheet.png")
    import cv2

    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (4 * CROP_PX, 2 * CROP_PX, 3)
