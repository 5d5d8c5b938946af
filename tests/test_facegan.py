"""The FaceGAN ager: its engines, its sizes, and what it leaves alone."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from faceage.agers.facegan import BATCH_PIXELS, FaceGAN
from faceage.agers.programs import model_programs, unet_program
from faceage.checkpoint import load, save
from faceage.engines.store import EngineStore
from faceage.errors import CheckpointError, UnsupportedError
from faceage.geometry import template_5
from faceage.models import find_model
from faceage.pipeline.photos import age_frames
from faceage.pipeline.request import AgeRequest, load_networks
from faceage.types import RGB, Frame


def faces(count, size=128, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.uniform(-1, 1, (count, 3, size, size)).astype(np.float32)
    landmarks = template_5(size) + random.normal(0, size / 100, (count, 5, 2)).astype(np.float32)
    return pixels, landmarks, np.linspace(20, 60, count, dtype=np.float32), np.full(count, 70, np.float32)


def frame(picture):
    return Frame(planes=(np.ascontiguousarray(picture),), pixel_format="rgb24", color=RGB)


def test_both_backends_agree(tiny_facegan):
    programs = model_programs(find_model(tiny_facegan))
    assert list(programs) == ["unet-128", "unet-192", "identity", "age"]
    pixels, _, now, wanted = faces(3)
    changes = [EngineStore().load(programs["unet-128"], backend)(pixels, now, wanted)[0] for backend in
               ("openvino", "torch")]  # fmt: skip
    assert changes[0].shape == pixels.shape
    assert np.abs(changes[0]).max() > 0.05
    np.testing.assert_allclose(changes[0], changes[1], atol=1e-5)


def test_weights_of_another_version_are_refused_in_one_line(facegan_checkpoint, tmp_path):
    header, weights = load(facegan_checkpoint, "facegan")
    weights.pop("to_luma.bias")
    save(tmp_path / "facegan.safetensors", weights, header)
    with pytest.raises(CheckpointError, match="holds other weights than this version's facegan has; train it again"):
        unet_program(tmp_path / "facegan.safetensors", 128).build()


def test_a_batch_gives_what_each_face_gives_alone(facegan):
    batch = faces(BATCH_PIXELS // 128**2 + 2)  # more than one call takes
    together = facegan.ager.age(*batch)
    for row in (0, 1, -1):
        alone = facegan.ager.age(*(column[row:][:1] for column in batch))
        np.testing.assert_allclose(together.deltas[row], alone.deltas[0], atol=1e-5)
        np.testing.assert_allclose(together.identity[row], alone.identity[0], atol=1e-4)


def test_no_years_change_nothing_and_more_years_change_more(facegan):
    pixels, landmarks, _, _ = faces(3)
    aged = facegan.ager.age(pixels, landmarks, np.full(3, 30, np.float32), np.array([30, 40, 60], np.float32))
    strength = np.abs(aged.deltas).mean((1, 2, 3))
    assert strength[0] == 0 < strength[1] < strength[2]
    assert aged.identity[0] == pytest.approx(1, abs=1e-4)


def test_eyes_and_mouth_are_left_alone_where_the_face_has_them(facegan):
    pixels, landmarks, now, wanted = faces(2)
    moved = landmarks + np.float32([9, -6])
    for points in (landmarks, moved):
        deltas = np.abs(facegan.ager.age(pixels, points, now, wanted).deltas).sum(1)
        for delta, (left, right, nose, *corners) in zip(deltas, points, strict=True):
            for x, y in np.rint([left, right, np.mean(corners, 0)]).astype(int):
                assert delta[y, x] == 0
            x, y = np.rint(nose).astype(int)
            assert delta[y, x] > 0


def test_it_has_no_latents_and_measures_identity_once(facegan):
    batch = faces(2)
    first = facegan.ager.age(*batch)
    assert first.latents.shape == (2, 0)
    assert np.isfinite(first.identity).all()
    again = facegan.ager.age(*batch, first.latents)
    assert np.isnan(again.identity).all()
    np.testing.assert_array_equal(first.deltas, again.deltas)
    nobody = facegan.ager.age(*(column[:0] for column in batch))
    assert nobody.deltas.shape == (0, 3, 128, 128)
    assert nobody.identity.shape == (0,)


def test_an_engine_is_loaded_once_when_the_first_face_needs_its_size(tiny_facegan, facegan):
    programs, loaded = model_programs(find_model(tiny_facegan)), []

    def load(role):
        loaded.append(role)
        return EngineStore().load(programs[role])

    ager = FaceGAN(
        unet=lambda size: load(f"unet-{size}"), sizes_px=(128, 192), identity=load("identity"), identity_px=64
    )
    assert loaded == ["identity"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: ager.age(*faces(1, 128, seed)), range(8)))
    assert loaded == ["identity", "unet-128"]


def test_each_face_is_aged_at_the_size_that_it_has(facegan):
    portrait = astronaut()[:256, 96:352]
    picture = np.full((600, 900, 3), 128, np.uint8)
    picture[:256, :256] = portrait
    picture[:576, 300:876] = cv2.resize(portrait, (576, 576), interpolation=cv2.INTER_CUBIC)
    made = frame(picture.copy())
    (photo,) = age_frames(facegan, [made], AgeRequest(age=70, source_age=30))
    order = np.argsort(photo.faces.boxes[:, 0])
    assert photo.sizes_px[order].tolist() == [128, 192]
    changed = np.abs(made.planes[0].astype(int) - picture).sum(2)
    for (x0, y0, x1, y1), points in zip(photo.faces.boxes, photo.faces.landmarks, strict=True):
        assert changed[int(y0) : int(y1), int(x0) : int(x1)].mean() > 3
        for x, y in np.rint([*points[:2], points[3:].mean(0)]).astype(int):
            assert changed[y, x] == 0
    alone = frame(picture[:256, :256].copy())
    age_frames(facegan, [alone], AgeRequest(age=70, source_age=30))
    off = np.abs(alone.planes[0].astype(int) - made.planes[0][:256, :256])
    assert off.mean() < 0.02 * changed[:256, :256].mean()  # the face is found a little elsewhere


def test_what_it_does_not_have_is_refused(tiny_facegan):
    from faceage.agers.latent import LatentConfig

    for options in ({"composite": "replace"}, {"latent": LatentConfig()}):
        with pytest.raises(UnsupportedError, match="model tiny-facegan adds its change to the face, without latents"):
            load_networks(model=tiny_facegan, **options)
