"""The scorecard: who is asked for what, the rows whose answer is known, the document, and the command end to end."""

import json
import math
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # `train` is not installed

from faceage.geometry import TEMPLATE_5, face_mask
from faceage.types import ColorSpec, Frame
from train.data import FaceSet
from train.evaluate import faces as ef
from train.evaluate import scorecard as sc
from train.evaluate.video import MIN_SAMPLES, SAMPLES, Followed, measure_tracks

SIDE = 200
LANDMARKS = (TEMPLATE_5 * SIDE - 0.5).astype(np.float32)
ASTRONAUT = np.array([[204.1, 100.8], [247.5, 104.0], [225.1, 129.0], [201.7, 139.5], [245.5, 142.0]], np.float32)
"""Her eyes, nose and corners of the mouth, in `skimage.data.astronaut()`."""


def face_set(ages, pixels=None):
    count = len(ages)
    return FaceSet(
        pixels=np.zeros((count, 8, 8, 3), np.uint8) if pixels is None else pixels,
        ages=np.array(ages, np.float32),
        genders=np.arange(count) % 2,
        races=np.arange(count) % 5,
        landmarks=np.repeat(LANDMARKS[None], count, 0),
        names=np.array([f"{i}.jpg" for i in range(count)]),
        validation=np.ones(count, bool),
    )


@pytest.fixture
def picture():
    layers = [np.random.default_rng(n).random((n, n, 3)) for n in (6, 50, 200)]
    sized = [cv2.resize(layer, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for layer in layers]
    return (40 + 170 * np.clip(np.mean(sized, 0), 0, 1)).astype(np.uint8)


# Who is asked for what


def test_age_groups_meet_without_a_gap():
    ages = np.array([3, 15, 24, 25, 34, 35, 44, 45, 54, 55, 64, 65, 80, 99])
    assert ef.age_group(ages).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]


def test_faces_are_drawn_evenly_and_repeatably():
    faces = face_set(np.random.default_rng(0).integers(1, 100, 2000))
    rows = ef.draw_faces(faces, 60, 0)
    assert np.bincount(ef.age_group(faces.ages[rows])).tolist() == [10] * 6
    assert faces.ages[rows].min() >= 15
    assert faces.ages[rows].max() <= 80
    assert len(set(rows.tolist())) == 60
    assert rows.tolist() == ef.draw_faces(faces, 60, 0).tolist() != ef.draw_faces(faces, 60, 1).tolist()


def test_a_group_that_is_too_small_gives_what_it_has():
    assert ef.draw_faces(face_set([20, 20, 20, 30, 70]), 12, 0).tolist()[-2:] == [3, 4]


def test_requests_stay_within_the_groups():
    requests = ef.make_requests(np.array([15, 48, 80], np.float32))
    assert requests.gaps[requests.faces == 0].tolist() == [10, 20, 30, 40]
    assert requests.gaps[requests.faces == 1].tolist() == [10, 20, 30, -10, -20, -30]
    assert requests.gaps[requests.faces == 2].tolist() == [-10, -20, -30, -40]
    assert requests.targets.tolist() == [25, 35, 45, 55, 58, 68, 78, 38, 28, 18, 70, 60, 50, 40]
    groups = requests.groups()
    assert groups[ef.POOLED].sum() == 8 == groups["+20..30"].sum() + groups["-20..30"].sum()
    assert sum(groups[f"{sign}{gap}"].sum() for sign in "+-" for gap in (10, 20, 30, 40)) == len(requests)


def test_real_pictures_have_the_target_s_age_and_another_face():
    faces = face_set([20, 30, 31, 29, 40, 50, 51])
    requests = ef.Requests(np.array([0, 1, 1]), np.array([10, 20, 0]), np.array([30, 50, 30], np.float32))
    own = np.array([0, 1])
    for seed in range(20):
        rows = ef.real_pictures(faces, requests, own, seed)
        assert (np.abs(faces.ages[rows] - requests.targets) <= 2).all()
        assert (rows != own[requests.faces]).all()


def test_sheet_shows_unlike_faces():
    rows = ef.unlike_faces(face_set(np.tile(np.arange(16, 76), 5)), 10, 0)
    faces = face_set(np.tile(np.arange(16, 76), 5)).rows(np.array(rows))
    assert len(set(rows)) == 10
    assert np.bincount(faces.genders).tolist() == [5, 5]
    assert len(set(faces.races)) == 5
    assert len(set(ef.age_group(faces.ages))) == 6


