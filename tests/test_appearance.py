"""The measures of appearance, on synthetic sets whose answer is known."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # `train` is not installed

from faceage.geometry import TEMPLATE_5, face_mask
from train.evaluate import bands, c2st, fgnet, hair, prototype
from train.evaluate.photos import draw_alike

SIDE = 96


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def faces(random):
    """Sixty pictures with detail of every size, each in a light and a tint of its own: uint8 [60, 96, 96, 3]."""
    return draw(random, 60)


def draw(random, count):
    pictures = []
    for _ in range(count):
        layers = [
            cv2.resize(random.random((n, n, 3)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for n in (4, 12, 48)
        ]
        picture = (0.25 + 0.5 * np.mean(layers, 0)) * random.uniform(0.7, 1.2)
        pictures.append(np.clip(255 * picture, 0, 255))
    return np.rint(pictures).astype(np.uint8)


def scale(pictures, log_ratio):
    """Multiply pictures by exp of a map [S, S] or [S, S, 3]."""
    ratio = np.exp(log_ratio if log_ratio.ndim == 3 else log_ratio[..., None])
    return np.clip(np.rint(pictures * ratio), 0, 255).astype(np.uint8)


# Bands


def test_a_wave_has_its_energy_in_its_own_band():
    y = np.arange(192)
    energies = []
    for sigma in bands.SIGMAS[1:4]:
        period = 192 * sigma * 6.5  # where the band between this blur and the next is strongest
        wave = 120 + 30 * np.sin(2 * np.pi * y / period)
        crop = np.repeat(np.repeat(wave[:, None, None], 192, 1), 3, 2).astype(np.uint8)
        energies.append(bands.band_energies(crop[None])[0, list(bands.REGIONS).index("cheeks")].argmax())
    assert energies == [2, 3, 4]


def test_exposure_moves_no_band(faces):
    darker = bands.band_energies((faces * 0.8).astype(np.uint8))
    errors = bands.energy_errors(darker, bands.band_energies(faces))
    assert errors["mean"] < 0.15  # the offset of the logarithm, and rounding


def test_a_change_in_one_region_is_an_error_of_that_region(faces):
    wave = 0.3 * np.sin(np.arange(SIDE) * 2)[:, None] * bands.region_mask("forehead", SIDE)
    errors = bands.energy_errors(bands.band_energies(scale(faces, wave)), bands.band_energies(faces))
    assert errors["forehead"] > 0.5
    assert max(errors["cheeks"], errors["mouth"]) < 0.02


def test_regions_do_not_meet():
    assert sum(bands.region_mask(region, 200).astype(int) for region in bands.REGIONS).max() <= 2
    for region in ("eyes", "cheeks", "mouth"):
        assert not (bands.region_mask("forehead", 200) & bands.region_mask(region, 200)).any()


# C2ST


def test_uniform_patterns_have_59_bins():
    assert sorted(set(c2st._CODES.tolist())) == list(range(59))
    assert (c2st._CODES == 58).sum() == 256 - 58


def test_patterns_are_the_definition(random):
    maps = random.random((1, 5, 5)).astype(np.float32)
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    code = sum(int(maps[0, 2 + y, 2 + x] >= maps[0, 2, 2]) << bit for bit, (y, x) in enumerate(c2st._NEIGHBOURS))
    expected = np.zeros(59)
    expected[c2st._CODES[code]] = 1
    np.testing.assert_array_equal(c2st.lbp_histogram(maps, mask)[0], expected)


def test_the_regression_finds_the_direction(random):
    x = random.normal(size=(4000, 3))
    y = (random.random(4000) < 1 / (1 + np.exp(-(2 * x[:, 0] + 0.5)))).astype(float)
    coefficients = c2st.fit_logistic(x, y, np.full(4000, 1 / 4000))
    assert 1.0 < coefficients[0] < 2.0  # the ridge shortens it
    assert np.abs(coefficients[1:3]).max() < 0.1
    assert coefficients[3] == pytest.approx(0.45, abs=0.15)


def test_auc_counts_pairs():
    assert c2st.auc(np.array([1.0, 2, 3]), np.array([2.0, 4])) == pytest.approx((1 + 0.5 + 0 + 3) / 6)


def test_two_halves_of_one_set_cannot_be_told_apart(random):
    features = c2st.full_features(draw(random, 160))
    result = c2st.held_out_auc(features[:80], features[80:])
    assert result["auc"] == pytest.approx(0.5, abs=3 * result["error"])
    assert 0.02 < result["error"] < 0.08


@pytest.mark.parametrize("features", [c2st.full_features, c2st.fine_features], ids=["full", "fine"])
def test_stripes_are_seen(faces, random, features):
    striped = scale(faces, np.repeat(0.12 * np.sin(np.arange(SIDE) * 1.2)[:, None], SIDE, 1))
    assert c2st.held_out_auc(features(striped), features(draw(random, 60)))["auc"] > 0.95


def test_the_fine_band_sees_neither_light_nor_tint(faces, random):
    light = np.linspace(-0.3, 0.3, SIDE)[:, None, None] + np.array([0.1, 0, -0.1])
    lit, others = scale(faces, np.broadcast_to(light, (SIDE, SIDE, 3))), draw(random, 60)
    full, fine = (
        c2st.held_out_auc(features(lit), features(others))["auc"]
        for features in (c2st.full_features, c2st.fine_features)
    )
    assert full > 0.9
    assert fine < 0.72


# Prototypes and dirt


@pytest.fixture
def ageing():
    """A change that is the same on both sides: float64 [96, 96, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    shade = -0.12 * np.cos(2 * np.pi * (x - 0.5)) * np.sin(np.pi * y)
    return shade[..., None] * np.array([0.9, 1.0, 1.1])


@pytest.mark.parametrize(("times", "expected"), [(0, 0), (0.5, 0.5), (1, 1), (1.5, 1.5)])
def test_recovery_is_the_share_of_the_change(random, ageing, times, expected):
    before, old = draw(random, 60), scale(draw(random, 60), ageing)
    sets = [prototype.log_colours(crops) for crops in (scale(before, times * ageing), before, old)]
    result = prototype.recovery(*sets)
    assert result["recovery"] == pytest.approx(expected, abs=0.15 * max(1, times))
    assert result["off"] < 0.5


def test_recovery_of_doing_nothing_is_nothing_even_where_sets_are_small(random, ageing):
    before, old = (prototype.log_colours(crops) for crops in (draw(random, 8), scale(draw(random, 8), ageing)))
    assert prototype.recovery(before, before, old)["recovery"] == pytest.approx(0, abs=1e-6)


def test_exposure_is_no_recovery(random, ageing):
    before, old = draw(random, 60), scale(draw(random, 60), ageing)
    sets = [prototype.log_colours(crops) for crops in (scale(before, np.full((SIDE, SIDE), -0.2)), before, old)]
    assert abs(prototype.recovery(*sets)["recovery"]) < 0.15


def test_nothing_is_clean_and_the_change_itself_is_nearly(random, ageing, faces):
    old = scale(draw(random, 60), ageing)
    assert set(prototype.dirt(faces, faces, old).values()) == {0.0}
    clean = prototype.dirt(scale(faces, ageing), faces, old)
    assert clean["large"] == 0
    assert clean["asymmetry"] < 0.01
    blotches = 0.15 * cv2.resize(random.normal(size=(6, 6)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    dirty = prototype.dirt(scale(faces, ageing + blotches[..., None]), faces, old)
    assert dirty["low"] > 2 * clean["low"]
    assert dirty["asymmetry"] > 0.05


def test_large_ratios_are_counted(faces):
    mask = face_mask(SIDE) > 0.5
    patch = np.zeros((SIDE, SIDE))
    patch[40:60, 30:50] = -0.5
    large = prototype.dirt(scale(faces, patch), faces, faces[::-1])["large"]
    assert large == pytest.approx((mask & (patch < 0)).sum() / mask.sum(), rel=0.05)


# Hair


def test_hair_and_brows_are_read_where_they_are():
    head = np.full((300, 300, 3), (180, 150, 130), np.uint8)
    landmarks = (TEMPLATE_5 * 110 + (95, 120)).astype(np.float32)
    left, top = 95, 120
    head[: int(top - 0.1 * 110)] = 40  # hair, down to the forehead
    for low, high in ((0.17, 0.42), (0.58, 0.83)):
        head[int(top + 0.16 * 110) : int(top + 0.22 * 110), int(left + low * 110) : int(left + high * 110)] = (
            90,
            60,
            50,
        )
    heads = hair.head_crops([head, head[:, ::-1]], np.stack([landmarks, landmarks]))
    colours = hair.colours(heads[:1])
    assert colours["hair_luma"][0] == pytest.approx(40 / 255, abs=0.01)
    assert colours["hair_chroma"][0] == pytest.approx(0, abs=0.01)
    assert colours["brow_luma"][0] == pytest.approx(68 / 255, abs=0.04)


def test_deviations_are_of_the_real():
    real = {"hair_luma": np.array([0.2, 0.4])}
    assert hair.deviations({"hair_luma": np.array([0.5, 0.5])}, real) == {"hair_luma": pytest.approx(2, abs=1e-3)}


# FG-NET


def test_adults_are_paired_across_ten_years_or_more():
    people = np.array([1, 1, 1, 2, 2])
    ages = np.array([12, 20, 32, 20, 29], np.float32)
    older, younger = fgnet.make_pairs(people, ages)
    assert (older.sources.tolist(), older.reals.tolist()) == ([1], [2])
    assert (younger.sources.tolist(), younger.reals.tolist()) == ([2], [1])


def test_strangers_are_other_people_of_that_age():
    people, ages = np.array([1, 1, 2, 3]), np.array([20, 40, 41, 20], np.float32)
    pairs = fgnet.Pairs(np.array([0]), np.array([1]))
    assert fgnet.strangers(pairs, people, ages).tolist() == [2]


def test_the_ceiling_is_the_mean_of_other_photos_of_the_age():
    people, ages = np.array([1, 1, 1, 2]), np.array([20, 40, 42, 40], np.float32)
    embeddings = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 1]], np.float32)
    pairs = fgnet.Pairs(np.array([0, 1]), np.array([1, 0]))
    np.testing.assert_allclose(fgnet.ceiling(pairs, people, ages, embeddings), [0.8, np.nan], rtol=1e-6)


