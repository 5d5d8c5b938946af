"""The commands: what they write, what they say, and the exit code of every way to fail."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner
from clips import frame_times, make_clip, packets_of
from PIL import Image

from faceage.checkpoint import sha256_of
from faceage.cli import main
from faceage.engines.registry import choose_runtime
from faceage.extras import EXTRAS
from faceage.media.xmp import SOURCE_TYPE
from faceage.pipeline.request import Networks

FAST = ["--preset", "ultrafast"]


def faceage(*args):
    """Run a command in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_of(result):
    """The one line of an error."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("faceage: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("faceage: error: ")


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def video(networks, tiny_model, tmp_path):
    """Run `faceage video` with the tiny model, whose engines are built."""

    def run(*args, age=("--age", "70")):
        return faceage("video", *args, "--model", tiny_model, *FAST, *age)

    return run


@pytest.fixture
def images(networks, tiny_model):
    """Run `faceage images` with the tiny model."""
    return lambda *args: faceage("images", *args, "--model", tiny_model, "--age", 70)


class TestUsage:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--age", "400"], "Invalid value for '--age': 400.0 is not in the range 0.0<=x<=100.0."),
            (["--age", "70", "--by", "20"], "give one of --age N, --by +N and --age-curve"),
            ([], "give one of --age N, --by +N and --age-curve"),
            (["--by", "+300"], "by is 300; it must be from -100 to 100 years"),
            (["--age", "70", "--strength", "2"], "Invalid value for '--strength': 2.0 is not in the range 0<=x<=1."),
            (["--age", "70", "--min-face", "3"], "min_face_px is 3.0, must be at least 12"),
            (["--age", "70", "--start", "soon"], "Invalid value for '--start': 'soon' is no time; give seconds or "),
            (["--age", "70", "--encoder-option", "x"], "Invalid value for '--encoder-option': 'x' is not KEY=VALUE"),
            (["--age", "70", "-v", "-q"], "give either -v or -q"),
            (
                ["--age", "70", "--model", "other"],
                'Invalid value for --model: unknown model "other"; there are age-cgan',
            ),
        ],
    )
    def test_wrong_options_are_exit_code_2(self, args, message):
        result = faceage("video", "in.mp4", "-o", "out.mp4", *args)
        assert result.exit_code == 2
        assert f"Error: {message}" in result.stderr

    def test_two_inputs_of_one_name(self, tmp_path):
        result = faceage("video", "a/x.mp4", "b/x.mp4", "-o", tmp_path, "--age", 70)
        assert result.exit_code == 2
        assert "several inputs are named x.mp4" in result.stderr

    def test_an_unknown_command(self):
        assert faceage("age").exit_code == 2

    def test_help_names_every_command(self):
        result = faceage("--help")
        assert result.exit_code == 0
        for name in ("video", "images", "sheet", "models", "doctor", "bench"):
            assert f"\n  {name} " in result.stdout
            assert faceage(name, "--help").exit_code == 0


class TestVideo:
    def test_the_face_is_aged_and_the_rest_kept(self, video, face_clip, tmp_path):
        target = tmp_path / "new" / "out.mp4"
        result = video(face_clip, "-o", target)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"{face_clip}: 50 frames, 1 person (")
        assert result.stdout.endswith(f" fps -> {target}\n")
        assert frame_times(target) == frame_times(face_clip)
        assert [bytes(p) for p in packets_of(target, "audio")] == [bytes(p) for p in packets_of(face_clip, "audio")]
        assert [path.name for path in target.parent.iterdir()] == ["out.mp4"]
        before, after = decoded(face_clip), decoded(target)
        assert np.abs(before.astype(int) - after).max() > 40

    def test_the_label_follows_the_sources_comment(self, video, face_clip, tmp_path):
        assert video(face_clip, "-o", tmp_path / "a.mp4", "--end", 0.2).exit_code == 0
        assert video(face_clip, "-o", tmp_path / "b.mp4", "--end", 0.2, "--no-label").exit_code == 0
        comments = []
        for name in ("a.mp4", "b.mp4"):
            with av.open(str(tmp_path / name)) as container:
                comments.append(container.metadata["comment"])
        assert comments[0].startswith(f"shot on a film set\ndigitalSourceType: {SOURCE_TYPE}; tool: faceage 0.1.0; ")
        assert comments[0].endswith("; target_age: 70")
        assert "; model: tiny sha256:" in comments[0]
        assert comments[1] == "shot on a film set"

    def test_a_video_without_a_face_passes_through(self, networks, tiny_model, tmp_path):
        clip = make_clip(tmp_path / "noise.mp4")
        target = tmp_path / "out.mkv"
        result = faceage("video", clip, "-o", target, "--model", tiny_model, "--codec", "ffv1", "--age", 70)
        assert result.exit_code == 0, result.stderr
        assert "16 frames, no face found, passed through untouched" in result.stdout
        assert np.array_equal(decoded(clip), decoded(target))

    def test_json_and_report(self, video, face_clip, tmp_path):
        report = tmp_path / "report.json"
        result = video(face_clip, "-o", tmp_path / "out.mp4", "--end", 1, "--json", "--report", report)
        assert result.exit_code == 0
        events = [json.loads(line) for line in result.stdout.splitlines()]
        kinds = [event["event"] for event in events]
        assert kinds[0] == "start"
        assert kinds[-2:] == ["item", "done"]
        assert set(kinds[1:-2]) - {"engine"} == {"progress"}  # the first test builds engines
        assert events[-1].items() >= {"done": 1, "failed": 0, "exit_code": 0}.items()
        record = json.loads(report.read_text())
        assert record["items"] == [{k: v for k, v in events[-2].items() if k != "event"}]
        assert record["items"][0]["frames"] == 25
        assert set(record["items"][0]["stage_ms"]) >= {"decode", "age", "encode"}
        assert record["exit_code"] == 0
        assert record["options"]["age"] == 70
        assert record["versions"]["faceage"] == "0.1.0"
        precision = choose_runtime(device="cpu").precision
        assert record["engines"] == {"model": "tiny", "backend": "openvino", "device": "cpu", "precision": precision}

    def test_quiet_says_nothing_and_verbose_more(self, video, face_clip, tmp_path):
        quiet = video(face_clip, "-o", tmp_path / "a.mp4", "--end", 0.2, "-q")
        assert (quiet.stdout, quiet.stderr) == ("", "")
        verbose = video(face_clip, "-o", tmp_path / "b.mp4", "--end", 0.2, "-v")
        assert "faceage: model tiny, backend openvino on cpu" in verbose.stderr
        assert "encoder libx264 yuv420p" in verbose.stderr
        assert "milliseconds a frame, overlapping: decode " in verbose.stderr
        assert logging.getLogger("faceage").handlers == []

    def test_several_inputs_go_on_after_a_bad_one(self, video, face_clip, tmp_path):
        (tmp_path / "bad.mp4").write_text("not a video\n")
        result = video(tmp_path / "bad.mp4", face_clip, "-o", tmp_path / "out", "--end", 0.2)
        assert result.exit_code == 1
        assert error_of(result).startswith(f"{tmp_path}/bad.mp4 ")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["face.mp4"]

    def test_faces_that_nothing_is_done_to_are_not_called_missing(self, video, face_clip, tmp_path):
        result = video(face_clip, "-o", tmp_path / "out.mp4", "--end", 0.2, "--strength", 0)
        assert "faces found, none to be changed (profiles, or --strength 0), passed through" in result.stdout

    def test_an_output_that_ends_in_a_slash_is_a_folder(self, video, face_clip, tmp_path):
        result = video(face_clip, "-o", f"{tmp_path / 'aged'}/", "--end", 0.2)
        assert result.exit_code == 0, result.stderr
        assert [path.name for path in (tmp_path / "aged").iterdir()] == ["face.mp4"]

    def test_the_label_names_the_age_that_was_drawn(self, video, face_clip, tmp_path):
        assert video(face_clip, "-o", tmp_path / "out.mp4", "--end", 0.2, age=("--age", "100")).exit_code == 0
        with av.open(str(tmp_path / "out.mp4")) as container:
            assert container.metadata["comment"].endswith("; target_age: 85")

    def test_a_truncated_video_is_kept_as_far_as_it_decodes(self, video, face_clip, tmp_path):
        data = face_clip.read_bytes()
        (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
        result = video(tmp_path / "cut.mp4", "-o", tmp_path / "out.mp4")
        assert result.exit_code == 1, result.stderr
        assert f"faceage: warning: {tmp_path}/cut.mp4 is damaged: the file ends " in result.stderr
        assert 5 < len(packets_of(tmp_path / "out.mp4", "video")) < 50

    def test_an_interruption_leaves_finished_files(self, video, face_clip, tmp_path, monkeypatch):
        import faceage.cli.video as module

        calls = []
        real = module.age_video

        def stop_at_the_second(*args, **options):
            if calls:
                raise KeyboardInterrupt
            calls.append(args)
            return real(*args, **options)

        monkeypatch.setattr(module, "age_video", stop_at_the_second)
        second = tmp_path / "second.mp4"
        shutil.copy(face_clip, second)
        result = video(face_clip, second, "-o", tmp_path / "out", "--end", 0.2, "--json")
        assert result.exit_code == 130
        assert error_of(result).startswith("interrupted; what was finished stays, and the same command goes on where")
        assert json.loads(result.stdout.splitlines()[-1])["exit_code"] == 130
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["face.mp4"]


class TestBadVideos:
    """Each is one clear line and exit code 3, before any engine is loaded."""

    def check(self, video, source, target, message, *options):
        result = video(source, "-o", target, *options)
        assert result.exit_code == 3
        assert error_of(result).startswith(message)
        assert result.stdout == ""

    def test_missing(self, video, tmp_path):
        self.check(
            video, tmp_path / "no.mp4", tmp_path / "out.mp4", f"{tmp_path}/no.mp4 does not exist; check the name"
        )

    def test_empty(self, video, tmp_path):
        (tmp_path / "empty.mp4").touch()
        self.check(video, tmp_path / "empty.mp4", tmp_path / "out.mp4", f"{tmp_path}/empty.mp4 is empty (0 bytes)")

    def test_text(self, video, tmp_path):
        (tmp_path / "text.mp4").write_text("hello\n" * 100)
        message = f"{tmp_path}/text.mp4 is not a readable video: it holds text; name a video file"
        self.check(video, tmp_path / "text.mp4", tmp_path / "out.mp4", message)

    def test_audio_only(self, video, tmp_path):
        with av.open(str(tmp_path / "sound.m4a"), "w") as output:
            stream = output.add_stream("aac", rate=48_000)
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48_000, 0
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        message = f"{tmp_path}/sound.m4a has no video stream (audio only)"
        self.check(video, tmp_path / "sound.m4a", tmp_path / "out.mp4", message)

    def test_output_exists(self, video, face_clip, tmp_path):
        (tmp_path / "out.mp4").write_text("mine")
        message = f"the output {tmp_path}/out.mp4 exists; pass --overwrite or name another"
        self.check(video, face_clip, tmp_path / "out.mp4", message)
        assert (tmp_path / "out.mp4").read_text() == "mine"
        assert video(face_clip, "-o", tmp_path / "out.mp4", "--end", 0.2, "--overwrite").exit_code == 0

    def test_output_is_input(self, video, face_clip, tmp_path):
        shutil.copy(face_clip, tmp_path / "in.mp4")
        message = f"the output {tmp_path}/in.mp4 is the input {tmp_path}/in.mp4; faceage does not edit in place"
        self.check(video, tmp_path / "in.mp4", tmp_path / "in.mp4", message, "--overwrite")
        assert (tmp_path / "in.mp4").read_bytes() == face_clip.read_bytes()

    def test_output_below_a_file(self, video, face_clip, tmp_path):
        (tmp_path / "file").touch()
        self.check(video, face_clip, tmp_path / "file" / "out.mp4", f"the folder {tmp_path}/file cannot be made (")

    def test_output_where_nothing_can_be_written(self, video, face_clip):
        self.check(video, face_clip, "/proc/out.mp4", "/proc/out.mp4 cannot be created")

    def test_an_unknown_codec(self, video, face_clip, tmp_path):
        message = "this build has no encoder 'h999'"
        self.check(video, face_clip, tmp_path / "out.mp4", message, "--codec", "h999")

    def test_a_range_behind_the_end(self, video, face_clip, tmp_path):
        self.check(video, face_clip, tmp_path / "out.mp4", f"{face_clip} has no frame from 50", "--start", "00:50")
        assert list(tmp_path.iterdir()) == []


class TestEnvironment:
    """What is wrong with the installation is exit code 4."""

    def test_a_corrupt_checkpoint(self, networks, tiny_model, checkpoints, face_photo, tmp_path):
        from faceage.models import import_model, user_folder

        files = import_model("corrupt", list(checkpoints.values()))
        files.paths["encoder"].write_bytes(files.paths["encoder"].read_bytes()[:-1000])
        try:
            result = faceage("images", face_photo, "-o", tmp_path, "--model", "corrupt", "--age", 70)
        finally:
            shutil.rmtree(user_folder() / "corrupt")
        assert result.exit_code == 4
        assert error_of(result).startswith(f"{files.paths['encoder']} is damaged or not safetensors (")

    def test_a_device_that_is_not_there(self, tiny_model, face_photo, tmp_path):
        options = ["--backend", "onnxruntime", "--device", "cuda:9", "--age", 70]
        result = faceage("images", face_photo, "-o", tmp_path, "--model", tiny_model, *options)
        assert result.exit_code == 4
        assert "runs on the CPU, not on cuda:9" in error_of(result)

    def test_several_gpus_share_segments_and_photos_only(self, face_clip, face_photo, tmp_path):
        options = ["-o", tmp_path / "out", "--device", "cuda:0,1"]
        result = faceage("scan", face_clip, *options)
        assert result.exit_code == 2
        assert "--device cuda:0,1: only `faceage video` and `faceage images` use several GPUs" in result.output
        assert faceage("images", face_photo, *options, "--age", 70).exit_code == 4

    def test_facenet_that_was_not_fetched(self, tiny_model, face_photo, tmp_path):
        result = faceage(
            "images", face_photo, "-o", tmp_path, "--model", tiny_model, "--identity", "facenet", "--age", 70
        )
        assert result.exit_code == 4
        assert "faceage models fetch facenet" in error_of(result)


class TestImages:
    def test_a_quality_is_what_it_was_asked_for(self, images, face_photo, tmp_path):
        source = tmp_path / "a.jpg"
        Image.open(face_photo).save(source, quality=95)
        for quality in (20, 90):
            result = images(source, "-o", tmp_path / str(quality), "--quality", quality)
            assert result.exit_code == 0, result.stderr
        small, large = (tmp_path / str(quality) / "a.jpg" for quality in (20, 90))
        assert 2 * small.stat().st_size < large.stat().st_size < source.stat().st_size

    def test_a_tree_keeps_its_shape(self, images, face_photo, tmp_path):
        folder = tmp_path / "in"
        (folder / "sub").mkdir(parents=True)
        shutil.copy(face_photo, folder / "a.png")
        shutil.copy(face_photo, folder / "sub" / "b.png")
        shutil.copy(face_photo, folder / ".hidden.png")
        (folder / "notes.txt").write_text("x")
        out = tmp_path / "out"
        result = images(folder, "-o", out)
        assert result.exit_code == 0, result.stderr
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == ["a.png", "sub/b.png"]
        assert f"faceage: 1 not images, left out: {folder}/notes.txt" in result.stderr
        assert f"{folder}/a.png: 1 face (" in result.stdout
        assert f"2 photos written to {out}: 2 faces aged, 0 without a face passed through, 0 failed" in result.stdout
        assert np.abs(pixels(face_photo).astype(int) - pixels(out / "a.png")).max() > 40
        assert SOURCE_TYPE.encode() in (out / "a.png").read_bytes()

        again = images(folder, "-o", out)
        assert again.exit_code == 0
        assert "faceage: 2 were done before with the same options (--no-resume --overwrite does" in again.stderr
        assert again.stdout == ""
        assert images(folder, "-o", out, "--overwrite", "--no-label").exit_code == 0
        assert SOURCE_TYPE.encode() not in (out / "a.png").read_bytes()

    def test_a_facegan(self, facegan, tiny_facegan, facegan_checkpoint, face_photo, tmp_path):
        options = ["-o", tmp_path, "--age", 70, "--model", tiny_facegan]
        assert faceage("images", face_photo, *options).exit_code == 0
        assert np.abs(pixels(face_photo).astype(int) - pixels(tmp_path / "face.png")).max() > 5
        label = f"{tiny_facegan} sha256:{sha256_of(facegan_checkpoint)[:12]}"
        assert label.encode() in (tmp_path / "face.png").read_bytes()
        refused = faceage("images", face_photo, *options, "--overwrite", "--composite", "replace")
        assert refused.exit_code == 3
        assert error_of(refused).endswith("has no option composite; leave it out, or use --model age-cgan")

    def test_bad_files_do_not_stop_the_others(self, images, face_photo, tmp_path):
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "text.png").write_text("hello")
        Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
        missing = tmp_path / "missing.jpg"
        sources = [tmp_path / "empty.jpg", tmp_path / "text.png", tmp_path / "dot.png", missing, face_photo]
        result = images(*sources, "-o", tmp_path / "out")
        assert result.exit_code == 1
        errors = sorted(line for line in result.stderr.splitlines() if "error" in line)
        assert [line.split(":")[2].strip() for line in errors] == [
            f"{tmp_path}/empty.jpg", f"{missing} does not exist; check the name", f"{tmp_path}/text.png",
        ]  # fmt: skip
        assert f"{tmp_path}/dot.png: no face found, passed through untouched -> " in result.stdout
        assert sorted(path.name for path in (tmp_path / "out").glob("*.*g")) == ["dot.png", "face.png"]
        assert (pixels(tmp_path / "out" / "dot.png") == (255, 0, 0)).all()

    def test_a_file_that_may_not_be_read_does_not_stop_the_others(self, images, face_photo, tmp_path, monkeypatch):
        secret = tmp_path / "secret.png"
        shutil.copy(face_photo, secret)
        folder = tmp_path / "folder"
        folder.mkdir()
        # Permissions do not bind root, who may run the tests: both ways to meet them are made to fail.
        access, read_bytes, denied = os.access, Path.read_bytes, {secret, folder}

        def refuse(path):
            if path == secret:
                raise PermissionError(13, "Permission denied")
            return read_bytes(path)

        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in denied and access(path, mode))
        monkeypatch.setattr(Path, "read_bytes", refuse)
        result = images(secret, folder, face_photo, "-o", tmp_path / "out")
        assert result.exit_code == 1
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        assert errors == [
            f"faceage: error: {folder} is a folder that may not be read; check its permissions",
            f"faceage: error: {secret}: cannot be read (Permission denied)",
        ]
        assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["face.png"]

    def test_an_empty_picture_alone(self, images, tmp_path):
        (tmp_path / "empty.jpg").touch()
        result = images(tmp_path / "empty.jpg", "-o", tmp_path / "out")
        assert result.exit_code == 3
        assert "the file is empty (0 bytes)" in error_of(result)

    def test_a_picture_beyond_the_limit(self, images, tmp_path):
        header = struct.pack(">IIBBBBB", 20_001, 21_000, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        body = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + body)
        result = images(tmp_path / "huge.png", "-o", tmp_path / "out")
        assert result.exit_code == 3
        assert "huge.png: 20001x21000 is 420 megapixels, the limit is 400" in error_of(result)

    def test_a_folder_without_pictures(self, images, tmp_path):
        (tmp_path / "in").mkdir()
        result = images(tmp_path / "in", "-o", tmp_path / "out")
        assert result.exit_code == 3
        assert error_of(result).startswith(f"no image in {tmp_path}/in; ")

    @pytest.mark.parametrize("as_folder", [True, False])
    def test_the_output_is_the_input(self, images, face_photo, tmp_path, as_folder):
        shutil.copy(face_photo, tmp_path / "face.png")
        result = images(tmp_path if as_folder else tmp_path / "face.png", "-o", tmp_path, "--overwrite")
        assert result.exit_code == 3
        assert "faceage does not edit in place, name another folder" in error_of(result)
        assert (tmp_path / "face.png").read_bytes() == face_photo.read_bytes()

    def test_an_output_that_cannot_be_written(self, images, face_photo, tmp_path):
        (tmp_path / "file").touch()
        result = images(face_photo, "-o", tmp_path / "file" / "out")
        assert result.exit_code == 3
        assert error_of(result).startswith(f"the folder {tmp_path}/file/out cannot be made (")

    def test_a_first_run_ends_with_all_engines_though_no_photo_needs_them(self, images, tmp_path, monkeypatch):
        opened = []
        wait = Networks.wait_until_open
        monkeypatch.setattr(Networks, "wait_until_open", lambda self: (wait(self), opened.extend(self.opening)))
        Image.new("RGB", (96, 96), "gray").save(tmp_path / "gray.png")
        result = images(tmp_path / "gray.png", "-o", tmp_path / "out", "--device", "cpu", "--json")
        assert result.exit_code == 0, result.stderr
        assert len(opened) > 5
        assert all(engine.done() for engine in opened)
        assert json.loads(result.stdout.splitlines()[-1])["event"] == "done"

    def test_a_process_ends_at_once_but_with_all_that_it_has_to_do(self):
        """What was said is written, what was registered for the end is called, and the exit code is the command's."""
        program = (
            "import atexit, sys; from faceage import cli\n"
            "def main():\n    print('done'); atexit.register(print, 'left'); sys.exit(3)\n"
            "cli.main = main; cli.run()"
        )
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (3, "done\nleft\n", "")
        with open("/dev/full", "w") as full:
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode not in (0, 3)
        assert "No space left on device" in done.stderr

    def test_a_full_disk_under_stdout_is_one_line(self, tmp_path):
        program = "from faceage.cli import run; run()"
        words = [sys.executable, "-c", program, "images", str(tmp_path / "none.png"), "-o", str(tmp_path)]
        words += ["--json", "--age", "70"]
        with open("/dev/full", "w") as full:
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 3
        assert done.stderr.splitlines() == [
            "faceage: error: standard output cannot be written (No space left on device); free space where it goes to, "
            "and run the command again"
        ]

    def test_kinds_of_pictures_that_are_not_read_are_failures(self, images, face_photo, tmp_path):
        (tmp_path / "in").mkdir()
        shutil.copy(face_photo, tmp_path / "in")
        (tmp_path / "in" / "phone.HEIC").touch()
        result = images(tmp_path / "in", "-o", tmp_path / "out", "--report", tmp_path / "report.json")
        assert result.exit_code == 1
        assert "1 pictures of a kind that is not read, left out: " in result.stderr
        record = json.loads((tmp_path / "report.json").read_text())
        assert record["failed"] == 1
        assert "phone.HEIC: .HEIC is not read; convert it to JPEG" in record["items"][0]["error"]
        assert images(tmp_path / "in", "-o", tmp_path / "out").exit_code == 1  # and what was done stays done

    def test_the_first_failure_may_stop_the_run(self, images, face_photo, tmp_path):
        (tmp_path / "in").mkdir()
        for number in range(40):
            (tmp_path / "in" / f"{number:02d}.png").write_text("x")
        result = images(tmp_path / "in", "-o", tmp_path / "out", "--on-error", "stop")
        assert result.exit_code == 3
        assert result.stderr.count("faceage: error:") == 1
        assert "stopped at the first photo that failed" in result.stderr

    def test_json(self, images, face_photo, tmp_path):
        result = images(face_photo, "-o", tmp_path / "out", "--json", "--report", tmp_path / "report.json")
        events = [json.loads(line) for line in result.stdout.splitlines()]
        assert [event["event"] for event in events] == ["start", "progress", "item", "done"]
        (face,) = events[2]["faces"]
        assert face["target_age"] == 70
        record = json.loads((tmp_path / "report.json").read_text())
        assert set(record["stage_ms"]) >= {"read", "detect", "age", "blend", "write"}
        assert record["photos_per_second"] > 0