# Rows whose answer is known


def test_mean_difference_adds_what_the_mean_faces_differ_by(picture):
    ages = np.repeat(np.arange(20, 81), 3)
    pixels = np.repeat(ages.astype(np.uint8), 128 * 128 * 3).reshape(-1, 128, 128, 3)
    means = ef.MeanFaces(face_set(ages, pixels), np.arange(len(ages)))
    middle, corner = (slice(90, 110),) * 2, (slice(0, 5),) * 2
    for times in (1, 2):
        change = means.age(picture, LANDMARKS, 30, 60, times).astype(int) - picture
        assert (change[middle] == 30 * times).all()
        assert not change[corner].any()
    assert (means.age(picture, LANDMARKS, 60, 30, 1)[middle].astype(int) - picture[middle] == -30).all()


def test_a_pasted_face_is_the_donor_s_in_the_mask(picture):
    assert np.abs(ef.paste_face(picture, LANDMARKS, picture, LANDMARKS).astype(int) - picture).max() <= 1
    donor = np.roll(255 - picture, (9, -6), (0, 1))
    pasted = ef.paste_face(picture, LANDMARKS, donor, LANDMARKS + np.float32([-6, 9]))
    mask = ef.mask_in_picture(picture, LANDMARKS)
    inside, outside = mask == 1, mask == 0
    assert np.abs(pasted[inside].astype(int) - (255 - picture)[inside]).max() <= 1
    assert (pasted[outside] == picture[outside]).all()


def test_blur_is_in_the_mask_only(picture):
    blurred = ef.blur_face(picture, LANDMARKS)
    mask = ef.mask_in_picture(picture, LANDMARKS)
    assert (blurred[mask == 0] == picture[mask == 0]).all()
    assert (blurred[mask == 1] == ef.blur(picture)[mask == 1]).all()
    np.testing.assert_allclose(mask, face_mask(SIDE), atol=0.02)


# The product's path


@pytest.fixture(scope="module")
def astronaut():
    """An archive-like picture of her, and the landmarks in it."""
    from faceage.geometry import apply_affine, similarity_to_template

    photo = pytest.importorskip("skimage.data").astronaut()
    matrix = similarity_to_template(ASTRONAUT[None], LANDMARKS)
    return cv2.warpAffine(photo, matrix[0], (SIDE, SIDE)), apply_affine(matrix, ASTRONAUT[None])[0]


def test_the_product_s_pictures_come_back_in_order(networks, astronaut):
    from train.evaluate.composites import age_pictures

    face, points = astronaut
    nothing = np.full_like(face, 90)
    targets = np.array([70, 20, 70, 20], np.float32)
    made = age_pictures(networks, [face, face, nothing, face], np.repeat(points[None], 4, 0), targets)
    assert np.isnan(made.shares).tolist() == [False, False, True, False]
    assert (made.shares[[0, 1, 3]] > 0.5).all()
    assert np.isnan(made.source_ages).tolist() == [False, False, True, False]
    assert made.outside.tolist() == [0, 0, 0, 0]
    assert (made.pictures[2] == nothing).all()
    assert (made.pictures[1] == made.pictures[3]).all()
    assert (made.pictures[0] != made.pictures[1]).any()
    assert (made.pictures[0] != face).any()


def test_a_face_elsewhere_is_not_the_one_that_was_asked_for(networks, astronaut):
    from train.evaluate.composites import age_pictures

    face, points = astronaut
    made = age_pictures(networks, [face], points[None] + 60, np.array([70], np.float32))
    assert np.isnan(made.shares[0])
    assert made.outside[0] == 0


# Video


def moving_clip(frames, carried):
    """Yield (source, aged) frames of a texture that moves by three pixels a frame, its change with it or not."""
    random = np.random.default_rng(0)
    texture = cv2.resize(random.random((60, 60)), (240, 240), interpolation=cv2.INTER_CUBIC)
    texture = (60 + 120 * np.clip(texture, 0, 1)).astype(np.uint8)
    delta = cv2.GaussianBlur(160 * random.standard_normal((240, 240)), (0, 0), 3).round().astype(int)
    chroma = np.full((120, 120), 128, np.uint8)
    for i in range(frames):
        source = np.roll(texture, 3 * i, 1)
        aged = (source + (np.roll(delta, 3 * i, 1) if carried else delta)).astype(np.uint8)
        yield tuple(
            Frame(planes=(y, chroma, chroma), pixel_format="yuv420p", color=ColorSpec()) for y in (source, aged)
        )


