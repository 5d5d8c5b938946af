"""The measurements: that they measure what they say, not how fast this machine is."""

import itertools
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from clips import frame_times, make_clip

from faceage.cli import main
from faceage.cli.environment import machine, versions
from faceage.pipeline.bench import EVALUATION_STEPS, faces_of, loop_clip
from faceage.pipeline.naive import generated_faces


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


def test_images_needs_photos():
    result = CliRunner().invoke(main, ["bench", "images"])
    assert result.exit_code == 2


def test_latent(networks, tiny_model, face_photo):
    item = bench("latent", "--faces", 4, "--model", tiny_model)
    assert item["faces"] == 4
    assert [row["evaluations"] for row in item["curve"]] == list(EVALUATION_STEPS)
    losses = [row["mean_loss"] for row in item["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == item["encoder_loss"] >= item["loss"]
    assert item["share_below_encoder"] == 1
    assert bench("latent", face_photo, "--model", tiny_model)["faces"] == 1


def test_faces_come_from_photos_or_from_the_generator(networks, tiny_model, face_photo):
    found, made = faces_of(networks, [face_photo]), generated_faces(tiny_model, 3)
    assert found.shape == (1, 3, 64, 64)
    assert made.shape == (3, 3, 64, 64)
    assert np.abs(made).max() <= 1
    assert np.array_equal(made, generated_faces(tiny_model, 3))