class TestSheet:
    def test_a_row_a_face_and_a_column_an_age(self, networks, tiny_model, face_photo, tmp_path):
        target = tmp_path / "sheet.png"
        result = faceage("sheet", face_photo, "-o", target, "--model", tiny_model, "--ages", "20,30,...,60")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"{face_photo}: 5 ages -> {target}\n"
        with Image.open(target) as sheet:
            assert sheet.width > 6 * 200 > 4 * sheet.height
        assert b"20, 30, 40, 50, 60" in target.read_bytes()

    @pytest.mark.parametrize(
        ("ages", "message"),
        [
            ("20,x", "'x' is not a valid float range."),
            ("20,...,60", '"..." needs two ages before it'),
            ("20,400", "400.0 is not in"),
        ],
    )
    def test_wrong_ages(self, face_photo, tmp_path, ages, message):
        result = faceage("sheet", face_photo, "-o", tmp_path / "s.png", "--ages", ages)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_a_suffix_that_is_no_picture(self, face_photo, tmp_path):
        assert faceage("sheet", face_photo, "-o", tmp_path / "s.mp4").exit_code == 2

    def test_no_face(self, networks, tiny_model, tmp_path):
        Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
        result = faceage("sheet", tmp_path / "black.png", "-o", tmp_path / "s.png", "--model", tiny_model)
        assert result.exit_code == 3
        assert "shows no face" in error_of(result)
        assert not (tmp_path / "s.png").exists()