def moving_track(frames, weights=1.0, first=0):
    smoothed = LANDMARKS / 2 + 50 + (np.arange(frames) + first)[:, None, None] * np.float32([3, 0])
    noise = np.random.default_rng(1).normal(0, 0.5, smoothed.shape).astype(np.float32)
    return Followed(
        track_id=7,
        first_frame=first,
        smoothed=smoothed.astype(np.float32),
        measured=(smoothed + noise).astype(np.float32),
        weights=np.full(frames, weights, np.float32),
    )


def test_a_steady_track_scores_as_one():
    (row,) = measure_tracks(moving_clip(12, carried=True), [moving_track(12)], lambda crops: crops.mean((1, 2, 3)))
    (stuck,) = measure_tracks(moving_clip(12, carried=False), [moving_track(12)], lambda crops: crops.mean((1, 2, 3)))
    assert row["n"] == 12
    assert row["warp_error"] < 0.05 < 0.3 < stuck["warp_error"]
    assert row["jitter_smoothed"] == pytest.approx(0, abs=1e-5)
    assert row["jitter_measured"] > 0.02
    assert row["eyes_px"] == pytest.approx((LANDMARKS[1, 0] - LANDMARKS[0, 0]) / 2, abs=0.01)
    assert row["aged_deviation"] < stuck["aged_deviation"]


def test_deviations_are_of_what_is_read():
    readings = iter([np.array([30.0, 32, 30, 32, 30, 32]), np.array([50.0, 50, 50, 50, 50, 50])])
    (row,) = measure_tracks(moving_clip(6, carried=True), [moving_track(6)], lambda crops: next(readings))
    assert (row["source_age"], row["aged_age"], row["aged_deviation"]) == (31, 50, 0)
    assert row["source_deviation"] == row["change_deviation"] == pytest.approx(math.sqrt(1.2))


def test_faded_frames_and_short_tracks_are_left_out():
    track = moving_track(12)
    track.weights[:4] = 0.5
    assert track.sampled().tolist() == list(range(4, 12))
    track.weights[: -(MIN_SAMPLES - 1)] = 0.5
    assert measure_tracks(moving_clip(12, carried=True), [track], lambda crops: crops.mean((1, 2, 3))) == []


def test_long_tracks_are_sampled_evenly():
    frames = moving_track(1000, first=5).sampled()
    assert len(frames) == SAMPLES
    assert (frames[0], frames[-1]) == (5, 1004)
    assert np.ptp(np.diff(frames)) <= 1


# The document


def test_figures_are_rounded_against_the_product():
    assert sc.show(9.991, 2, "up") == "10.00"
    assert sc.show(9.99, 2, "up") == "9.99"
    assert sc.show(0.29, 2, "down") == "0.29"
    assert sc.show(0.7999, 3, "down") == "0.799"
    assert sc.show(-0.7991, 3, "down") == "-0.800"
    assert [sc.show(v, 1, "away") for v in (1.21, -1.21)] == ["1.3", "-1.3"]
    assert sc.percent(0.89999) == "89.9 %"
    assert sc.percent(0.9) == "90.0 %"
    assert sc.show(None) == sc.show(math.nan) == sc.percent(None) == "-"


MODEL, OLD = "new", "old"
"""A FaceGAN and an Age-cGAN on one card; the tests change the figures of the first."""


