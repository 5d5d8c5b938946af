import pytest
import torch

from faceage.agers.canonical import read_canonical
from faceage.checkpoint import Header, load, read_header, save, sha256_of
from faceage.errors import CheckpointError
from faceage.models import find_model

HEADER = Header(arch="identity", dims={"size_px": 64}, stage="identity", images_seen=3, metrics={"val": 0.5})


@pytest.fixture
def file(tmp_path):
    save(tmp_path / "a.safetensors", {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(4)}, HEADER)
    return tmp_path / "a.safetensors"


def test_round_trip(file):
    header, weights = load(file, "identity")
    assert header == HEADER
    torch.testing.assert_close(weights["w"], torch.arange(6.0).view(2, 3))
    assert weights["n"] == 4
    assert read_header(file) == HEADER
    assert not list(file.parent.glob("*.part"))


def test_half_precision_is_stored_and_loaded_as_float32(tmp_path):
    sha = save(tmp_path / "h.safetensors", {"w": torch.full((1000,), 0.1)}, HEADER, half=True)
    assert sha == sha256_of(tmp_path / "h.safetensors")
    _, weights = load(tmp_path / "h.safetensors", "identity")
    assert weights["w"].dtype == torch.float32
    assert 0 < (weights["w"] - 0.1).abs().max() < 1e-4
    assert (tmp_path / "h.safetensors").stat().st_size < 3000


def test_wrong_architecture(file):
    with pytest.raises(CheckpointError, match="holds identity, expected age-cgan-generator"):
        load(file, "age-cgan-generator")


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_header(tmp_path / "none.safetensors")


def test_truncated(file):
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="damaged or not safetensors"):
        read_header(file)


def test_not_ours(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="no faceage header"):
        read_header(tmp_path / "b.safetensors")


def test_newer_format(tmp_path):
    newer = Header(**{**HEADER.__dict__, "format_version": 99})
    save(tmp_path / "c.safetensors", {"w": torch.zeros(1)}, newer)
    with pytest.raises(CheckpointError, match="format 99"):
        read_header(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", '"9"', "format_version is '9', expected int"),
        ("dims", "[3]", r"dims is \[3\], expected dict"),
        ("dims", '{"size_px": 1e12}', "dims has size_px 1000000000000.0, expected numbers from 0 to 16384"),
        ("dims", '{"widths": [3, -1]}', r"dims has widths \[3, -1\], expected numbers"),
        ("dataset", "[" * 100_000 + "]" * 100_000, "cannot read .maximum recursion depth"),
    ],
)
def test_a_damaged_header(tmp_path, field, value, message):
    from safetensors.torch import save_file

    fields = {"arch": '"identity"', "dims": "{}", "stage": '"x"', "images_seen": "3"} | {field: value}
    text = "{" + ", ".join(f'"{name}": {each}' for name, each in fields.items()) + "}"
    save_file({"w": torch.zeros(1)}, tmp_path / "d.safetensors", metadata={"faceage": text})
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "d.safetensors")


def test_others_may_read_it(file):
    assert file.stat().st_mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_any_flipped_bit_is_noticed(file):
    whole = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(whole[:8], "little")
    for at in (*range(8, length, 7), *range(length, len(whole), max(1, (len(whole) - length) // 20)), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(file, "identity")
    file.write_bytes(whole)
    load(file, "identity")


def test_a_damaged_model_is_one_line(tmp_path):
    data = bytearray(find_model("space").generator.read_bytes())
    data[-1000] ^= 1
    (tmp_path / "space.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"space.safetensors is damaged: .* restore it by reinstalling"):
        read_canonical(tmp_path / "space.safetensors")
