import dataclasses
import json
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

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
    assert run.load_state() is None
    clock.s += 45
    assert run.progress == pytest.approx(0.75)
    assert not run.is_over
    run.images_seen = 128
    run.save_state(net=filled(3).state_dict())

    clock.s += 10_000  # between the sessions
    again = Run(tmp_path, Config(), minutes=2)
    state = again.load_state()
    assert again.images_seen == 128
    assert again.elapsed_s == pytest.approx(45)
    assert again.progress == pytest.approx(0.375)
    assert (state["net"]["0.weight"] == 3).all()
    clock.s += 75
    assert again.is_over
    assert again.progress == 1
    assert [file.name for file in tmp_path.glob("resume*")] == ["resume.pt"]


def test_sheet_is_rgb_rows_scaled(tmp_path):
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(3, 3, 4, 4)
    sheet([red, torch.full((3, 3, 4, 4), 5.0)], tmp_path / "sheet.png", scale=2)
    picture = cv2.imread(str(tmp_path / "sheet.png"))[:, :, ::-1]
    assert picture.shape == (16, 24, 3)
    assert (picture[:8] == [255, 0, 0]).all()
    assert (picture[8:] == 255).all()  # clipped