def good_results():
    """What a sound scorecard of a perfect product could hold."""
    methods = (MODEL, OLD, sc.NOTHING, sc.MEAN_1, sc.MEAN_2, sc.BLUR, sc.OTHER, sc.REAL)
    age = {}
    for group, gap in (("+20..30", 24.0), ("-20..30", -26.0), (ef.POOLED, 0.0)):
        error = {sc.NOTHING: -gap - 1, MODEL: 1.0, OLD: 2.0, sc.REAL: 0.5}
        age[group] = {
            m: {"n": 40, "mae": abs(error.get(m, -gap / 2)) + 1, "bias": error.get(m, -gap / 2), "r": 0.9,
                "mean_gap": gap}
            for m in methods
        }  # fmt: skip
    same = {"n": 40, "cosine": 1.0, "cosine_min": 1.0, "verified_0.1": 1.0, "verified_1": 1.0}
    strange = {"n": 40, "cosine": 0.1, "cosine_min": 0.0, "verified_0.1": 0.0, "verified_1": 0.05}
    sharp = {"median": 1.0, "low": 1.0, "high": 1.0}
    soft = {"median": 0.4, "low": 0.3, "high": 0.5}
    video_row = dict.fromkeys(
        ("eyes_px", "source_age", "aged_age", "source_deviation", "aged_deviation", "change_deviation", "warp_error",
         "jitter_measured", "jitter_smoothed"), 1.0,
    )  # fmt: skip
    return {
        "settings": {"models": {MODEL: {"architecture": "facegan", "files": {"age": "12"}},
                                OLD: {"architecture": "age-cgan", "files": {"age": "12"}}},
                     "judges": {"j": "34"}, "commit": "", "seed": 0, "seconds": 9},
        "counts": {"faces": 6, "requests": 40, "not_found": 1, "left_alone": 2, "measured": 37, "in_part": 3,
                   "source_mae": {MODEL: 5.0, OLD: 5.0}},
        "judge": {"n": 99, "mae": 6.0, "bias": 0.5, "r": 0.87},
        "age": age,
        "fooled": {m: {ef.POOLED: {"n": 40, "composites": 2.0, "untouched": 1.0, "fooled": 1.0}}
                   for m in (MODEL, OLD)},
        "thresholds": {"n": 99, "pairs": 4851, "0.1": 0.5, "1": 0.3},
        "identity": {group: {m: strange if m == sc.OTHER else same for m in methods} for group in age},
        "cycle": {m: same | {"mae_codes": 3.0} for m in (MODEL, OLD)},
        "no_years": {m: {"n": 6, "mean_codes": v, "max_codes": v} for m, v in ((MODEL, 0.5), (OLD, 0.0))},
        "latent": {MODEL: None, OLD: {name: same for name in ("z0", "pixel-wise", "identity-preserving")}},
        "kid": {m: {"n": 40, "kid": v} for m, v in
                ((sc.REAL_PAIR, 0.0), (sc.NOTHING, 0.2), (sc.BLUR, 0.3), (MODEL, 0.05), (OLD, 0.1))},
        "kid_sets": {"real": 50, "other": 60, "which": "training pictures"},
        "sharpness": {m: {"n": 40, "laplacian": f, "gradient": f}
                      for m, f in ((MODEL, sharp), (OLD, sharp), (sc.NOTHING, sharp), (sc.BLUR, soft))},
        "outside": {m: {"n": 40, "changed": c, "max": c}
                    for m, c in ((MODEL, 0), (OLD, 0), (sc.NOTHING, 0), (sc.BLUR_ALL, 40))},
        "slices": {m: {"rows": [{"by": "gender", "slice": "male", "n": 4, "mae": 1.0, "bias": -1.0,
                                 "verified_1": 1.0}],
                       "line": "all alike"} for m in (MODEL, OLD)},
        "video": {m: {"by": 30.0, "left_out": 0, "source_deviation": 1.0, "aged_deviation": 1.5, "warp_error": w,
                      "tracks": [{"clip": "c.mp4", "track": 0, "n": 9} | video_row]}
                  for m, w in ((MODEL, 0.1), (OLD, 0.2))},
    }  # fmt: skip


def broken(path, value):
    results = json.loads(json.dumps(good_results()))  # a copy without shared parts
    inner = results
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return results


