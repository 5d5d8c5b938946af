"""The space model: what is mixed for a person, where it is drawn, and what it leaves alone."""

from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from faceage.agers.base import mix_changes
from faceage.agers.canonical import CANONICAL_PX, SMOOTHED, hats, limit, read_canonical
from faceage.agers.facegan import FaceGAN
from faceage.agers.hair import draw_hair, find_brows, find_hair, grey_amount
from faceage.agers.space import (
    CLOSE_GAIN,
    DRAWN_CHROMA,
    DRAWN_GAIN,
    DRAWN_REACH_OVER_YEARS,
    DRAWN_REACH_YEARS,
    EVEN_SHARE,
    FACE_SIZES_PX,
    HEAD_SIZES_PX,
    STEADY_KEYS,
    YOUNGER_PX,
    YOUNGER_SHARE,
    SpaceAger,
)
from faceage.errors import UnsupportedError
from faceage.geometry import TEMPLATES, template_5
from faceage.kernels import BLACK_OFFSET, RGB_LUMA, change_crop
from faceage.models import find_model
from faceage.pipeline.photos import age_frames
from faceage.pipeline.request import AgeRequest, load_networks
from faceage.types import RGB, Appearance, Crops, Frame, View


@pytest.fixture(scope="module")
def canonical():
    return read_canonical(find_model("space").generator)


@pytest.fixture(scope="module")
def space(tiny_model):
    """The bundled space model, loaded once."""
    return load_networks(model="space")


@pytest.fixture
def appearance():
    random = np.random.default_rng(0)
    embedding = random.normal(size=128).astype(np.float32)
    thumbnail = random.uniform(-0.2, 0.4, (3, 16, 16)).astype(np.float32)
    return Appearance(embedding=embedding / np.linalg.norm(embedding), thumbnail=thumbnail)


def portrait():
    return Frame(planes=(np.ascontiguousarray(astronaut()),), pixel_format="rgb24", color=RGB)


def aged(networks, **request):
    frame = portrait()
    (photo,) = age_frames(networks, [frame], AgeRequest(**request))
    return frame.planes[0].astype(int), photo


def test_no_years_change_nothing(canonical, appearance):
    assert not canonical.mix(appearance, 40, 40).any()


def test_older_faces_get_creases_and_younger_ones_lose_detail(canonical, appearance):
    older, younger = canonical.mix(appearance, 30, 75), canonical.mix(appearance, 60, 25)
    assert older.shape == (CANONICAL_PX, CANONICAL_PX, 4)
    lumas = [tone[..., 0] for tone in (older, younger)]
    fine = [np.abs(luma - cv2.GaussianBlur(luma, (0, 0), 4)).mean() / np.abs(luma).mean() for luma in lumas]
    assert fine[0] > 1.4 * fine[1]
    assert not older[..., 3].any()
    assert younger[..., 3].max() == pytest.approx(SMOOTHED)


def test_creases_are_those_of_the_nearest_old_faces(canonical, appearance):
    covariates = canonical.basis(appearance.thumbnail[None], appearance.embedding[None], np.array([30], np.float32))[0]
    columns = np.array([60, 105, 150, 195])
    lines = np.zeros((len(columns), CANONICAL_PX, CANONICAL_PX), np.float32)
    for face, x in enumerate(columns):
        lines[face, 70:90, x] = -0.02

    def darker(*off):
        few = replace(canonical, wrinkles=lines, wrinkle_covariates=covariates + np.float32(off)[:, None])
        none = replace(few, wrinkles=0 * lines)
        tones = [model.mix(appearance, 30, 75)[75:85, columns, 0] for model in (none, few)]
        return (tones[0] - tones[1]).mean(0)

    one, other = darker(0.3, 0.1, 2.0, 0.2), darker(0.1, 0.3, 2.0, 0.2)
    assert one[[0, 1, 3]].min() > 1e-3
    assert one[2] == other[2] == 0
    assert one[1] > other[1]
    assert one[0] < other[0]


def test_dark_detail_of_old_skin_is_redder(canonical, appearance):
    tone = canonical.mix(appearance, 30, 75)
    cheek = tone[140:170, 60:100].reshape(-1, 4)
    assert np.corrcoef(cheek[:, 0], cheek[:, 1])[0, 1] < -0.5
    assert np.corrcoef(cheek[:, 0], cheek[:, 2])[0, 1] > 0.5


