"""The checkpoints that come with the package."""

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from faceage.checkpoint import read_header, sha256_of
from faceage.engines.store import EngineStore
from faceage.models import BUNDLED_MODELS, find_model
from faceage.pipeline.photos import age_frames
from faceage.pipeline.request import AgeRequest, load_networks
from faceage.types import RGB, Frame


def all_files():
    return {path for model in BUNDLED_MODELS for path in find_model(model).paths.values()}


def test_they_say_what_they_are():
    files = find_model("age-cgan")
    headers = {role: read_header(path) for role, path in files.paths.items()}
    for header in map(read_header, all_files()):
        assert header.images_seen > 10_000
        assert header.dataset["licence"] == "non-commercial research only"
    assert headers["age"].metrics["val_mae"] > 0
    assert headers["encoder"].parents["gan"] == sha256_of(files.generator)
    assert headers["encoder"].parents["identity"] == sha256_of(files.identity)


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in all_files()) < 40e6


@pytest.mark.parametrize("model", BUNDLED_MODELS)
def test_the_change_is_nothing_for_no_years_and_grows_with_them(bundled, model):
    networks = bundled if model == bundled.model else load_networks(model=model)
    changes = []
    for age in (30, 36, 45):
        frame = Frame(planes=(astronaut().copy(),), pixel_format="rgb24", color=RGB)
        age_frames(networks, [frame], AgeRequest(age=age, source_age=30))
        changes.append(np.abs(frame.planes[0].astype(int) - astronaut()).mean())
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2]


def test_all_engines_of_the_default_model_are_loaded_together(monkeypatch):
    loaded, load = [], EngineStore.load

    def record(store, program, *rest):
        loaded.append(program.name)
        return load(store, program, *rest)

    monkeypatch.setattr(EngineStore, "load", record)
    networks = load_networks()
    first = sorted(loaded)
    age_frames(networks, [Frame(planes=(astronaut().copy(),), pixel_format="rgb24", color=RGB)], AgeRequest(age=70))
    assert sorted(loaded) == first == sorted(set(first))


def test_the_fit_improves_on_the_encoder(bundled):
    portrait = astronaut()
    frames = [
        Frame(planes=(np.ascontiguousarray(p),), pixel_format="rgb24", color=RGB)
        for p in (portrait, portrait[:, ::-1], cv2.resize(portrait, (300, 300)))
    ]
    from faceage.align import prepare_crops

    faces = bundled.detector.detect(frames)
    (view,) = bundled.ager.views
    pixels = prepare_crops(frames, faces.frame_index, faces.landmarks, view, view.sizes_px[0]).pixels
    fit = bundled.ager.fit(pixels, np.full(len(faces), 30, np.float32))
    assert len(faces) == 3
    assert (fit.losses < 0.9 * fit.first_losses).all()


def test_a_face_with_less_contrast_than_the_generator_gives_it_changes_less():
    from faceage.agers.age_cgan import _contrast

    rng = np.random.default_rng(0)
    made = rng.normal(size=(2, 3, 64, 64)).astype(np.float32)
    faint = made * np.array([0.25, 3], np.float32)[:, None, None, None]
    np.testing.assert_allclose(_contrast(faint, made).ravel(), [0.25, 1], rtol=1e-5)
    assert _contrast(made[:0], made[:0]).shape == (0, 1, 1, 1)
