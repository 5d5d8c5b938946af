"""The whole path on real codecs and real networks: what changes, and that nothing else does."""

from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from clips import frame_times, packets_of
from skimage.data import astronaut

from faceage.align import choose_size, prepare_crops
from faceage.geometry import TEMPLATE_5, invert_affine, template_5
from faceage.media.video import EncodeOptions, VideoReader
from faceage.pipeline.photos import age_frames, age_photos
from faceage.pipeline.plan import KEY_EVERY_FRAMES
from faceage.pipeline.render import DRAWN_BETWEEN, decide
from faceage.pipeline.request import AgeRequest
from faceage.pipeline.scan import scan
from faceage.pipeline.sheet import make_sheet
from faceage.pipeline.video import age_video
from faceage.types import RGB, Change, Crops, Frame, View

FRAMES = 30
LOSSLESS = EncodeOptions(codec="ffv1", overwrite=True)


def write_clip(path, pictures, pts=None, codec="libx264", tone=True):
    """Encode RGB pictures; times are irregular unless given."""
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, 25, options={"crf": "12"} if codec == "libx264" else {})
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.time_base = Fraction(1, 12800)
        video.codec_context.time_base = video.time_base
        sound = out.add_stream("aac", 44100, layout="mono") if tone else None
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = (
                (pts or [512 * i + 40 * (i % 3) for i in range(len(pictures))])[i],
                video.time_base,
            )
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if sound is not None:
            samples = (0.1 * np.sin(np.arange(44100) / 30))[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 0
            out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def moving_face(count=FRAMES, side=256):
    portrait = astronaut()
    return [
        cv2.warpAffine(portrait, np.float32([[0.9, 0, -80 + 0.8 * i], [0, 0.9, -5]]), (side, side), borderMode=1)
        for i in range(count)
    ]


def decoded(path):
    with VideoReader(path) as reader:
        return [[plane.copy() for plane in frame.planes] for frame in reader]


@pytest.fixture(params=["networks", "facegan"])
def either(request):
    """The loaded networks of each architecture."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "face.mkv", moving_face())


def test_only_the_face_changes_and_everything_else_is_kept(either, clip, tmp_path):
    target = tmp_path / "aged.mkv"
    report = age_video(either, clip, target, AgeRequest(age=70, source_age=30), encode=LOSSLESS)
    assert report.frames == FRAMES
    assert report.frames_with_faces == FRAMES
    (person,) = report.people
    assert (person.first_frame, person.last_frame) == (0, FRAMES - 1)
    assert frame_times(target) == frame_times(clip)
    assert [bytes(p) for p in packets_of(target, "audio")] == [bytes(p) for p in packets_of(clip, "audio")]

    with VideoReader(clip) as reader:
        (tracked,) = decide(either, scan(either, reader), AgeRequest(age=70, source_age=30))
    (size,) = tracked.sizes_px
    assert size in either.ager.views[0].sizes_px
    corners = np.float32([[-0.5, -0.5], [size - 0.5, -0.5], [size - 0.5, size - 0.5], [-0.5, size - 0.5]])
    for i, (before, after) in enumerate(zip(decoded(clip), decoded(target), strict=True)):
        inside = np.zeros(before[0].shape, np.uint8)
        crop_to_frame = invert_affine(tracked.frame_to_crop[0][i])
        polygon = corners @ crop_to_frame[:, :2].T + crop_to_frame[:, 2]
        cv2.fillConvexPoly(inside, np.round(polygon).astype(np.int32), 1)
        changed = before[0] != after[0]
        assert changed.any(), f"frame {i} is as it was"
        assert not (changed & (inside == 0)).any(), f"frame {i} changed outside the face"


def test_strength_zero_gives_back_every_sample(either, clip, tmp_path):
    target = tmp_path / "same.mkv"
    report = age_video(either, clip, target, AgeRequest(by=40, strength=0), encode=LOSSLESS)
    assert len(report.people) == 1
    for before, after in zip(decoded(clip), decoded(target), strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_change_is_steady(bundled, tmp_path):
    """On a still picture with constant pose every frame gets the same change, on and between key frames."""
    still = write_clip(
        tmp_path / "still.mkv", [moving_face(1)[0]] * (2 * KEY_EVERY_FRAMES + 3), codec="ffv1", tone=False
    )
    target = tmp_path / "aged.mkv"
    age_video(bundled, still, target, AgeRequest(age=70, source_age=30), encode=LOSSLESS)
    change = [a[0].astype(int) - b[0] for a, b in zip(decoded(target), decoded(still), strict=True)]
    assert np.abs(change[0]).max() > 2
    first_to_others = max(np.abs(c - change[0]).mean() for c in change)
    assert first_to_others < 0.25 * np.abs(change[0]).mean()


def test_one_source_age_for_a_track_and_years_added_to_it(networks, clip, tmp_path):
    report = age_video(networks, clip, tmp_path / "by.mkv", AgeRequest(by=20), encode=LOSSLESS)
    (person,) = report.people
    assert person.target_age == pytest.approx(person.source_age + 20, abs=0.11)


def test_a_track_keeps_one_size_while_the_face_grows(facegan, tmp_path):
    portrait = astronaut()[:256, 96:352]
    pictures = []
    for i in range(FRAMES):
        picture, side = np.full((512, 512, 3), 120, np.uint8), 160 + 11 * i
        picture[:side, :side] = cv2.resize(portrait, (side, side), interpolation=cv2.INTER_AREA)
        pictures.append(picture)
    source = write_clip(tmp_path / "grows.mkv", pictures, tone=False)
    with VideoReader(source) as reader:
        (person,) = decide(facegan, scan(facegan, reader), AgeRequest(age=70))
    sizes = [choose_size(points[None], facegan.ager.views[0]) for points in person.track.landmarks]
    assert sorted(set(sizes)) == [128, 192]
    assert person.sizes_px == (sorted(sizes)[len(sizes) // 2],)


def test_everybody_s_identity_is_measured_also_of_who_comes_later(either, tmp_path):
    portrait = cv2.resize(astronaut()[:256, 96:352], (200, 200), interpolation=cv2.INTER_AREA)
    alone = np.full((200, 420, 3), 120, np.uint8)
    alone[:, :200] = portrait
    both = alone.copy()
    both[:, 210:410] = portrait
    source = write_clip(tmp_path / "two.mkv", [alone] * 15 + [both] * 15, tone=False)
    report = age_video(either, source, tmp_path / "aged.mkv", AgeRequest(age=70, source_age=30), encode=LOSSLESS)
    assert [person.first_frame > 0 for person in report.people] == [False, True]
    # It is the same portrait twice.
    first, second = (person.identity for person in report.people)
    assert first == pytest.approx(second, abs=0.05)


def test_a_video_without_faces_is_copied_byte_for_byte(networks, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    source = write_clip(tmp_path / "none.mkv", [noise] * 12)
    report = age_video(networks, source, tmp_path / "out.mkv", AgeRequest(age=70))
    assert (tmp_path / "out.mkv").read_bytes() == source.read_bytes()
    assert report.people == ()
    assert report.frames == 12
    assert report.frames_with_faces == 0
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_two_people_and_the_largest_alone(networks, tmp_path):
    picture = cv2.resize(astronaut()[0:256, 96:352], (256, 256))
    small = cv2.resize(picture, (160, 160), interpolation=cv2.INTER_AREA)
    both = np.full((256, 420, 3), 120, np.uint8)
    both[:, :256], both[:160, 258:418] = picture, small
    source = write_clip(tmp_path / "two.mkv", [both] * 12, tone=False)
    everybody = age_video(networks, source, tmp_path / "all.mkv", AgeRequest(age=70), encode=LOSSLESS)
    assert len(everybody.people) == 2
    age_video(networks, source, tmp_path / "one.mkv", AgeRequest(age=70, faces="largest"), encode=LOSSLESS)
    before, after = decoded(source)[6][0], decoded(tmp_path / "one.mkv")[6][0]
    changed = np.argwhere(before != after)
    assert len(changed)
    assert changed[:, 1].max() < 256


def test_a_phone_clip_that_is_stored_turned(networks, tmp_path):
    upright = moving_face(12)
    plain = write_clip(tmp_path / "plain.mp4", [np.rot90(p, -1) for p in upright], tone=False)
    turned = tmp_path / "turned.mp4"
    with av.open(str(plain)) as source, av.open(str(turned), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        one = 1 << 16
        stream.set_display_matrix((0, -one, 0, one, 0, 0, 0, 0, 1 << 30))
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    with VideoReader(turned) as reader:
        assert reader.info.rotation % 360 == 90
    report = age_video(networks, turned, tmp_path / "aged.mp4", AgeRequest(age=70, source_age=30))
    assert len(report.people) == 1
    assert report.frames_with_faces == 12
    with VideoReader(tmp_path / "aged.mp4") as reader:
        assert reader.info.rotation % 360 == 90


def test_a_truncated_video_keeps_what_decodes(networks, clip, tmp_path):
    damaged = tmp_path / "cut.mkv"
    damaged.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * 0.6)])
    report = age_video(networks, damaged, tmp_path / "out.mkv", AgeRequest(age=70), encode=LOSSLESS)
    assert report.damage
    assert 0 < report.frames < FRAMES
    assert len(decoded(tmp_path / "out.mkv")) == report.frames


def test_photos_one_bad_file_stops_nobody(networks, tmp_path):
    good, bad, plain = (tmp_path / name for name in ("good.png", "bad.jpg", "plain.png"))
    cv2.imwrite(str(good), astronaut()[:, :, ::-1])
    bad.write_text("no picture")
    cv2.imwrite(str(plain), np.full((40, 50, 3), 90, np.uint8))
    out = tmp_path / "out"
    items = [(p, out / p.name) for p in (bad, good, plain)]
    reports = age_photos(networks, items, AgeRequest(age=70, source_age=30))
    assert "bad.jpg" in reports[0].error
    assert not (out / "bad.jpg").exists()
    assert [len(r.faces) for r in reports[1:]] == [1, 0]
    assert (out / "plain.png").read_bytes() == plain.read_bytes()
    before, after = cv2.imread(str(good)), cv2.imread(str(out / "good.png"))
    changed = np.argwhere((before != after).any(2))
    box = np.array(reports[1].faces[0].box)
    margin = 0.7 * (box[2] - box[0])
    assert len(changed)
    assert (changed.min(0)[::-1] > box[:2] - margin).all()
    assert (changed.max(0)[::-1] < box[2:] + margin).all()


def test_outputs_are_labelled_unless_told_otherwise(networks, face_photo, face_clip, tmp_path):
    request = AgeRequest(age=70, source_age=30)
    for label in (True, False):
        photo, video = tmp_path / f"{label}.png", str(tmp_path / f"{label}.mp4")
        options = {} if label else {"label": False}
        age_photos(networks, [(face_photo, photo)], request, **options)
        age_video(networks, str(face_clip), video, request, end_s=0.2, **options)
        assert (b"compositeWithTrainedAlgorithmicMedia" in photo.read_bytes()) == label
        with av.open(video) as container:
            comment = container.metadata["comment"]
        assert comment.startswith("shot on a film set")
        assert ("target_age: 70" in comment) == label


def test_a_batch_of_photos_gives_what_each_gives_alone(either):
    def frame(picture):
        return Frame(planes=(np.ascontiguousarray(picture),), pixel_format="rgb24", color=RGB)

    pictures = [astronaut(), astronaut()[:, ::-1], cv2.resize(astronaut(), (300, 300))]
    request = AgeRequest(age=70, source_age=30)
    together = [frame(p.copy()) for p in pictures]
    age_frames(either, together, request)
    for picture, batched in zip(pictures, together, strict=True):
        alone = frame(picture.copy())
        age_frames(either, [alone], request)
        assert np.abs(alone.planes[0].astype(int) - batched.planes[0]).max() <= 1
        assert (alone.planes[0] != picture).any()


def test_the_sheet_has_a_cell_for_each_age(either, tmp_path):
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), astronaut()[:, :, ::-1])
    sheet = make_sheet(either, photo, [20, 70], source_age=30)
    assert sheet.dtype == np.uint8
    height, width, _ = sheet.shape
    cells = sheet[height - 200 : height - 40, :].reshape(160, width, 3)
    third = width // 3
    original, young, old = (cells[:, i * third + 20 : (i + 1) * third - 20].astype(int) for i in range(3))
    assert np.abs(original - young).mean() > 0.2
    assert np.abs(young - old).mean() > 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either an age, a number"),
        ({"age": 70, "by": 10}, "either an age, a number"),
        ({"age": 400}, "age is 400; it must be from 0 to 100"),
        ({"age": 70, "source_age": -1}, "source_age is -1"),
        ({"by": 101}, "by is 101"),
        ({"age": 70, "strength": 1.5}, "strength is 1.5"),
    ],
)
def test_requests_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AgeRequest(**options)


def some_crops(ager, count, seed=0):
    (size,) = ager.views[0].sizes_px
    pixels = np.random.default_rng(seed).uniform(-1, 1, (count, 3, size, size)).astype(np.float32)
    landmarks = np.repeat(template_5(size)[None], count, 0)
    return Crops(pixels=pixels, landmarks=landmarks, frame_to_crop=np.zeros((count, 2, 3), np.float32))


def test_composite_replace_reconstructs_the_face(networks):
    """With "replace" the generated face itself is pasted: what is inside the mask is the generator's."""
    ager = networks.ager
    crops = some_crops(ager, 2)
    looks = ager.look([], np.float32([30, 30]), np.float32([70, 20]))
    delta = ager.observe(looks, [crops], [None, None])
    ager._composite = "replace"
    try:
        replaced = ager.observe(looks, [crops], delta)
    finally:
        ager._composite = "delta"
    made = crops.pixels + np.stack([key.delta for key in replaced])
    assert (np.abs(made) <= 1 + 1e-5).all()
    assert max(np.abs(a.delta - b.delta).max() for a, b in zip(replaced, delta, strict=True)) > 0.1


def test_faces_seen_first_and_faces_known_may_share_a_batch(networks):
    ager, count = networks.ager, 4
    crops = some_crops(ager, count)
    looks = ager.look([], np.full(count, 30, np.float32), np.full(count, 70, np.float32))
    first = ager.observe(looks, [crops], [None] * count)
    mixed = ager.observe(looks, [crops], [None, first[1], None, first[3]])
    new, known = np.array([0, 2]), np.array([1, 3])
    apart = {0: None}
    for rows, previous in ((new, [None, None]), (known, [first[1], first[3]])):
        keys = ager.observe([looks[i] for i in rows], [crops[rows]], previous)
        apart |= dict(zip(rows.tolist(), keys, strict=True))
    for row, key in enumerate(mixed):
        np.testing.assert_array_equal(key.delta, apart[row].delta)
        np.testing.assert_array_equal(key.latent, apart[row].latent)
    assert np.abs(mixed[1].latent - first[1].latent).max() > 0


class Darkener:
    """An ager of two views that multiplies: a tenth darker inside the face, a fifth in the rest of the head.

    It looks at appearances, and its keys say which frame they come from, so that a test can read how keys are mixed.
    """

    views = (View("face", TEMPLATE_5, (64, 128)), View("head", 0.25 + TEMPLATE_5 / 2, (96,)))
    needs_appearance = True
    warm_up_keys = 0

    def __init__(self):
        self.appearances, self.observed, self.shares = [], [], []

    def look(self, appearances, source_age, target_age, home=None):
        self.appearances += appearances
        return list(zip(source_age.tolist(), target_age.tolist(), strict=True))

    def observe(self, looks, crops, previous):
        assert len(crops) == 2
        assert all(len(each) == len(looks) == len(previous) for each in crops)
        assert crops[1].size_px == 96
        self.observed += [crops[0].size_px] * len(looks)
        return [(0 if key is None else key[0] + 1, crops[0].size_px) for key in previous]

    def draw(self, look, before, after, share):
        self.shares.append((before[0], after[0], share))
        changes = []
        for size, gain in ((before[1], -0.1), (96, -0.2)):
            plateau = np.zeros((size, size), np.float32)
            plateau[2:-2, 2:-2] = gain
            changes.append(Change(delta=np.zeros((3, size, size), np.float32), gain=plateau))
        return changes if look[1] < 80 else [changes[0], None]


def test_an_ager_of_two_views_changes_photos(networks, face_picture):
    mine = replace(networks, ager=Darkener())
    for age in (70, 85):
        frame = Frame(planes=(face_picture.copy(),), pixel_format="rgb24", color=RGB)
        (photo,) = age_frames(mine, [frame], AgeRequest(age=age, source_age=30))
        assert photo.sizes_px.tolist() in ([64], [128])
        x, y = np.rint(photo.faces.landmarks[0, 2]).astype(int)
        before, after = (p[y - 4 : y + 4, x - 4 : x + 4].astype(float) for p in (face_picture, frame.planes[0]))
        luma = before @ [0.299, 0.587, 0.114] + 0.04 * 255
        lost = luma * (0.1 if age == 85 else 1 - 0.9 * 0.8)
        np.testing.assert_allclose(before - after, lost[..., None].repeat(3, 2), atol=1.5)
        assert 0.5 < photo.identity[0] <= 1
    (first, _) = mine.ager.appearances
    assert first.thumbnail.shape == (3, 16, 16)
    assert np.linalg.norm(first.embedding) == pytest.approx(1, abs=1e-4)
    faces = photo.faces
    crops = prepare_crops(
        [Frame(planes=(face_picture,), pixel_format="rgb24", color=RGB)],
        faces.frame_index, faces.landmarks, Darkener.views[0], 64,
    )  # fmt: skip
    means = crops.pixels[0].reshape(3, 16, 4, 16, 4).mean((2, 4))
    np.testing.assert_allclose(first.thumbnail, means, atol=1e-5)


def test_an_ager_of_two_views_changes_videos_between_key_frames(networks, clip, tmp_path):
    mine = replace(networks, ager=Darkener())
    report = age_video(mine, clip, tmp_path / "dark.mkv", AgeRequest(age=70), encode=LOSSLESS)
    (person,) = report.people
    assert 0.5 < person.identity <= 1
    assert len(mine.ager.appearances) == 1  # once a person and shot, however many samples
    _, *shares = mine.ager.shares  # the first is drawn for the identity
    expected = []
    for key, start in enumerate(range(0, FRAMES - 1, KEY_EVERY_FRAMES)):
        count = min(KEY_EVERY_FRAMES, FRAMES - 1 - start)
        expected.append((key, key, 0))
        expected += [(key, key + 1, part / DRAWN_BETWEEN) for part in range(1, DRAWN_BETWEEN) if count > 1]
    assert shares == [*expected, (key + 1, key + 1, 0)]
    for old, new in zip(decoded(clip), decoded(tmp_path / "dark.mkv"), strict=True):
        assert old[0].mean() - new[0].mean() > 3
        for chroma, same in zip(old[1:], new[1:], strict=True):
            np.testing.assert_array_equal(chroma, same)