def test_in_bluish_light_creases_are_not_red_like_scars(canonical, appearance):
    slopes = []
    for colour in ((0.5, 0.1, -0.1), (0.1, 0.05, 0.1)):
        lit = np.broadcast_to(np.float32(colour)[:, None, None], (3, 16, 16)) + 0.02 * appearance.thumbnail
        tone = canonical.mix(replace(appearance, thumbnail=lit), 30, 75)[140:170, 60:100]
        fine = tone - cv2.GaussianBlur(tone, (0, 0), 3)
        slopes.append(float((fine[..., 0] * fine[..., 1]).sum() / np.square(fine[..., 0]).sum()))
    assert slopes[0] < -0.2
    assert slopes[0] < slopes[1] - 0.1


@pytest.mark.parametrize("ages", [{"age": 75, "source_age": 30}, {"age": 25, "source_age": 60}])
def test_black_and_white_stays_so(space, ages):
    grey = np.repeat(np.rint(astronaut() @ RGB_LUMA)[..., None], 3, -1).astype(np.uint8)
    frame = Frame(planes=(grey.copy(),), pixel_format="rgb24", color=RGB)
    age_frames(space, [frame], AgeRequest(**ages))
    assert np.abs(frame.planes[0].astype(int) - grey).max() > 20
    assert np.ptp(frame.planes[0].astype(int), axis=-1).max() <= 1


def test_the_canonical_change_is_zero_at_the_outline(canonical, appearance):
    tone = canonical.mix(appearance, 30, 80)
    assert not tone[canonical.areas.mask == 0].any()
    assert not tone[[0, -1]].any()
    assert not tone[:, [0, -1]].any()


def test_changes_are_limited_softly():
    x = np.array([-10, -0.01, 0, 0.01, 10], np.float32)
    np.testing.assert_allclose(limit(x, 0.3, 0.1), [-0.3, -0.01, 0, 0.01, 0.1], rtol=0.01, atol=1e-6)


def test_hats_interpolate_and_stop_at_the_last_knots():
    ages = np.array([10, 14, 19, 24, 90], np.float32)
    basis = hats(ages)
    np.testing.assert_allclose(basis.sum(1), 1)
    np.testing.assert_allclose(basis[2, :2], [0.5, 0.5])
    assert basis[0, 0] == basis[1, 0] == basis[4, -1] == 1


@pytest.mark.parametrize(("source", "low", "high"), [(25, 0.55, 0.75), (60, 0.3, 0.6)])
def test_hair_greys_with_age_and_only_by_what_it_is_not_yet(source, low, high):
    amounts = [grey_amount(source, target) for target in (source, source + 5, 70, 85)]
    assert amounts[0] == 0
    assert amounts == sorted(amounts)
    assert low < amounts[2] < high
    assert grey_amount(70, 30) == 0