class TestModelsAndDoctor:
    def test_list_info_and_import(self, tiny_model, checkpoints, tmp_path, monkeypatch):
        monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path))
        result = faceage("models", "import", "mine", *checkpoints.values())
        assert result.exit_code == 0
        assert result.stdout.endswith("use it with --model mine\n")
        assert "mine             imported  ok\n" in faceage("models", "list").stdout
        listed = json.loads(faceage("models", "list", "--json").stdout)
        assert [row["model"] for row in listed["models"]] == ["age-cgan", "facegan", "space", "mine"]
        assert "generator: age-cgan-generator, " in faceage("models", "info", "mine").stdout
        described = json.loads(faceage("models", "info", "mine", "--json").stdout)
        assert described["identity"]["dims"]["outputs"] == 128
        assert faceage("models", "info", "other").exit_code == 2
        refused = faceage("models", "import", "age-cgan", *checkpoints.values())
        assert refused.exit_code == 4
        assert "cannot name a model" in error_of(refused)

    def test_a_facegan_of_one_s_own(self, tiny_facegan, facegan_checkpoint, tmp_path, monkeypatch):
        assert f"{tiny_facegan:16} imported  ok\n" in faceage("models", "list").stdout
        assert "generator: facegan, " in faceage("models", "info", tiny_facegan).stdout
        monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path))
        result = faceage("models", "import", "mine", facegan_checkpoint)
        assert result.stdout.startswith("mine: generator, age, identity from ")

    def test_fetch_without_a_network(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path))
        monkeypatch.setattr("faceage.models.fetch.FACENET_URL", "http://127.0.0.1:9/facenet.pt")
        result = faceage("models", "fetch", "facenet")
        assert result.exit_code == 4
        assert error_of(result).startswith("http://127.0.0.1:9/facenet.pt cannot be downloaded (")

    def test_doctor(self, networks, tiny_model):
        assert faceage("compile", "--target", "cpu", "--model", tiny_model).exit_code == 0
        result = faceage("doctor", "--json")
        checks = {check["name"]: check for check in json.loads(result.stdout)}
        assert checks["cache"]["state"] == checks["encoders"]["state"] == "ok"
        assert checks["model tiny"]["found"] == "4 checkpoints; 8 of 8 engines built"
        failed = [check for check in checks.values() if check["state"] == "fail"]
        assert all(check["remedy"] for check in failed)
        assert result.exit_code == (4 if failed else 0)
        shown = faceage("doctor").stdout
        assert "model tiny" in shown
        assert all(f"faceage[{extra}]" in shown for extra in EXTRAS)

    def test_doctor_names_what_mends_the_cache(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path / "file"))
        result = faceage("doctor", "--json")
        assert result.exit_code == 4
        (cache,) = [check for check in json.loads(result.stdout) if check["name"] == "cache"]
        assert cache["state"] == "fail"
        assert cache["remedy"].startswith("export FACEAGE_CACHE=")


