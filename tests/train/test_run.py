import dataclasses
import json
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from faceage.checkpoint import sha256_of
from faceage.errors import CheckpointError
from train.run import EMA, Run, sheet


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.5
    where: Path = Path("here")


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still unless told."""
    now = types.SimpleNamespace(s=1000.0)
    monkeypatch.setattr("train.run.time", types.SimpleNamespace(monotonic=lambda: now.s))
    return now


def filled(value):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in net.state_dict().values():
        tensor.fill_(value)
    return net


@pytest.mark.parametrize(
    ("batch", "images_seen", "kept"),
    [
        (1000, 10**6, 0.5),  # a half-life passes
        (500, 10**6, 0.5**0.5),
        (100, 1000, 0.5),  # the half-life starts at a tenth of what was seen
        (32, 32, 0.5**10),
    ],
)
def test_average_moves_by_its_half_life(batch, images_seen, kept):
    net = filled(0)
    ema = EMA(net, half_life_images=1000)
    for tensor in net.state_dict().values():
        tensor.fill_(1)
    ema.update(net, batch, images_seen)
    for name, tensor in ema.net.state_dict().items():
        expected = 1 if name.endswith("num_batches_tracked") else 1 - kept  # counts are copied
        np.testing.assert_allclose(tensor, expected, rtol=1e-5, err_msg=name)


def test_average_is_a_frozen_copy():
    net = filled(0)
    ema = EMA(net, 1000)
    assert not ema.net.training
    assert net.training
    assert not any(p.requires_grad for p in ema.net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    nn.init.ones_(net[0].weight)
    assert (ema.net[0].weight == 0).all()


def test_average_converges_to_weights_that_stay():
    net = filled(0)
    ema = EMA(net, 100)
    nn.init.ones_(net[0].weight)
    for images in range(50, 2050, 50):
        ema.update(net, 50, images)
    np.testing.assert_allclose(ema.net[0].weight, 1, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("-inf"))])
def test_a_value_that_is_not_finite_stops_the_run(tmp_path, value):
    run = Run(tmp_path, Config(), 1)
    run.images_seen = 64
    run.record(loss=1.0)
    with pytest.raises(FloatingPointError, match="not finite after 64 images"):
        run.record(loss=value, other=1.0)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2  # what happened can be read afterwards


def test_log_takes_any_kind_of_number(tmp_path, clock, capsys):
    run = Run(tmp_path / "new" / "run", Config(), 1)
    run.images_seen = 3000
    clock.s += 30
    run.record(a=torch.tensor(1.25), b=np.float64(2.0), c=3)
    (line,) = (tmp_path / "new" / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"images": 3000, "seconds": 30.0, "a": 1.25, "b": 2.0, "c": 3.0}
    assert "3.0 kimg" in capsys.readouterr().err
    assert json.loads((tmp_path / "new" / "run" / "config.json").read_text()) == {"rate": 0.5, "where": "here"}


def test_the_budget_counts_all_sessions(tmp_path, clock):
    run = Run(tmp_path, Config(), minutes=1)
    clock.s += 500  # to prepare the faces
    run.load_state({})
    assert run.images_seen == 0
    clock.s += 45
    assert run.progress == pytest.approx(0.75)
    assert not run.is_over
    run.images_seen = 128
    run.save_state({"net": filled(3)})

    clock.s += 10_000  # between the sessions
    again, net = Run(tmp_path, Config(), minutes=2), filled(0)
    clock.s += 500
    again.load_state({"net": net})
    assert again.images_seen == 128
    assert again.elapsed_s == pytest.approx(45)
    assert again.progress == pytest.approx(0.375)
    assert (net[0].weight == 3).all()
    clock.s += 75
    assert again.is_over
    assert again.progress == 1
    assert [file.name for file in tmp_path.glob("resume*")] == ["resume.pt"]


def test_a_budget_in_images_does_not_look_at_the_clock(tmp_path, clock):
    run = Run(tmp_path, Config(), minutes=1, images=1000)
    clock.s += 10_000
    run.images_seen = 250
    assert run.progress == 0.25
    run.images_seen = 999
    assert not run.is_over
    run.images_seen = 1008
    assert run.is_over
    assert run.progress == 1


def test_what_is_random_goes_on(tmp_path):
    run = Run(tmp_path, Config(), 1)
    torch.manual_seed(7)
    run.save_state({})
    expected = torch.rand(3)
    torch.manual_seed(8)
    Run(tmp_path, Config(), 1).load_state({})
    np.testing.assert_array_equal(torch.rand(3), expected)


def test_lines_after_the_last_checkpoint_are_forgotten(tmp_path):
    run = Run(tmp_path, Config(), 1)
    for run.images_seen in (100, 200):
        run.record(loss=1.0)
        run.save_state({})
    saved = (tmp_path / "log.jsonl").read_text()
    run.images_seen = 300
    run.record(loss=1.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"images": 40')  # killed while it wrote
    Run(tmp_path, Config(), 1).load_state({})
    assert (tmp_path / "log.jsonl").read_text() == saved

    (tmp_path / "resume.pt").unlink()  # killed before the first checkpoint
    Run(tmp_path, Config(), 1).load_state({})
    assert (tmp_path / "log.jsonl").read_text() == ""


@dataclasses.dataclass(frozen=True)
class Dims:
    widths: tuple[int, ...] = (8, 16)


@pytest.fixture
def parents(tmp_path):
    for name in ("gan", "identity", "other"):
        (tmp_path / name).write_text(name)
    return {name: tmp_path / name for name in ("gan", "identity", "other")}


@pytest.mark.parametrize(
    ("config", "dims", "gan", "message"),
    [
        (Config(rate=0.25), Dims(), "gan", "rate was 0.5, is 0.25"),
        (Config(), Dims((8, 12)), "gan", r"dims.widths was \[8, 16\], is \[8, 12\]"),
        (Config(), None, "gan", r"dims.widths was \[8, 16\], is None"),
        (Config(), Dims(), "other", "its parent gan was [0-9a-f]{12}, is [0-9a-f]{12}. Start it as before, or name"),
        (Config(), Dims(), None, "its parent gan was [0-9a-f]{12}, is not given. Start it as before, or name"),
    ],
)
def test_a_run_keeps_its_settings_and_parents(tmp_path, parents, config, dims, gan, message):
    folder = tmp_path / "run"
    Run(folder, Config(), 1, dims=Dims(), parents={"gan": parents["gan"]}).save_state({})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        Run(folder, config, 1, dims=dims, parents={} if gan is None else {"gan": parents[gan]})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_run_keeps_its_parents(tmp_path, parents):
    one, both = {"gan": parents["gan"]}, {name: parents[name] for name in ("gan", "identity")}
    Run(tmp_path / "run", Config(), 1, parents=one).save_state({})
    assert Run(tmp_path / "run", Config(), 2, 100, parents=one).parents == {"gan": sha256_of(parents["gan"])}
    with pytest.raises(CheckpointError, match="its parent identity was not given, is"):
        Run(tmp_path / "run", Config(), 1, parents=both)


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path):
    torch.save({"images_seen": 5, "seconds": 1.0}, tmp_path / "resume.pt")
    with pytest.raises(CheckpointError, match="older version"):
        Run(tmp_path, Config(), 1)


def test_every_value_has_a_curve(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("train.run.Figure.savefig", lambda figure, path, **_: drawn.append((figure, path)))
    run = Run(tmp_path, Config(), 1)
    for images in (1000, 2000, 3000):
        run.images_seen = images
        run.record(loss=images / 1e4, **({"late": 5.0} if images > 1000 else {}))
    figure, path = drawn[-1]
    assert path == tmp_path / "curves.png"
    points = {axis.get_title(): axis.lines[0].get_xydata().tolist() for axis in figure.axes}
    assert points == {"loss": [[1, 0.1], [2, 0.2], [3, 0.3]], "late": [[2, 5], [3, 5]]}


def test_sheet_is_rgb_rows_scaled(tmp_path):
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(3, 3, 4, 4)
    sheet([red, torch.full((3, 3, 4, 4), 5.0)], tmp_path / "sheet.png", scale=2)
    picture = cv2.imread(str(tmp_path / "sheet.png"))[:, :, ::-1]
    assert picture.shape == (16, 24, 3)
    assert (picture[:8] == [255, 0, 0]).all()
    assert (picture[8:] == 255).all()  # clipped