def test_the_interval_is_over_people():
    values = np.concatenate([np.full(100, 0.1), [0.0, 0.0]])
    people = np.concatenate([np.zeros(100, int), [1, 2]])
    result = fgnet.bootstrap(values, people)
    assert result["mean"] == pytest.approx(10 / 102)
    assert (result["n"], result["people"]) == (102, 3)
    assert result["low"] == 0  # of three people, the one with many pairs is often not drawn
    assert result["high"] == pytest.approx(0.1)


def test_one_pair_of_strangers_in_a_hundred_passes(random):
    embeddings = random.normal(size=(200, 8))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    people = np.arange(200) // 2
    limit = fgnet.match_limit(embeddings, people)
    different = np.triu(people[:, None] != people[None])
    assert ((embeddings @ embeddings.T)[different] > limit).mean() == pytest.approx(0.01, abs=0.001)


# Sets and sheets


def test_labels_are_mixed_as_those_of_the_other_set(random):
    labels = np.repeat([0, 1, 2], [500, 300, 5])
    rows = draw_alike(labels, np.repeat([0, 1, 2], [10, 30, 10]), 100, random)
    assert np.bincount(labels[rows]).tolist() == [20, 60, 5]


def test_blind_sheets_shuffle_sides_and_keep_a_key(tmp_path):
    from click.testing import CliRunner

    from train.evaluate.blind import CELL_PX, main

    shades = {"original": 128, "a": 20, "b": 230}
    for folder, shade in shades.items():
        (tmp_path / folder).mkdir()
        for i in range(12):
            assert cv2.imwrite(str(tmp_path / folder / f"{i}.png"), np.full((50, 40, 3), shade, np.uint8))
    args = ["--original", tmp_path / "original", "--left", tmp_path / "a", "--right", tmp_path / "b"]
    args += ["--pairs", 12, "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    key = json.loads((tmp_path / "out" / "key.json").read_text())["pairs"]
    sheets = np.concatenate([cv2.imread(str(tmp_path / "out" / f"sheet-{i}.png")) for i in (1, 2)])
    assert sheets.shape[0] == 12 * CELL_PX
    assert sorted(pair["left"] for pair in key.values()) == ["A"] * 6 + ["B"] * 6
    for number, pair in key.items():
        row = sheets[(int(number) - 1) * CELL_PX + 10, 60:]
        seen = [int(row[i * CELL_PX + 10, 0]) for i in range(3)]
        assert seen == [shades[pair["left"].lower()], 128, shades[pair["right"].lower()]]


def test_too_few_pictures_for_a_blind_sheet_are_refused(tmp_path):
    from click.testing import CliRunner

    from train.evaluate.blind import main

    args = ["--original", tmp_path, "--left", tmp_path, "--right", tmp_path, "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 1
    assert "share 0 names" in result.stderr


# The command


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """One public face in many lights, as UTKFace's, All-Age-Faces' and FG-NET's files name it."""
    from faceage.geometry import similarity_to_template

    photo = pytest.importorskip("skimage.data").astronaut()
    eyes = np.array([[204.1, 100.8], [247.5, 104.0], [225.1, 129.0], [201.7, 139.5], [245.5, 142.0]], np.float32)
    matrix = similarity_to_template(eyes[None], (TEMPLATE_5 * 200 - 0.5).astype(np.float32))[0]
    face = cv2.warpAffine(photo, matrix, (200, 200))
    head = photo[:260, 90:360]

    def write(name, picture, gain):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), cv2.convertScaleAbs(picture, alpha=gain)[:, :, ::-1])

    for i, age in enumerate([22, 25, 28, 24, 26, 27, 40, 41, 45, 44, 48, 49, 64, 66, 70, 72, 75, 76]):
        write(f"utkface/{age}_1_0_2017{i:013d}.jpg.chip.jpg", face, 0.7 + 0.03 * i)
    for number, age in [(1, 30), (2, 35), (3, 70), (4, 72), (5, 74), (6, 38)]:
        write(f"aaf/{number:05d}A{age}.jpg", head, 0.7 + 0.05 * number)
    for i, name in enumerate(["001A20", "001A35", "001A36", "002A25", "002A45"]):
        write(f"fgnet/images/{name}.JPG", head, 0.75 + 0.05 * i)
    monkeypatch.setattr("train.evaluate.photos.is_validation", lambda name: True)
    return tmp_path


