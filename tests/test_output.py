"""The report: where it may be written, and what is said when it cannot be."""

import json
import shutil

import click
import pytest
from click.testing import CliRunner

from faceage.cli import main
from faceage.cli.output import EXIT_SOME_FAILED, Output


@pytest.mark.parametrize("report", ["face.png", "new.mp4", "link.json", "link.html", "none/r.json", "face.png/r.json"])
def test_a_report_replaces_no_picture_and_has_a_folder(face_photo, tmp_path, report):
    photo = shutil.copy(face_photo, tmp_path / "face.png")
    (tmp_path / "link.json").symlink_to(photo)
    args = ["images", str(photo), "-o", str(tmp_path / "out"), "--age", "70", "--report", str(tmp_path / report)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    if report.startswith("link"):  # a page has a report in JSON beside it
        wanted = f"the report {tmp_path}/link.json leads to {photo}; name another file"
    elif report.endswith("/r.json"):
        wanted = f"the report {tmp_path / report} cannot be written; name a file in a folder"
    else:
        wanted = f"the report {tmp_path / report} is JSON or a page; name a file that ends in .json or .html"
    assert f"Error: Invalid value for --report: {wanted}" in result.stderr
    assert photo.read_bytes() == face_photo.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["face.png", "link.json"]


def test_an_earlier_report_is_replaced(tmp_path):
    report = tmp_path / "r.JSON"
    report.write_text("earlier")
    with Output("images", {}, report=report) as out:
        out.item({"source": "a.png"})
    assert json.loads(report.read_text())["exit_code"] == 0


def test_a_report_that_fails_at_the_end_is_in_the_exit_code(tmp_path, capsys):
    (tmp_path / "gone").mkdir()
    out = Output("images", {}, as_json=True, report=tmp_path / "gone" / "r.json")
    out.__enter__()
    out.item({"source": "a.png"})
    (tmp_path / "gone").rmdir()
    with pytest.raises(click.exceptions.Exit) as caught:
        out.__exit__(None, None, None)
    assert caught.value.exit_code == EXIT_SOME_FAILED
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["exit_code"] == EXIT_SOME_FAILED
    assert "gone/r.json cannot be written (No such file or directory); name another file" in captured.err