def head(hair_luma, size=160):
    """A head crop: grey skin below, striped brown hair above; and the logits of a network that is sure of it."""
    rgb = np.full((size, size, 3), 0.6, np.float32)
    stripes = 0.02 * np.sin(np.arange(size) * 2)[None, :, None]
    rgb[: size // 3] = hair_luma * np.array([1.2, 1.0, 0.7]) + stripes
    logits = np.full((size // 2, size // 2), -12, np.float32)
    logits[: size // 6] = 12
    return (rgb.transpose(2, 0, 1) * 2 - 1).astype(np.float32), logits


def test_dark_hair_turns_grey_and_keeps_its_strands():
    pixels, logits = head(0.15)
    key = find_hair(pixels, logits, 0.5)
    after = (change_crop(pixels, draw_hair(0.8, key, key, 0.0)).transpose(1, 2, 0) + 1) / 2
    before = (pixels.transpose(1, 2, 0) + 1) / 2
    part = (slice(36, 50), slice(60, 100))
    luma = [(picture @ RGB_LUMA)[part] for picture in (before, after)]
    assert luma[1].mean() > luma[0].mean() + 0.1
    assert luma[1].std() > luma[0].std()
    colour = [np.abs(picture - (picture @ RGB_LUMA)[..., None])[part].mean() for picture in (before, after)]
    assert colour[1] < 0.5 * colour[0]
    np.testing.assert_allclose(after[90:150], before[90:150], atol=2e-3)  # skin


def test_the_light_on_locks_of_dark_hair_is_not_evened_out():
    pixels, logits = head(0.15)
    pixels[:, : 160 // 3] += 0.06 * np.sin(np.arange(160) * 2 * np.pi / 20).astype(np.float32)
    key = find_hair(pixels, logits, 0.5)
    before, after = (
        cv2.GaussianBlur(np.tensordot(RGB_LUMA, each, 1), (0, 0), 2)[30:44, 50:110].mean(0).std()
        for each in (pixels, change_crop(pixels, draw_hair(1.0, key, key, 0.0)))
    )
    assert after > 2.5 * before


def test_white_hair_has_less_contrast_than_grey():
    pixels, logits = head(0.15)
    gains = [find_hair(pixels, logits, grey).gain[30:44, 60:100].mean() for grey in (0.0, 0.7, 0.9, 1.0)]
    assert gains[0] == gains[1] > gains[2] > gains[3] > 0.4 * gains[0]


def test_red_cloth_behind_hair_stays_red():
    pixels, logits = head(0.15)
    pixels[:, : 160 // 3, 96:] = 2 * np.array([0.5, 0.1, 0.15], np.float32)[:, None, None] - 1
    mask = find_hair(pixels, logits, 0.5).mask
    assert mask[30:48, 60:90].min() > 0.6
    assert not mask[30:48, 100:120].any()
    pixels[:, : 160 // 3, 96:] = 2 * np.array([0.8, 0.3, 0.1], np.float32)[:, None, None] - 1  # red hair
    assert find_hair(pixels, logits, 0.5).mask[30:48, 100:120].min() > 0.6


def test_grey_hair_has_the_colour_of_the_light():
    """Skin in bluish light: neutral grey would look yellow beside it."""
    size, seen = 160, []
    logit = np.full((80, 80), -9, np.float32)
    logit[20:40, 30:50] = 9
    for skin in ((0.55, 0.48, 0.54), (0.6, 0.44, 0.36)):
        rgb = np.full((size, size, 3), skin, np.float32)
        rgb[40:80, 60:100] = 0.1
        rgb[64:84, 64:96] = skin
        key = find_hair(2 * rgb.transpose(2, 0, 1) - 1, logit, 1.0)
        change = draw_hair(1.0, key, key, 0.0)
        aged = change_crop(2 * rgb.transpose(2, 0, 1) - 1, change)
        red, green, blue = (aged[:, 44:60, 66:94].mean((1, 2)) + 1) / 2
        seen.append((red / green, blue / green))
    (_, bluish), (reddish, warm) = seen
    assert bluish > 1.04
    assert reddish > 1.04
    assert warm < 0.96


def test_bright_hair_is_not_darkened():
    pixels, logits = head(0.8)
    key = find_hair(pixels, logits, 0.5)
    after = change_crop(pixels, draw_hair(1.0, key, key, 0.0))
    luma = [np.tensordot(RGB_LUMA, picture, 1)[36:50, 60:100].mean() for picture in (pixels, after)]
    assert luma[1] > luma[0] - 0.01


def test_the_hair_of_the_rim_is_left_alone():
    pixels, logits = head(0.15)
    key = find_hair(pixels, np.full_like(logits, 12), 0.5)
    change = draw_hair(1.0, key, key, 0.0)
    for part in (change.gain, *change.delta):
        for rim in (part[:2], part[-2:], part[:, :2], part[:, -2:]):
            assert not rim.any()


def test_all_of_the_head_s_own_hair_is_found_and_none_of_its_neighbour_s():
    pixels, logits = head(0.15)
    logits[:] = -12
    logits[7:30, 28:52] = 12  # up to the crown
    logits[30:60, 10:18] = 12  # beside the face, and apart from it
    pixels[:, 14:120, 20:104] = -0.7
    mask = find_hair(pixels, logits, 0.5).mask
    assert mask[18:55, 60:100].min() > 0.6
    assert not mask[60:120, 16:40].any()
    logits[30:36, 10:52] = 12  # now it hangs together
    assert find_hair(pixels, logits, 0.5).mask[70:110, 26:30].min() > 0.6


def striped(pixels, logits):
    """The same head with bright strands in its hair."""
    pixels = pixels.copy()
    pixels[:, : 160 // 3, ::4] += 0.2
    return pixels, logits


def test_strands_are_drawn_on_black_hair_that_shows_none():
    pixels, logits = head(0.15)
    pixels[:, : 160 // 3] = -0.95
    key = find_hair(pixels, logits, 0.5)
    after = np.tensordot(RGB_LUMA, change_crop(pixels, draw_hair(0.8, key, key, 0.0)), 1)
    assert after[25:45, 50:110].std() > 0.02
    drawn = [
        find_hair(*picture, 0.5).lift[25:45, 50:110].std() for picture in ((pixels, logits), striped(pixels, logits))
    ]
    assert drawn[0] > 0.02
    assert drawn[1] < 0.01 + 0.5 * drawn[0]


def test_of_the_brows_area_what_is_dark_turns_grey():
    rgb = np.full((128, 128, 3), (0.7, 0.55, 0.45), np.float32)
    rgb[40:46, 20:60] = (0.2, 0.15, 0.1)
    area = np.zeros((128, 128), np.float32)
    area[34:52, 14:114] = 1
    key = find_brows(rgb, area)
    pixels = (rgb.transpose(2, 0, 1) * 2 - 1).astype(np.float32)
    rise = np.tensordot(RGB_LUMA, change_crop(pixels, draw_hair(0.7, key, key, 0.0)) - pixels, 1)
    assert rise[41:45, 25:55].min() > 0.1
    assert np.abs(rise[36:50, 75:110]).max() < 0.01  # skin of the area
    assert not rise[60:].any()


def test_hair_moves_from_key_frame_to_key_frame():
    key = find_hair(*head(0.15), 0.5)
    left, top, right, bottom = key.part
    moved = replace(key, mask=np.roll(key.mask, 16, 0), part=(left, top, right, bottom + 16))
    ends, half = [draw_hair(1.0, one, one, 0.0) for one in (key, moved)], draw_hair(1.0, key, moved, 0.5)
    np.testing.assert_allclose(draw_hair(1.0, key, moved, 0.0).delta, ends[0].delta, atol=1e-6)
    np.testing.assert_allclose(half.gain, (ends[0].gain + ends[1].gain) / 2, atol=1e-6)


def test_two_looks_of_moving_hair_are_mixed_for_the_same_samples():
    key = find_hair(*head(0.15), 0.5)
    looks = [draw_hair(grey, key, replace(key), 0.5) for grey in (0.4, 0.8)]
    (mixed,) = mix_changes(looks[:1], looks[1:], 0.5)
    want = draw_hair(0.6, key, replace(key), 0.5)
    assert mixed.dark == want.dark is not None
    np.testing.assert_allclose(mixed.gain, want.gain, atol=1e-6)


def test_what_is_bright_where_hair_was_is_not_lit():
    pixels, logits = head(0.15)
    key = find_hair(pixels, logits, 0.5)
    gone = np.full_like(pixels, pixels[0, -1, 0])  # skin or wall where the hair was
    np.testing.assert_allclose(change_crop(gone, draw_hair(1.0, key, replace(key), 0.5)), gone, atol=1e-3)


OLDER_PX = 160


def nothing(faces, now, wanted):
    """A network that draws no change."""
    return (np.zeros_like(faces),)


def canned(coordinates, canonical, unet=nothing, older=nothing):
    """An ager whose coordinate network gives the same map for everybody; no hair."""
    view = View("face", TEMPLATES["whole face"], FACE_SIZES_PX)
    return SpaceAger(
        coordinates=lambda x, landmarks: (np.repeat(coordinates[None], len(x), 0),),
        hair=None,
        younger=FaceGAN(unet=lambda size_px: unet, view=View("face", TEMPLATES["face"], (YOUNGER_PX,))),
        older=lambda: older,
        older_view=View("whole face", TEMPLATES["whole face"], (OLDER_PX,)),
        canonical=canonical,
        views=(view,),
    )


@pytest.mark.parametrize("size", FACE_SIZES_PX)
def test_the_change_is_drawn_where_the_coordinates_say(canonical, appearance, size):
    axis = (np.arange(64, dtype=np.float32) + 0.5) / 64
    x, y = np.meshgrid(axis, axis)
    crops = Crops(
        pixels=np.random.default_rng(0).uniform(-1, 1, (1, 3, size, size)).astype(np.float32),  # sharp
        landmarks=template_5(size, TEMPLATES["whole face"])[None],
        frame_to_crop=np.eye(2, 3, dtype=np.float32)[None],
    )
    gains = []
    for shift in (0.0, 0.125):
        ager = canned(np.stack([x + shift, y]), canonical)
        (look,) = ager.look([appearance], np.array([30], np.float32), np.array([75], np.float32))
        (key,) = ager.observe([look], [crops], [None])
        (change,) = ager.draw(look, key, key, 0.0)
        gains.append(change.gain)
    expected = np.expm1(cv2.resize(look.tone[..., 0], (size, size), interpolation=cv2.INTER_AREA))
    inner = slice(size // 8, -size // 8)
    assert np.corrcoef(gains[0][inner, inner].ravel(), expected[inner, inner].ravel())[0, 1] > 0.95
    moved = np.roll(gains[0], -size // 8, 1)
    # The map is sampled anew, so the two agree but for interpolation.
    assert np.corrcoef(gains[1][inner, inner].ravel(), moved[inner, inner].ravel())[0, 1] > 0.98


def test_chroma_changes_without_luma(canonical, appearance):
    tone = canonical.mix(appearance, 30, 75)
    colours = np.full((32, 32, 3), (0.7, 0.5, 0.4), np.float32)
    delta = SpaceAger._chroma(tone, colours)
    assert np.abs(delta).max() > 0.01
    assert np.abs(delta @ RGB_LUMA).max() < 1e-5


def test_a_portrait_is_aged_and_the_rest_of_it_is_left_alone(space):
    before = astronaut().astype(int)
    older, photo = aged(space, age=75, source_age=30)
    assert np.abs(older - before).max() > 20
    assert 0.3 < photo.identity[0] < 0.99
    # The bottom of the picture is neither face nor hair.
    assert (older[400:] == before[400:]).all()


def test_hair_turns_grey_or_not(space):
    with_hair, photo = aged(space, age=80, source_age=30)
    frame = portrait()
    age_frames(load_networks(model="space", hair=False), [frame], AgeRequest(age=80, source_age=30))
    x, y = photo.faces.landmarks[0].mean(0)
    eyes = np.linalg.norm(photo.faces.landmarks[0][1] - photo.faces.landmarks[0][0])
    above = (slice(int(y - 2.6 * eyes), int(y - 1.9 * eyes)), slice(int(x - eyes / 2), int(x + eyes / 2)))
    assert (frame.planes[0][above] == astronaut()[above]).all()
    saturation = [np.ptp(picture[above], axis=-1).mean() for picture in (with_hair, astronaut().astype(int))]
    assert saturation[0] < 0.8 * saturation[1]


def test_hair_is_an_option_of_this_model_alone():
    with pytest.raises(UnsupportedError, match="has no option hair; leave it out, or use --model space"):
        load_networks(model="facegan", hair=False)


def test_younger_skin_is_smoother(space):
    before = astronaut().astype(int)
    younger, photo = aged(space, age=20, source_age=55)
    (x0, y0), (x1, y1) = photo.faces.landmarks[0][0], photo.faces.landmarks[0][4]
    inside = (slice(int(y0) + 8, int(y1)), slice(int(x0), int(x1)))
    detail = [
        np.abs(luma - cv2.GaussianBlur(luma, (0, 0), 2)).mean()
        for luma in ((picture[inside] @ RGB_LUMA).astype(np.float32) for picture in (before, younger))
    ]
    assert detail[1] < detail[0]


def test_creases_are_sharper_in_close_ups(canonical, appearance):
    axis = (np.arange(64, dtype=np.float32) + 0.5) / 64
    ager = canned(np.stack(np.meshgrid(axis, axis)), canonical)
    fine = []
    for side in (200, 300, 500):
        for source, target in ((30, 75), (60, 25)):
            (look,) = ager.look([appearance], np.array([source], np.float32), np.array([target], np.float32))
            scale = np.float32(256 / side)
            crops = Crops(
                pixels=np.random.default_rng(0).uniform(-1, 1, (1, 3, 256, 256)).astype(np.float32),
                landmarks=template_5(256, TEMPLATES["whole face"])[None],
                frame_to_crop=np.array([[[scale, 0, 0], [0, scale, 0]]], np.float32),
            )
            (key,) = ager.observe([look], [crops], [None])
            (change,) = ager.draw(look, key, key, 0.0)
            fine.append(np.abs(change.gain - cv2.GaussianBlur(change.gain, (0, 0), 2)).mean())
    small, middle, large = fine[::2]
    assert 1.1 * small < middle < large < 2.5 * small
    assert fine[1] == fine[3] == fine[5]


def ramps(size, count):
    """Crops of `count` faces that get brighter to the right."""
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    return Crops(
        pixels=np.broadcast_to(ramp, (count, 3, size, size)).copy(),
        landmarks=np.repeat(template_5(size, TEMPLATES["whole face"])[None], count, 0),
        frame_to_crop=np.repeat(np.eye(2, 3, dtype=np.float32)[None], count, 0),
    )


def watched(change, asked):
    """A network that draws the same change on all faces [3, 1 or S, S], and what it is asked for."""

    def network(faces, now, wanted):
        asked.extend(zip(faces, now.tolist(), wanted.tolist(), strict=True))
        return (np.broadcast_to(change, faces.shape).astype(np.float32),)

    return network


def drawn(ager, appearance, crops, source, target):
    looks = ager.look([appearance] * len(source), np.float32(source), np.float32(target))
    keys = ager.observe(looks, [crops], [None] * len(source))
    return [ager.draw(look, key, key, 0.0)[0] for look, key in zip(looks, keys, strict=True)]


@pytest.fixture
def straight():
    """Coordinates of a face that lies like the canonical one."""
    axis = (np.arange(64, dtype=np.float32) + 0.5) / 64
    return np.stack(np.meshgrid(axis, axis))


@pytest.mark.parametrize("size", FACE_SIZES_PX)
def test_younger_faces_get_a_share_of_facegan_s_change(canonical, appearance, straight, size):
    asked = []
    changes = [
        drawn(canned(straight, canonical, unet), appearance, ramps(size, 2), [60, 30], [25, 75])
        for unet in (nothing, watched(np.float32(0.2), asked))
    ]
    ((pixels, *ages),) = asked  # older faces do not ask it
    assert ages == [60, 25]
    # The crop "face" is the middle 0.8 of the crop "whole face".
    assert pixels[0, 64, [0, -1]] == pytest.approx([-0.8, 0.8], abs=0.03)
    younger, older = (ager[1].delta - ager[0].delta for ager in zip(*changes, strict=True))
    row, cheek = int(0.6 * size), int(0.65 * size)
    assert younger[:, row, cheek] == pytest.approx(0.2 * YOUNGER_SHARE, rel=0.05)
    assert np.abs(younger[:, : int(0.1 * size)]).max() == 0
    assert not older.any()


@pytest.mark.parametrize(("source", "target"), [(20, 21), (59, 61), (80, 90), (88, 95)])
def test_a_few_years_are_a_small_step_at_every_age(canonical, appearance, straight, source, target):
    asked = []
    network = watched(np.zeros((3, 1, 1), np.float32), asked)
    drawn(canned(straight, canonical, older=network), appearance, ramps(128, 1), [source], [target])
    ((_, now, wanted),) = asked
    assert now == source
    assert max(60, target) <= wanted <= max(60, target + 0.5 * (target - source))


@pytest.mark.parametrize("size", FACE_SIZES_PX)
def test_older_faces_get_what_their_network_draws_inside_the_face(canonical, appearance, straight, size):
    asked, log_luma, log_red = [], np.float32(-0.05), np.float32(0.04)
    change = np.stack([np.full((OLDER_PX, OLDER_PX), each) for each in (log_luma, log_red, 0)])
    plain = replace(canonical, wrinkles=0 * canonical.wrinkles)
    none, some = (
        drawn(canned(straight, plain, older=network), appearance, ramps(size, 3), [60, 30, 30], [25, 75, 45])
        for network in (nothing, watched(change, asked))
    )
    # It draws what lies beyond; for 45 what it does at 60, and a part of it is taken.
    assert [ages for _, *ages in asked] == [[30, 75 + DRAWN_REACH_YEARS], [30, 60]]
    assert asked[0][0][0, 80, [0, -1]] == pytest.approx([-1, 1], abs=0.03)
    row, cheek = int(0.6 * size), int(0.65 * size)
    gains = [a.gain - b.gain for a, b in zip(some, none, strict=True)]
    assert not gains[0].any()
    part = (15 + DRAWN_REACH_YEARS * 15 / DRAWN_REACH_OVER_YEARS) / 30
    for gain, share in zip(gains[1:], (1, part), strict=True):
        assert gain[row, cheek] == pytest.approx(np.expm1(DRAWN_GAIN * share * log_luma), rel=0.05)
        assert not gain[: int(0.02 * size)].any()
    delta = (some[1].delta - none[1].delta)[:, row, cheek]
    assert delta @ RGB_LUMA == pytest.approx(0, abs=1e-4)
    grey = 2 * 0.65 * (size + 1) / size / 2 + BLACK_OFFSET  # luma of the ramp
    assert delta[0] - delta[1] == pytest.approx(2 * grey * DRAWN_CHROMA * log_red, rel=0.15)


def test_close_ups_are_seen_softer_and_get_more(canonical, appearance, straight):
    """The network has learned from pictures of small faces."""
    log_luma, pixels = np.float32(-0.05), np.random.default_rng(0).uniform(-1, 1, (1, 3, 256, 256)).astype(np.float32)
    change = np.stack([np.full((OLDER_PX, OLDER_PX), each, np.float32) for each in (log_luma, 0, 0)])
    plain = replace(canonical, wrinkles=0 * canonical.wrinkles)
    gains, detail = [], []
    for zoom in (1.0, 0.5):  # sides of 256 and of 512 pixels in the frame
        asked = []
        crops = replace(
            ramps(256, 1), pixels=pixels, frame_to_crop=np.array([[[zoom, 0, 0], [0, zoom, 0]]], np.float32)
        )
        (made,) = drawn(canned(straight, plain, older=watched(change, asked)), appearance, crops, [30], [75])
        gains.append(float(made.gain[154, 166]))
        detail.append(asked[0][0].std())
    assert gains[0] == pytest.approx(np.expm1(DRAWN_GAIN * log_luma), rel=0.05)
    assert gains[1] == pytest.approx(np.expm1(CLOSE_GAIN * log_luma), rel=0.05)
    assert detail[1] < 0.6 * detail[0]


def half_patched(sigma):
    """A change [3, S, S] of one cheek alone: log luma is 0.1 less in its middle; so many pixels wide."""
    y, x = np.mgrid[:OLDER_PX, :OLDER_PX].astype(np.float32)
    change = np.zeros((3, OLDER_PX, OLDER_PX), np.float32)
    change[0] = -0.1 * np.exp(-0.5 * ((x - 52) ** 2 + (y - 90) ** 2) / sigma**2)
    return change


@pytest.mark.parametrize(("turn", "other"), [(0, 108), (0.06, 88)])
def test_what_is_wide_is_evened_out_between_the_halves_of_a_face(canonical, appearance, straight, turn, other):
    """Lines are not: they are somewhere else on the other half. The second face lies further left in its crop."""
    turned = straight + np.float32([turn, 0])[:, None, None]
    plain = replace(canonical, wrinkles=0 * canonical.wrinkles)
    gains = {
        sigma: drawn(
            canned(turned, plain, older=watched(half_patched(sigma), [])), appearance, ramps(128, 1), [30], [75]
        )[0].gain
        for sigma in (9, 1)
    }
    row = int(90.5 * 128 / OLDER_PX)
    ratio = {
        sigma: gain[row, int((other + 0.5) * 128 / OLDER_PX)] / gain[row, int(52.5 * 128 / OLDER_PX)]
        for sigma, gain in gains.items()
    }
    assert ratio[9] == pytest.approx(EVEN_SHARE / (1 - EVEN_SHARE), rel=0.25)
    assert abs(ratio[1]) < 0.1


def spots(seed, softness):
    """A change of luma [3, S, S] with blots about so many pixels wide, of a deviation of 0.05."""
    noise = np.random.default_rng(seed).normal(size=(OLDER_PX, OLDER_PX)).astype(np.float32)
    luma = cv2.GaussianBlur(noise, (0, 0), softness)
    return np.stack([luma * (0.05 / luma.std()), 0 * luma, 0 * luma])


def seen_in_turn(canonical, appearance, coordinates, changes, crops):
    """The keys of a face of 30 that becomes 75, with these coordinates, drawings and crops at key frames in turn."""
    keys = [None]
    for where, change, crop in zip(coordinates, changes, crops, strict=True):
        ager = canned(where, canonical, older=watched(change, []))
        looks = ager.look([appearance], np.float32([30]), np.float32([75]))
        keys += ager.observe(looks, [crop], keys[-1:])
    return keys[1:]


@pytest.mark.parametrize("softness", [1, 8])
def test_what_is_drawn_by_chance_at_one_key_frame_is_steadied_by_those_before(
    canonical, appearance, straight, softness
):
    changes = [spots(0, softness) + 0.6 * spots(seed, softness) for seed in range(1, 8)]
    args = canonical, appearance, [straight] * 7, changes, [ramps(128, 1)] * 7
    steady = [key.older[..., 0] for key in seen_in_turn(*args)]
    alone = [key.drawings[0].change[..., 0] for key in seen_in_turn(*args)]
    np.testing.assert_array_equal(steady[0], alone[0])  # so it is in a photo
    inner = slice(40, 120), slice(40, 120)
    steps = [np.std([(b - a)[inner] for a, b in pairwise(each[STEADY_KEYS:])]) for each in (steady, alone)]
    assert steps[0] < 0.6 * steps[1]
    if softness == 1:  # fine lines are as strong as they were drawn
        strengths = [np.std([drawing[inner] for drawing in each]) for each in (steady, alone)]
        assert strengths[0] == pytest.approx(strengths[1], rel=0.05)


def test_steadied_drawings_stay_on_the_skin_and_are_of_the_same_picture(canonical, appearance, straight):
    still, off = spots(0, 2), 4
    moved = np.roll(still, off, 2)
    there = straight - np.float32([off / OLDER_PX * 1.2, 0])[:, None, None]
    inner = slice(50, 110), slice(50, 110)

    def second(where, crop):
        args = [straight, where], [still, moved], [ramps(128, 1), crop]
        return seen_in_turn(canonical, appearance, *args)[1]

    bright = Crops(**{**vars(ramps(128, 1)), "pixels": ramps(128, 1).pixels.clip(0.9)})
    errors = []
    for key in (second(there, ramps(128, 1)), second(straight, ramps(128, 1)), second(straight, bright)):
        own = key.drawings[0].change[..., 0]
        errors.append(np.abs(key.older[..., 0] - own)[inner].mean() / np.abs(own[inner]).mean())
    assert errors[0] < 0.1  # it has moved with the face
    assert errors[1] > 0.4
    assert errors[2] < 0.6 * errors[1]  # most of the face looks otherwise


def test_keys_mix_linearly_in_time(space):
    frame = portrait()
    faces = space.detector.detect([frame])
    from faceage.align import prepare_crops

    ager = space.ager
    crops = [
        prepare_crops([frame], faces.frame_index, faces.landmarks, view, size)
        for view, size in zip(ager.views, (128, HEAD_SIZES_PX[0]), strict=True)
    ]
    (look,) = ager.look(space.sample_appearances([frame], faces)[:1], np.array([30.0]), np.array([75.0]))
    (key,) = ager.observe([look], [crop[:1] for crop in crops], [None])
    twin = replace(key, coordinates=key.coordinates.copy())
    once, mixed = ager.draw(look, key, key, 0.0), ager.draw(look, key, twin, 0.3)
    for a, b in zip(once, mixed, strict=True):
        np.testing.assert_allclose(a.gain, b.gain, atol=1e-5)
        np.testing.assert_allclose(a.delta, b.delta, atol=1e-5)


def test_creases_are_as_sharp_as_the_face(canonical, appearance):
    axis = (np.arange(64, dtype=np.float32) + 0.5) / 64
    strong = replace(canonical, wrinkles=2 * canonical.wrinkles)  # so that they are most of the fine detail
    ager = canned(np.stack(np.meshgrid(axis, axis)), strong)
    (look,) = ager.look([appearance], np.array([30], np.float32), np.array([75], np.float32))
    sharp = np.random.default_rng(0).uniform(-1, 1, (3, 128, 128)).astype(np.float32)
    blurred = cv2.GaussianBlur(sharp.transpose(1, 2, 0), (0, 0), 3).transpose(2, 0, 1)
    detail = []
    for pixels in (sharp, blurred):
        crops = Crops(
            pixels=pixels[None],
            landmarks=template_5(128, TEMPLATES["whole face"])[None],
            frame_to_crop=np.eye(2, 3, dtype=np.float32)[None],
        )
        (key,) = ager.observe([look], [crops], [None])
        (change,) = ager.draw(look, key, key, 0.0)
        detail.append(np.abs(change.gain - cv2.GaussianBlur(change.gain, (0, 0), 1)).mean())
    assert detail[1] < 0.75 * detail[0]
