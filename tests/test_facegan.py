"""The FaceGAN ager: its engines, its sizes, and what it leaves alone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from faceage.agers.base import Ages, read_view
from faceage.agers.facegan import BATCH_PIXELS, FaceGAN, unet_program
from faceage.agers.registry import model_programs
from faceage.checkpoint import load, save
from faceage.engines.base import Runtime
from faceage.engines.registry import BACKENDS
from faceage.engines.store import EngineStore
from faceage.errors import CheckpointError, UnsupportedError
from faceage.geometry import TEMPLATE_5, face_mask, template_5
from faceage.models import find_model
from faceage.pipeline.photos import age_frames
from faceage.pipeline.request import AgeRequest, load_networks
from faceage.types import RGB, Crops, Frame, View


def faces(count, size=128, seed=0):
    """Crops of noise, at ages from 20 to 60, and the looks that make everybody 70."""
    random = np.random.default_rng(seed)
    pixels = random.uniform(-1, 1, (count, 3, size, size)).astype(np.float32)
    landmarks = template_5(size) + random.normal(0, size / 100, (count, 5, 2)).astype(np.float32)
    crops = Crops(pixels=pixels, landmarks=landmarks, frame_to_crop=np.zeros((count, 2, 3), np.float32))
    return crops, Ages.rows(np.linspace(20, 60, count, dtype=np.float32), np.full(count, 70, np.float32))


def observe(ager, crops, looks):
    """Return the unmasked changes: float32 [F, 3, S, S]."""
    return np.array(ager.observe(looks, [crops], [None] * len(looks))).reshape(crops.pixels.shape)


def frame(picture):
    return Frame(planes=(np.ascontiguousarray(picture),), pixel_format="rgb24", color=RGB)


def test_both_backends_agree(tiny_facegan):
    programs = model_programs(find_model(tiny_facegan))
    assert list(programs) == ["unet-128", "unet-192", "identity", "age"]
    crops, looks = faces(3)
    pixels, ages = crops.pixels, Ages.columns(looks)
    changes = [
        EngineStore().load(programs["unet-128"], Runtime(backend=BACKENDS[name]))(pixels, *ages)[0]
        for name in ("openvino", "torch")
    ]
    assert changes[0].shape == pixels.shape
    assert np.abs(changes[0]).max() > 0.05
    np.testing.assert_allclose(changes[0], changes[1], atol=1e-5)


def test_weights_of_another_version_are_refused_in_one_line(facegan_checkpoint, tmp_path):
    header, weights = load(facegan_checkpoint, "facegan")
    weights.pop("to_luma.bias")
    save(tmp_path / "facegan.safetensors", weights, header)
    with pytest.raises(CheckpointError, match="holds other weights than this version's facegan has; train it again"):
        unet_program(tmp_path / "facegan.safetensors", 128).network(True)


def test_a_batch_gives_what_each_face_gives_alone(facegan):
    crops, looks = faces(BATCH_PIXELS // 128**2 + 2)  # more than one call takes
    together = observe(facegan.ager, crops, looks)
    for row in (0, 1, len(looks) - 1):
        (alone,) = observe(facegan.ager, crops[row : row + 1], looks[row : row + 1])
        np.testing.assert_allclose(together[row], alone, atol=1e-5)


def test_no_years_change_nothing_and_more_years_change_more(facegan):
    crops, _ = faces(3)
    looks = Ages.rows(np.full(3, 30, np.float32), np.array([30, 40, 60], np.float32))
    changes = observe(facegan.ager, crops, looks)
    strength = np.abs(changes).mean((1, 2, 3))
    assert strength[0] == 0 < strength[1] < strength[2]
    drawn = [facegan.ager.draw(look, key, key, 0)[0] for look, key in zip(looks, changes, strict=True)]
    identity = facegan.measure_identity(crops, drawn)
    assert identity[0] == pytest.approx(1, abs=1e-4)
    assert identity[2] < identity[1] < identity[0]
    assert facegan.measure_identity(crops, [None] * 3) == pytest.approx(1, abs=1e-4)
    assert facegan.measure_identity(crops[:0], []).shape == (0,)


def test_eyes_and_mouth_are_left_alone_where_the_face_has_them(facegan):
    crops, looks = faces(2)
    moved = crops.landmarks + np.float32([9, -6])
    for points in (crops.landmarks, moved):
        changes = np.abs(observe(facegan.ager, replace(crops, landmarks=points), looks)).sum(1)
        for change, (left, right, nose, *corners) in zip(changes, points, strict=True):
            for x, y in np.rint([left, right, np.mean(corners, 0)]).astype(int):
                assert change[y, x] == 0
            x, y = np.rint(nose).astype(int)
            assert change[y, x] > 0


def test_a_change_is_masked_and_mixed_between_key_frames(facegan):
    crops, looks = faces(2)
    before, after = observe(facegan.ager, crops, looks)
    (first,) = facegan.ager.draw(looks[0], before, before, 0)
    assert first.gain is None
    np.testing.assert_array_equal(first.delta, before * face_mask(128))
    for edge in (first.delta[:, :2], first.delta[:, -2:], first.delta[..., :2], first.delta[..., -2:]):
        assert not edge.any()
    (mixed,) = facegan.ager.draw(looks[0], before, after, 0.25)
    np.testing.assert_allclose(mixed.delta, (0.75 * before + 0.25 * after) * face_mask(128), atol=1e-6)
    assert facegan.ager.observe([], [crops[:0]], []) == []


def test_an_engine_is_loaded_once_when_the_first_face_needs_its_size(tiny_facegan, facegan):
    programs, loaded = model_programs(find_model(tiny_facegan)), []

    def load(role):
        loaded.append(role)
        return EngineStore().load(programs[role])

    ager = FaceGAN(unet=lambda size: load(f"unet-{size}"), view=facegan.ager.views[0])
    assert loaded == []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: observe(ager, *faces(1, 128, seed)), range(8)))
    assert loaded == ["unet-128"]


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

    for name, value in (("composite", "replace"), ("latent", LatentConfig())):
        message = f"model tiny-facegan has no option {name}; leave it out, or use --model age-cgan"
        with pytest.raises(UnsupportedError, match=message):
            load_networks(model=tiny_facegan, **{name: value})


def test_a_template_that_this_version_does_not_know_is_refused(facegan_checkpoint, tmp_path):
    header, weights = load(facegan_checkpoint, "facegan")
    assert read_view(facegan_checkpoint, [128, 192]) == View("face", TEMPLATE_5, (128, 192))
    header.dims["template"] = "hand"
    save(tmp_path / "facegan.safetensors", weights, header)
    with pytest.raises(
        CheckpointError, match='template "hand", this version knows face, whole face, head; update faceage'
    ):
        read_view(tmp_path / "facegan.safetensors", [128])