def test_a_sound_scorecard_is_not_wrong():
    assert sc.wrong(good_results()) == []
    rows = sc.headline(good_results())
    assert [row["models"][MODEL]["is_met"] for row in rows] == [True] * 9
    # An Age-cGAN has no target for what it is the measure of.
    assert [row["models"][OLD]["is_met"] for row in rows] == [True] * 6 + [None, True, None]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("counts", "measured"), 19, "only 19 of 40 requests"),
        (("judge", "r"), 0.69, "the judge's r on real validation faces is 0.690"),
        (("judge", "r"), math.nan, "the judge's r"),
        (("identity", ef.POOLED, sc.NOTHING), {"cosine_min": 0.99, "verified_0.1": 1, "verified_1": 1}, "themselves"),
        (("identity", ef.POOLED, sc.NOTHING), {"cosine_min": 1, "verified_0.1": 0.9, "verified_1": 1}, "not all verif"),
        (("age", "+20..30", sc.NOTHING, "bias"), -8.0, r"\+20..30 years: bias -8.0, expected about -24.0"),
        (("age", "-20..30", sc.NOTHING, "bias"), -20.0, r"-20..30 years: bias -20.0, expected about \+26.0"),
        (("age", "+20..30", sc.REAL, "mae"), 40.0, "score no better than untouched ones"),
        (("identity", ef.POOLED, sc.OTHER), {"verified_0.1": 0, "verified_1": 0.5}, "50.0 % of pasted strangers"),
        (("sharpness", sc.BLUR, "gradient", "median"), 0.9, "the gradient does not see blur"),
        (("sharpness", sc.NOTHING, "laplacian", "high"), 1.01, "untouched is not as sharp"),
        (("outside", sc.NOTHING, "max"), 1, "untouched pictures are changed outside"),
        (("outside", sc.BLUR_ALL, "changed"), 3, "changes outside the mask are not seen"),
        (("kid", sc.BLUR, "kid"), 0.1, "blur's KID 0.1 is no worse"),
        (("kid", sc.BLUR, "kid"), math.nan, "blur's KID nan is no worse"),
        (("kid", sc.REAL_PAIR, "kid"), 0.3, "no lower KID than untouched"),
    ],
)
def test_a_row_with_the_wrong_answer_is_named(path, value, message):
    (found,) = sc.wrong(broken(path, value))
    assert re.search(message, found)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        (("age", ef.POOLED, MODEL, "mae"), 8.001, sc.AGE_ERROR),
        (("age", ef.POOLED, MODEL, "r"), 0.84999, sc.AGE_ORDER),
        (("identity", ef.POOLED, MODEL), {"verified_1": 0.94999}, sc.VERIFIED),
        (("sharpness", MODEL, "laplacian", "median"), 1.1501, sc.SHARP),
        (("outside", MODEL, "max"), 1, sc.OUTSIDE),
        (("no_years", MODEL, "mean_codes"), 1.001, sc.NO_YEARS),
        (("kid", MODEL, "kid"), 0.1001, sc.KID_RATIO.format(OLD)),
        (("video", MODEL, "aged_deviation"), 1.501, sc.STEADY),
        (("video", MODEL, "warp_error"), 0.1001, sc.WARP_RATIO.format(OLD)),
    ],
)
def test_a_target_that_is_nearly_met_is_not_met(path, value, what):
    rows = {row["what"]: row["models"] for row in sc.headline(broken(path, value))}
    assert [name for name, models in rows.items() if not models[MODEL]["is_met"]] == [what]
    assert rows[what][MODEL]["text"] in ("8.01", "0.849", "94.9 %", "1.151", "1", "1.01", "1.51", "0.51")
    assert rows[what][OLD]["is_met"] in (True, None)


def test_each_architecture_has_its_own_targets():
    (row,) = (row for row in sc.headline(broken(("age", ef.POOLED, OLD, "mae"), 9.9)) if row["what"] == sc.AGE_ERROR)
    assert row["models"][OLD]["is_met"]
    assert [row["models"][m]["target"] for m in (MODEL, OLD)] == ["<= 8.00", "<= 10.00"]


def test_a_model_alone_has_no_rival():
    results = good_results()
    del results["settings"]["models"][OLD]
    assert not [row for row in sc.headline(results) if OLD in row["what"]]


def test_the_document_says_it_all():
    results = good_results()
    results |= {"headline": sc.headline(results), "wrong": []}
    card = sc.render(results)
    assert "| age MAE, ±20..30 years " in card
    assert "the product did not find the face, in 2 it left it alone" in card
    assert "82.9 %" in card
    assert "passed" in card
    assert "new has no latents." in card
    results |= {"wrong": ["blur is sharp"], "video": {MODEL: None, OLD: None}, "fooled": None}
    card = sc.render(results)
    assert "**The scorecard is wrong**" in card
    assert "- blur is sharp" in card
    assert "No clips were given." in card