class TestPeople:
    """`faceage scan`, and who is aged by number."""

    def test_scan_once_and_age_often(self, networks, tiny_model, video, face_clip, tmp_path):
        result = faceage("scan", face_clip, "-o", tmp_path / "plan", "--model", tiny_model, "--end", 0.4)
        assert result.exit_code == 0, result.stderr
        assert "10 frames, 1 people (1 looks " in result.stdout
        assert sorted(os.listdir(tmp_path / "plan")) == ["people.html", "plan.json", "plan.npz"]
        page = (tmp_path / "plan" / "people.html").read_text()
        assert page.count("data:image/jpeg;base64,/9j/") == 1
        assert "<h2>1</h2>" in page
        assert "0:00.0-0:00.4" in page
        assert "http" not in page  # it needs no network

        again = faceage("scan", face_clip, "-o", tmp_path / "plan", "--model", tiny_model)
        assert again.exit_code == 3
        assert error_of(again) == f"{tmp_path}/plan holds a plan; pass --overwrite or name another folder"

        options = ["--plan", tmp_path / "plan", "--json"]
        result = video(face_clip, "-o", tmp_path / "a.mp4", *options, age=("--person", "1=70"))
        assert result.exit_code == 0, result.stderr
        events = [json.loads(line) for line in result.stdout.splitlines()]
        assert {event.get("stage") for event in events} == {None, "render"}
        (item,) = (event for event in events if event["event"] == "item")
        assert (item["frames"], item["people"][0]["target_age"]) == (10, 70)
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert container.metadata["comment"].endswith("; target_age: person 1 70")

        kept = video(face_clip, "-o", tmp_path / "b.mp4", "--end", 0.4, age=("--age", "70", "--person", "1=keep"))
        assert "none to be changed" in kept.stdout
        nobody = video(face_clip, "-o", tmp_path / "c.mp4", *options[:2], age=("--person", "2=+20"))
        assert nobody.exit_code == 3
        assert error_of(nobody).startswith("there is no person 2 in the video, which has 1; `faceage scan` shows")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--person", "2"], "'2' is not NUMBER=AGE, NUMBER=+YEARS or NUMBER=keep"),
            (["--person", "a=70"], "'a=70' is not NUMBER=AGE"),
            (["--person", "1=70", "--person", "1=60"], "'1=60' is not NUMBER=AGE"),
            (["--person", "1=170"], "(age is 170; it must be from 0 to 100 years)"),
            ([], "or --person for each who is to be aged"),
            (["--age", "70", "--by", "10"], "give one of --age N, --by +N and --age-curve TIME:N,TIME:N"),
            (["--age", "70", "--age-curve", "0:30,1:30:70"], "give one of --age N, --by +N and --age-curve"),
            (["--age-curve", "30"], "'30' is not TIME:AGE, e.g. 0:30,1:30:70"),
            (["--age-curve", "0:30"], "an age curve has two points at least"),
            (["--age-curve", "5:30,1:70"], "each at a later time than the one before"),
        ],
    )
    def test_wishes_that_make_no_sense(self, video, face_clip, tmp_path, options, message):
        result = video(face_clip, "-o", tmp_path / "out.mp4", age=options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())

    def test_numbers_are_of_one_video(self, video, face_clip, tmp_path):
        result = video(face_clip, face_clip, "-o", tmp_path, age=("--person", "1=70"))
        assert result.exit_code == 2
        assert "are about one video; give one input" in result.stderr