def test_the_command_writes_tables_and_pictures(tiny_facegan, archives, tmp_path):
    import torch
    from click.testing import CliRunner

    from train.evaluate.appearance import main
    from train.readers.teacher import MobileFaceNet

    torch.manual_seed(0)
    torch.save({"net_state_dict": MobileFaceNet().state_dict()}, tmp_path / "teacher.ckpt")
    options = {
        "data": archives / "utkface", "heads": archives / "aaf", "fgnet": archives / "fgnet", "out": tmp_path / "out",
        "teacher": tmp_path / "teacher.ckpt", "model": tiny_facegan,
    }  # fmt: skip
    args = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    result = CliRunner().invoke(main, [*args, "--pictures"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "appearance.json").read_text())
    rows = results["directions"]["to 70"]["rows"]
    assert rows["do nothing"]["identity"] == pytest.approx(1, abs=1e-3)
    assert rows["do nothing"]["prototype"]["recovery"] == pytest.approx(0, abs=1e-3)
    assert set(rows["do nothing"]["dirt"].values()) == {0.0}
    assert rows[tiny_facegan]["dirt"]["low"] > 0
    assert rows["stripes"]["c2st_fine"]["auc"] > rows["real photos"]["c2st_fine"]["auc"]
    assert results["hair"]["rows"]["do nothing"].keys() == {"hair_luma", "hair_chroma", "brow_luma", "brow_chroma"}
    figures = results["fgnet"][tiny_facegan]
    assert figures["older"]["gain"]["n"] == figures["younger"]["gain"]["n"] == 3
    assert (tmp_path / "out" / "appearance.md").read_text().strip() in result.stdout
    made = tmp_path / "out" / "pictures"
    names = {file.name for file in (made / "do-nothing" / "to-70").iterdir()}
    assert names == {file.name for file in (made / tiny_facegan / "to-70").iterdir()}
    # Pictures made elsewhere are measured as the product's are.
    more = ["--row", f"elsewhere={made / tiny_facegan}", "--out", str(tmp_path / "b")]
    again = CliRunner().invoke(main, [*args[:2], *args[-4:], *more])
    assert again.exit_code == 0, again.output
    rows = json.loads((tmp_path / "b" / "appearance.json").read_text())["directions"]["to 70"]["rows"]
    assert rows["elsewhere"] == rows[tiny_facegan]
