"""The reader of skin: what it sees, what it learns from, and a run of a few pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from faceage.checkpoint import Header, save
from faceage.errors import CheckpointError
from faceage.kernels import BLACK_OFFSET, RGB_LUMA
from train.space import skin
from train.space.coordinates import STORED_PX
from train.space.faces import AAF, UTKFACE
from train.space.pairs import CROP_PX
from train.space.skin import Config, SkinDims, SkinReader, load_skin_reader, log_luma


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve faces of noise."""
    out, count = tmp_path_factory.mktemp("faces"), 12
    crops = np.random.default_rng(0).integers(0, 255, (count, STORED_PX, STORED_PX, 3), np.uint8)
    np.save(out / f"crops-{STORED_PX}.npy", crops)
    np.savez(
        out / "faces.npz",
        names=np.array([f"{i}.jpg" for i in range(count)]),
        dataset=np.where(np.arange(count) < 8, UTKFACE, AAF),
        ages=np.linspace(18, 80, count).astype(np.float32),
        genders=np.arange(count) % 2,
        races=np.zeros(count, np.int64),
        landmarks=np.zeros((count, 5, 2), np.float32),
        mesh=np.zeros((count, 468, 3), np.float32),
        presence=np.ones(count, np.float32),
        validation=np.arange(count) % 4 == 0,
    )
    return out


def test_light_is_not_seen():
    reader = SkinReader(SkinDims())
    luma = torch.from_numpy(np.random.default_rng(0).normal(0, 0.2, (1, 1, CROP_PX, CROP_PX)).astype(np.float32))
    slope = torch.linspace(-1, 1, CROP_PX).expand(CROP_PX, -1)
    inner = slice(40, -40)
    seen, lit = (reader.see(x)[..., inner, inner] for x in (luma, luma + 0.5 + 0.3 * slope))
    torch.testing.assert_close(seen, lit, atol=2e-3, rtol=0)


def test_an_unspoiled_face_is_the_middle_of_what_is_stored(folder):
    crops = np.load(folder / f"crops-{STORED_PX}.npy")
    luma = np.exp(log_luma(crops[:1], None)[0, 0].numpy()) - BLACK_OFFSET
    margin = (STORED_PX - CROP_PX) // 2
    stored = crops[0, margin:-margin, margin:-margin] / 255 @ RGB_LUMA
    np.testing.assert_allclose(luma, stored, atol=1e-3)


def test_a_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(skin, "Config", lambda: Config(batch=2, tick_images=4))
    out = tmp_path / "skin"
    for count in (4, 8):
        arguments = ["--faces", str(folder), "--out", str(out), "--images", str(count)]
        assert CliRunner().invoke(skin.main, arguments, catch_exceptions=False).exit_code == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [4, 8]
    reader = load_skin_reader(out / "skin.safetensors")
    assert not any(weight.requires_grad for weight in reader.parameters())
    ages = reader(reader.see(torch.zeros(3, 1, CROP_PX, CROP_PX)))
    assert ages.shape == (3,)
    assert ((ages > 0) & (ages < 100)).all()


def test_a_reader_of_the_judge_s_pictures_is_refused(folder, tmp_path):
    out = tmp_path / "skin.safetensors"
    header = Header(arch="skin", dims=dataclasses.asdict(SkinDims()), stage="skin", images_seen=0)
    save(out, SkinReader(SkinDims()).state_dict(), header)
    with pytest.raises(CheckpointError, match="did not learn from half 0 alone"):
        load_skin_reader(out)
