"""The measurements: that they measure what they say, not how fast this machine is."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clips import frame_times, make_clip

from faceage.agers.base import Ages
from faceage.bench.latent import EVALUATION_STEPS, bench_follow
from faceage.bench.naive import _FaceGAN, generated_faces
from faceage.bench.photos import faces_of
from faceage.bench.scale import simulate
from faceage.bench.video import loop_clip
from faceage.cli import main
from faceage.cli.environment import machine, versions
from faceage.errors import NoFaceError
from faceage.geometry import template_5
from faceage.models import find_model
from faceage.types import Crops


def bench(*args):
    """Run `faceage bench ... --json`; return the measurement."""
    result = CliRunner().invoke(main, ["bench", *map(str, args), "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    (item,) = [event for line in result.stdout.splitlines() if (event := json.loads(line))["event"] == "item"]
    assert item["machine"] == machine()
    assert item["versions"] == versions()
    return item


def test_video(networks, tiny_model, face_clip):
    copy = f"{sys.executable} -c 'import shutil, sys; shutil.copy(*sys.argv[1:])' {{in}} {{out}}"
    options = ["--repeats", 2, "--repeat-clip", 2, "--against", copy, "--preset", "ultrafast", "--model", tiny_model]
    item = bench("video", face_clip, *options)
    ours, bare = item["faceage"], item["transcode"]
    assert ours["frames"] == bare["frames"] == 50
    assert item["looped"]["frames"] == 100
    assert item["ratio_to_transcode"] == pytest.approx(ours["fps"] / bare["fps"], abs=1e-3)
    assert {len(rows) for rows in item["runs"].values()} == {2}
    fps = [run["fps"] for run in item["runs"]["faceage"]]
    assert ours["fps"] == pytest.approx(np.median(fps), abs=1e-3)
    assert set(ours["stage_ms"]) >= {"decode", "detect and track", "age", "blend", "encode"}
    assert ours["peak_rss_mb"] > bare["peak_rss_mb"] > 20
    assert item["looped"]["peak_rss_ratio"] < 1.5
    assert ours["process_seconds"] > ours["seconds"]
    factor = item["against"]["process_seconds"] / ours["process_seconds"]
    assert item["factor_over_against"] == pytest.approx(factor, abs=0.01)


def test_scale(networks, tiny_model, face_clip, monkeypatch):
    monkeypatch.setattr("faceage.bench.scale.SEGMENT_FRAMES", 25)  # the clip twice is long enough
    item = bench("scale", face_clip, "--repeats", 1, "--preset", "ultrafast", "--model", tiny_model)
    assert item["frames"] == 100
    assert [row["jobs"] for row in item["jobs"]] == [1, 2]
    assert item["jobs"][0]["speedup"] == 1
    one, two = item["jobs"]
    assert two["speedup"] == pytest.approx(two["fps"] / one["fps"], abs=0.01)
    assert sum(item["segment_seconds"]) + one["assemble_seconds"] == pytest.approx(one["seconds"], abs=0.01)
    assert [row["ideal"] for row in item["simulated"]] == [1, 2, 4, 8, 16, 32, 64]


def test_the_simulated_schedule():
    """Of three segments, two workers have 2 + 1 and 2; more than three have nothing to do."""
    rows = {row["workers"]: row for row in simulate([2, 2, 1], 0.5)}
    assert rows[1] == {"workers": 1, "render_seconds": 5, "seconds": 5.5, "speedup": 1, "ideal": 1}
    assert (rows[2]["render_seconds"], rows[2]["speedup"]) == (3, 1.67)
    assert rows[4]["render_seconds"] == rows[64]["render_seconds"] == 2


def test_video_from_a_plan(networks, tiny_model, face_clip):
    options = ["--plan", "--repeats", 1, "--preset", "ultrafast", "--model", tiny_model]
    item = bench("video", face_clip, *options)
    assert "detect and track" not in item["faceage"]["stage_ms"]
    assert item["faceage"]["people"] == 1


def test_a_failing_command_is_one_line(networks, tiny_model, face_clip):
    command = f"{sys.executable} -c 'raise SystemExit(\"no such filter\")'"
    args = ["bench", "video", face_clip, "--against", command, "--preset", "ultrafast", "--model", tiny_model]
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 3
    assert "failed with exit code 1: no such filter; check --against" in result.stderr


def test_a_looped_clip_goes_on_without_a_gap(face_clip, tmp_path):
    times = frame_times(face_clip)
    looped = frame_times(loop_clip(face_clip, tmp_path / "looped.mp4", 3))
    assert len(looped) == 3 * len(times)
    step = times[1] - times[0]
    assert {b - a for a, b in itertools.pairwise(looped)} == {step}


def test_a_looped_clip_decodes(tmp_path):
    from faceage.media.video import VideoReader

    clip = make_clip(tmp_path / "clip.mp4", options={"bf": "2"})
    with VideoReader(loop_clip(clip, tmp_path / "looped.mp4", 2)) as reader:
        assert sum(1 for _ in reader) == 32
    assert reader.damage is None


def test_images(networks, tiny_model, face_photo):
    item = bench("images", face_photo, "--repeats", 1, "--model", tiny_model)
    assert item["faceage"]["faces"] == item["naive"]["faces"] == 1
    factor = item["faceage"]["photos_per_second"] / item["naive"]["photos_per_second"]
    assert item["factor_over_naive"] == pytest.approx(factor, rel=0.05)
    assert item["evaluations_a_face"] > 1


def test_images_of_a_cameras_size_by_a_facegan(facegan, tiny_facegan, monkeypatch):
    monkeypatch.setattr("faceage.cli.bench.GENERATED_PHOTOS", 2)
    item = bench("images", "--megapixels", 0.2, "--repeats", 1, "--model", tiny_facegan)
    assert item["faceage"]["photos"] == item["naive"]["photos"] == 2
    assert item["faceage"]["faces"] == item["naive"]["faces"] == 4
    assert item["naive_evaluations_a_face"] == 0


def test_the_naive_loop_ages_as_ours_does(facegan, tiny_facegan):
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 128, 128)).astype(np.float32)
    landmarks = template_5(128)[None]
    crops = Crops(pixels=pixels, landmarks=landmarks, frame_to_crop=np.zeros((1, 2, 3), np.float32))
    (ours,) = facegan.ager.observe([Ages(30, 70)], [crops], [None])
    theirs = _FaceGAN(find_model(tiny_facegan)).delta(torch.from_numpy(pixels), landmarks[0], 30.0, 70.0)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours).max() > 0.05


def test_a_facegan_has_no_latents(facegan, tiny_facegan):
    result = CliRunner().invoke(main, ["bench", "latent", "--model", tiny_facegan])
    assert result.exit_code == 3
    assert "model tiny-facegan has no latents to optimize; choose an Age-cGAN model" in result.stderr


def test_images_needs_photos():
    result = CliRunner().invoke(main, ["bench", "images"])
    assert result.exit_code == 2


def test_latent(networks, tiny_model, face_photo, face_clip):
    item = bench("latent", "--faces", 4, "--repeats", 1, "--clip", face_clip, "--model", tiny_model)
    assert item["faces"] == 4
    assert [row["evaluations"] for row in item["curve"]] == list(EVALUATION_STEPS)
    losses = [row["mean_loss"] for row in item["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == item["encoder_loss"] >= item["loss"] >= item["naive_loss"] - 1e-4
    assert item["share_below_encoder"] == 1
    assert [row["faces"] for row in item["batches"]] == [1, 8, 32, 128]
    for row in item["batches"]:
        assert row["factor_over_naive"] == pytest.approx(item["naive_ms_a_face"] / row["ms_a_face"], rel=0.1)
    follow = item["follow"]
    assert follow["frames"] == 40
    assert [row["evaluations"] for row in follow["curve"]] == list(range(1, 9))
    assert follow["curve"][-1]["mean_loss"] < follow["encoder_loss"]
    assert follow["needed"] is None or follow["curve"][follow["needed"] - 1]["mean_loss"] <= follow["loss_anew"]


def test_latent_of_a_photo_and_of_a_clip_without_faces(networks, tiny_model, face_photo, tmp_path):
    assert bench("latent", face_photo, "--repeats", 1, "--model", tiny_model)["faces"] == 1
    with pytest.raises(NoFaceError, match="use another clip"):
        bench_follow(networks, make_clip(tmp_path / "clip.mp4"), notify=lambda line: None)


def test_faces_come_from_photos_or_from_the_generator(networks, tiny_model, face_photo):
    found, made = faces_of(networks, [face_photo]), generated_faces(tiny_model, 3)
    assert found.shape == (1, 3, 64, 64)
    assert made.shape == (3, 3, 64, 64)
    assert np.abs(made).max() <= 1
    assert np.array_equal(made, generated_faces(tiny_model, 3))
