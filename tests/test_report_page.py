"""The page of a run: it shows what was done, and needs nothing but itself."""

import base64
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from faceage.cli import main


def pictures_of(page):
    """The pictures of a page: uint8 [224, 224, 3] each, in order."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR) for data in found]


def run(command, *args, model):
    result = CliRunner().invoke(main, [command, *map(str, args), "--model", model, "--age", "70", "--source-age", "30"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def photo_page(networks, tiny_model, face_photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "bad <b>.jpg").write_text("no picture")
    args = [face_photo, folder / "bad <b>.jpg", "-o", folder / "out", "--report", folder / "run.html"]
    assert run("images", *args, model=tiny_model).exit_code == 1
    return folder / "run.html"


def test_the_page_of_photos(photo_page, face_photo):
    page = photo_page.read_text()
    before, after = pictures_of(page)
    assert before.shape == after.shape == (224, 224, 3)
    photo = cv2.imread(str(face_photo)).astype(float)
    box = json.loads(photo_page.with_suffix(".json").read_text())["items"][-1]["faces"][0]["box"]
    left, top, right, bottom = box
    x, y, quarter = (left + right) / 2, (top + bottom) / 2, 1.9 * max(right - left, bottom - top) / 4
    face = photo[round(y - quarter) : round(y + quarter), round(x - quarter) : round(x + quarter)].mean((0, 1))
    np.testing.assert_allclose(before[56:168, 56:168].mean((0, 1)), face, atol=4)
    assert np.abs(before.astype(int) - after)[70:150, 70:150].mean() > 3
    assert "30 &rarr; 70, identity" in page
    assert "1 done, 1 failed" in page
    assert "bad &lt;b&gt;.jpg: no picture, or a damaged one" in page
    assert not re.search(r"https?:|<link|<script src|@import", page)


def test_the_page_of_a_part_of_a_video(networks, tiny_model, face_clip, tmp_path):
    args = [face_clip, "-o", tmp_path / "out.mkv", "--start", 1, "--report", tmp_path / "run.html"]
    assert run("video", *args, model=tiny_model).exit_code == 0
    page = (tmp_path / "run.html").read_text()
    (item,) = json.loads((tmp_path / "run.json").read_text())["items"]
    assert item["starts_at_s"] == 1
    (person,) = item["people"]
    assert 0 <= person["best_time_s"] < 1
    before, after = (picture.astype(int) for picture in pictures_of(page))
    assert np.abs(before - after)[70:150, 70:150].mean() > 3  # the face is changed,
    assert np.abs(before - after)[:10].mean() < 3  # and what is around it shows the same moment
    assert "person 1: 30 &rarr; 70, identity" in page
    (tmp_path / "out.mkv").unlink()


def test_a_browser_shows_both_pictures(photo_page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    shot = tmp_path / "shot.png"
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--force-device-scale-factor=1"]
    words += ["--window-size=1000,1400", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    subprocess.run([*words, photo_page.as_uri()], check=True, capture_output=True, timeout=120)
    shown = cv2.imread(str(shot))
    before, after = pictures_of(photo_page.read_text())
    middle = slice(60, 160)
    for picture, columns in ((before, slice(10, 100)), (after, slice(124, 214))):  # each on its side of the cut
        match = cv2.matchTemplate(shown, picture[middle, columns], cv2.TM_SQDIFF_NORMED)
        assert match.min() < 0.01
