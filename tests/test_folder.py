"""Folders of photos over several runs: what is done stays, what failed is tried again, and nobody else interferes."""

import errno
import json
import os
import resource
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from faceage.errors import MediaError
from faceage.pipeline.folder import MANIFEST, Manifest, age_folder, folder_options, locked_folder
from faceage.pipeline.report import PhotoReport
from faceage.pipeline.request import AgeRequest
from faceage.pipeline.workers import Here

REQUEST = AgeRequest(age=70, source_age=30)


@pytest.fixture
def photos(tmp_path):
    """Three small photos without a face, of which one is damaged."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "sub/b.png")):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(folder / name)
    (folder / "bad.jpg").write_bytes(b"no picture")
    return [(folder / name, folder / name) for name in ("a.png", "bad.jpg", "sub/b.png")]


@pytest.fixture
def run(networks, photos, tmp_path):
    """Age `photos` into a folder; return the names that were done, those that failed, and why others were not."""
    root = tmp_path / "in"

    def run(request=REQUEST, *, fresh=False, overwrite=False):
        out, skipped = tmp_path / "out", Counter()
        options = folder_options(networks.fingerprints, request, label=True)
        found = [(source, source.relative_to(root)) for source, _ in photos]
        done, failed = [], []
        with locked_folder(out), Manifest(out, options, fresh=fresh) as manifest:
            workers = Here(networks)
            reports = age_folder(workers, found, out, manifest, request, overwrite=overwrite, skipped=skipped)
            for report in reports:
                (failed if report.error else done).append(str(os.path.relpath(report.target, out)))
        return sorted(done), failed, dict(skipped)

    return run


def test_what_is_done_stays_and_what_failed_is_tried_again(run, photos, tmp_path):
    out = tmp_path / "out"
    assert run() == (["a.png", "sub/b.png"], ["bad.jpg"], {})
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert run() == ([], ["bad.jpg"], {"done": 2})
    Image.new("RGB", (40, 30), "blue").save(photos[1][0])  # mended
    assert run() == (["bad.jpg"], [], {"done": 2})
    assert run() == ([], [], {"done": 3})
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == first
    (out / "a.png").unlink()
    os.utime(photos[2][0])  # another time, the same content
    assert run() == (["a.png"], [], {"done": 2})


def test_other_options_or_another_photo_need_leave_to_overwrite(run, photos, tmp_path):
    run()
    Image.new("RGB", (41, 30), "red").save(photos[0][0])
    assert run() == ([], ["bad.jpg"], {"done": 1, "other": 1})
    assert run(AgeRequest(age=20)) == ([], ["bad.jpg"], {"other": 2})
    assert run(overwrite=True) == (["a.png"], ["bad.jpg"], {"done": 1})
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (41, 30)
    assert run(overwrite=True, fresh=True)[0] == ["a.png", "sub/b.png"]
    assert run(fresh=True) == ([], ["bad.jpg"], {"there": 2})


def test_a_manifest_whose_last_line_was_cut_off(run, tmp_path):
    run()
    path = tmp_path / "out" / MANIFEST
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line).get("target") for line in lines] == [None, "bad.jpg", "a.png", "sub/b.png"]
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert run() == ([], ["bad.jpg"], {"done": 1, "there": 1})  # written, but its line is lost
    assert json.loads(path.read_bytes().splitlines()[-1])["error"].endswith("expected JPEG, PNG, WebP, TIFF or BMP")
    path.write_text('{"format_version": 9}\n')
    with pytest.raises(MediaError, match="has format 9, expected 1; name another folder, or delete it"):
        run()


def test_a_second_run_into_one_folder_is_refused(run, tmp_path):
    with locked_folder(tmp_path / "out"), pytest.raises(MediaError, match="is being written by another run"):
        run()
    assert run()[0] == ["a.png", "sub/b.png"]


def test_half_written_files_of_dead_runs_are_deleted(run, tmp_path, caplog):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    dead, alive = (out / "sub" / f".{'0' * 16}.{process}.partial" for process in (2**22 + 1, os.getppid()))
    dead.touch()
    alive.touch()
    run()
    assert [message for message in caplog.messages if "half-written" in message] == [
        f"{out}: 1 half-written files of a run that was killed are deleted"
    ]
    assert not dead.exists()
    assert alive.exists()


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(run, monkeypatch):
    write = Path.write_bytes

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        MediaError, match=r"\(No space left on device\); free space there and run the same command again"
    ):
        run()
    monkeypatch.setattr(Path, "write_bytes", write)
    assert run()[0] == ["a.png", "sub/b.png"]


def test_a_manifest_that_cannot_be_written_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    report = PhotoReport(source="a", target=str(tmp_path / "b"))
    with Manifest(tmp_path, {}) as manifest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))  # a write beyond fails, as on a full disk
        try:
            with pytest.raises(
                MediaError, match=r"cannot be written .*free space there and run the same command again"
            ):
                manifest.add(report)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