def test_json_has_no_nan():
    assert (
        json.dumps(sc.plain({"a": [math.nan, 1.5, {"b": math.inf}]}), allow_nan=False)
        == '{"a": [null, 1.5, {"b": null}]}'
    )


# The command


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """A judge, a teacher and a reader that know nothing."""
    import dataclasses

    import torch

    from faceage.checkpoint import Header, save
    from faceage.networks.regressors import AgeEstimator, TrunkDims
    from train.readers.judge import Judge
    from train.readers.teacher import MobileFaceNet

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judges")
    dims = TrunkDims(size_px=32, widths=(8, 8, 8), blocks=(1, 1, 1), outputs=101)
    headers = {"judge": {"size_px": 128}, "age-estimator": dataclasses.asdict(dims)}
    for (arch, its_dims), network in zip(headers.items(), (Judge(), AgeEstimator(dims)), strict=True):
        header = Header(arch=arch, dims=its_dims, stage="test", images_seen=0, train_config={"half": 0})
        save(folder / f"{arch}.safetensors", network.state_dict(), header)
    torch.save({"net_state_dict": MobileFaceNet().state_dict()}, folder / "teacher.ckpt")
    return folder


@pytest.fixture(scope="module")
def archive(astronaut, tmp_path_factory):
    """Faces of all age groups, every second one for validation."""
    folder = tmp_path_factory.mktemp("utkface")
    names = []
    for i, age in enumerate([18, 18, 22, 22, 30, 30, 40, 40, 50, 50, 60, 60, 70, 70, 70, 70]):
        name = f"{age}_{i % 2}_{i % 5}_2017{i:013d}.jpg.chip.jpg"
        picture = cv2.convertScaleAbs(astronaut[0], alpha=0.8 + 0.02 * i)
        assert cv2.imwrite(str(folder / name), picture[:, :, ::-1])
        names.append(name)
    split = tmp_path_factory.mktemp("split") / "validation.txt"
    split.write_text("\n".join(names[::2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.data.VALIDATION_FILE", split)
        yield folder


def test_the_command_writes_everything_and_refuses_judges_that_know_nothing(
    tiny_model, tiny_facegan, judges, archive, face_clip, tmp_path
):
    from click.testing import CliRunner

    from train.evaluate.evaluate import main

    options = {
        "data": archive, "teacher": judges / "teacher.ckpt", "judge": judges / "judge.safetensors",
        "reader": judges / "age-estimator.safetensors", "media": face_clip, "model": tiny_model, "faces": 6,
        "cache": tmp_path / "cache", "out": tmp_path / "out",
    }  # fmt: skip
    args = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    args += ["--model", tiny_facegan]
    result = CliRunner().invoke(main, args, catch_exceptions=False)
    assert result.exit_code == 1
    assert "Error: the scorecard is wrong: " in result.stderr
    results = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert any("the judge's r on real validation faces" in what for what in results["wrong"])
    assert results["counts"]["faces"] == 6
    assert results["counts"]["measured"] == results["counts"]["requests"] > 20
    assert results["identity"][ef.POOLED][sc.NOTHING]["verified_1"] == 1
    assert results["sharpness"][sc.NOTHING]["laplacian"] == {"median": 1, "low": 1, "high": 1}
    assert set(results["latent"][tiny_model]) >= set(sc.PAPER_VERIFIED)
    assert results["latent"][tiny_facegan] is None
    for model in (tiny_model, tiny_facegan):
        assert results["outside"][model]["max"] == 0
        assert results["no_years"][model] == {"n": 6, "mean_codes": 0, "max_codes": 0}
        (track,) = results["video"][model]["tracks"]
        assert track["n"] == SAMPLES
        assert results["fooled"][model][ef.POOLED]["n"] == results["age"][ef.POOLED][model]["n"]
        assert cv2.imread(str(tmp_path / "out" / f"sheet-{model}.png")).shape[1] == 8 * SIDE
    age = results["age"][ef.POOLED]
    assert age[tiny_model]["mae"] != age[tiny_facegan]["mae"] != age[sc.NOTHING]["mae"]
    card = (tmp_path / "out" / "scorecard.md").read_text()
    assert card.strip() in result.stdout
