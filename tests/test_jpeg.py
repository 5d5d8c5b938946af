"""JPEGs changed in place: what was not touched keeps its bits."""

import dataclasses
import io
import logging
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps, JpegImagePlugin

from faceage.errors import MediaError, UnsupportedError
from faceage.media import turbojpeg
from faceage.media.image import read_image, write_image
from faceage.media.jpeg import DHT, parse_jpeg
from faceage.media.turbojpeg import edit_coefficients

SAMPLINGS = {
    "yuvj444p": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "yuvj422p": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "yuvj420p": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "yuvj440p": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "yuvj411p": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}
ORIENTATIONS = range(1, 9)
MEDIA = Path(__file__).parents[2] / "shared" / "media"
MAX_GROWTH = 0.02


def encode(pixel_format="yuvj420p", quality=75, *, size=(203, 241), progressive=False, optimize=False, restart=0):
    """A JPEG of a photo; size is (height, width)."""
    picture = cv2.resize(skimage.data.astronaut()[:300, 50:350], size[::-1], interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    options += [cv2.IMWRITE_JPEG_OPTIMIZE, int(optimize), cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
    if pixel_format == "gray":
        picture = picture[..., 1]
    else:
        picture = picture[..., ::-1]
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[pixel_format]]
    return cv2.imencode(".jpg", picture, options)[1].tobytes()


ALL_ROWS = [range(10_000)] * 3


def coefficients(data):
    """Every quantised coefficient: for each component int16 [rows, columns, 64]."""
    rows = {}
    jpeg = parse_jpeg(data)

    def copy(component, row, values):
        rows.setdefault(component, []).append(values.copy())

    edit_coefficients(data[: jpeg.end], copy, ALL_ROWS, progressive=False)
    return [np.stack(rows[c]) for c in sorted(rows)]


def with_segments(data, *segments):
    """The file with more segments after the first one, which is JFIF's."""
    at = 4 + struct.unpack(">H", data[4:6])[0]
    extra = b"".join(struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body for marker, body in segments)
    return data[:at] + extra + data[at:]


def exif(orientation=1, thumbnail=None):
    """An EXIF body in Intel order, with the orientation and, in the second directory, a thumbnail."""
    first = struct.pack("<H HHII I", 1, 0x0112, 3, 1, orientation, 26 if thumbnail else 0)
    tiff = b"II*\0" + struct.pack("<I", 8) + first
    if thumbnail:
        start = 26 + 2 + 2 * 12 + 4
        tiff += struct.pack("<H HHII HHII I", 2, 0x0201, 4, 1, start, 0x0202, 4, 1, len(thumbnail), 0) + thumbnail
    return b"Exif\0\0" + tiff


def change(frame, amount=40):
    """The frame with a soft spot in it, and where each plane has changed."""
    planes = []
    for plane, layout in zip(frame.planes, frame.layout.planes, strict=True):
        y, x = np.mgrid[: plane.shape[0], : plane.shape[1]]
        distance = np.hypot(x * layout.sub_x - frame.width * 0.6, y * layout.sub_y - frame.height * 0.5)
        spot = amount * np.clip(1 - distance / 30, 0, 1)
        planes.append(np.clip(plane + spot.round(), 0, 255).astype(np.uint8))
    return dataclasses.replace(frame, planes=tuple(planes))


def rewrite(tmp_path, data, amount=40, label=None, name="a.jpg"):
    """Write a changed copy of a file; return the still, the changed frame and the new file."""
    (tmp_path / name).write_bytes(data)
    still = read_image(tmp_path / name)
    frame = change(still.frame, amount)
    write_image(tmp_path / "out" / name, still, frame, overwrite=True, label=label)
    return still, frame, (tmp_path / "out" / name).read_bytes()


def check_untouched(still, frame, before, after):
    """Blocks whose samples were not changed have their coefficients, all of them; some of the others have not."""
    assert still.orientation == 1
    changed = 0
    for plane, new, old_blocks, new_blocks in zip(
        still.frame.planes, frame.planes, coefficients(before), coefficients(after), strict=True
    ):
        touched = np.zeros(old_blocks.shape[:2], bool)
        for y, x in np.argwhere(plane != new):
            touched[y // 8, x // 8] = True
        assert 0 < touched.sum() < touched.size
        differs = (old_blocks != new_blocks).any(2)
        assert not (differs & ~touched).any()
        changed += differs.sum()
    assert changed


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 75, 95, 100])
@pytest.mark.parametrize("pixel_format", [*SAMPLINGS, "gray"])
def test_blocks_without_a_change_keep_their_coefficients(tmp_path, pixel_format, quality, progressive):
    data = encode(pixel_format, quality, progressive=progressive)
    still, frame, out = rewrite(tmp_path, data)
    assert still.frame.pixel_format == pixel_format
    assert (still.frame.width, still.frame.height) == (241, 203)
    check_untouched(still, frame, data, out)
    before, after = parse_jpeg(data), parse_jpeg(out)
    assert after.coding == before.coding
    assert [s for s in after.segments if s.marker != DHT] == [s for s in before.segments if s.marker != DHT]
    # The samples follow the change as closely as the tables allow, and are the source's everywhere else.
    shown = read_image(tmp_path / "out" / "a.jpg").frame
    for plane, wanted, got, table in zip(
        still.frame.planes, frame.planes, shown.planes, before.quantisation(), strict=True
    ):
        bound = 1 + np.sqrt(np.square(table).sum() / 12 / 64) * 1.5  # of a block whose coefficients are all rounded
        apart = np.abs(got.astype(float) - wanted)[plane != wanted]
        assert apart.mean() < bound
        grown = cv2.dilate((plane != wanted).astype(np.uint8), np.ones((17, 17), np.uint8)) > 0
        np.testing.assert_array_equal(got[~grown], plane[~grown])


@pytest.mark.parametrize("pixel_format", ["yuvj420p", "yuvj422p", "gray"])
def test_planes_are_those_that_libjpeg_decodes(tmp_path, pixel_format):
    (tmp_path / "a.jpg").write_bytes(encode(pixel_format, 60))
    got = read_image(tmp_path / "a.jpg").frame
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft("YCbCr" if pixel_format != "gray" else "L", image.size)
        wanted = np.atleast_3d(np.asarray(image))
    np.testing.assert_array_equal(got.planes[0], wanted[..., 0])
    for plane, layout, enlarged in zip(
        got.planes[1:], got.layout.planes[1:], wanted.transpose(2, 0, 1)[1:], strict=True
    ):
        means = cv2.resize(enlarged, (plane.shape[1], plane.shape[0]), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(means - plane).mean() < 1  # Pillow has only the enlarged chroma
        assert layout.sub_x == 2


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (17, 33), (48, 200), (199, 64)])
@pytest.mark.parametrize("pixel_format", [*SAMPLINGS, "gray"])
def test_any_size(tmp_path, pixel_format, size):
    data = encode(pixel_format, size=size)
    still, _, out = rewrite(tmp_path, data)
    again = read_image(tmp_path / "out" / "a.jpg")
    assert [p.shape for p in again.frame.planes] == [p.shape for p in still.frame.planes]
    with Image.open(io.BytesIO(out)) as image:
        assert image.size == size[::-1]


def upright_luma(data):
    """The luma that Pillow decodes, turned as EXIF says."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", image.size)
        return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("pixel_format", ["yuvj444p", "yuvj422p", "yuvj420p", "yuvj440p", "gray"])
def test_a_turned_photo_is_upright_and_stays_stored_as_it_was(tmp_path, pixel_format, orientation):
    data = with_segments(encode(pixel_format, 90), (0xE1, exif(orientation)))
    still, frame, out = rewrite(tmp_path, data)
    upright = upright_luma(data)
    luma = still.frame.planes[0]
    extra = [got - wanted for got, wanted in zip(luma.shape, upright.shape, strict=True)]
    assert max(extra) <= 1  # a padded side begins with the padding
    np.testing.assert_array_equal(luma[extra[0] :, extra[1] :], upright)
    old, new = coefficients(data), coefficients(out)
    differs = (old[0] != new[0]).any(2)
    assert 0 < differs.mean() < 0.3
    # The spot is where it was made, seen upright.
    with Image.open(io.BytesIO(out)) as image:
        assert image.getexif()[0x0112] == orientation
    seen = upright_luma(out).astype(int) - upright
    made = (frame.planes[0].astype(int) - luma)[extra[0] :, extra[1] :]
    assert np.sum((seen > 15) & (made > 15)) > 0.9 * np.sum((seen > 15) | (made > 15))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_chroma_lies_on_its_luma_in_a_turned_photo_of_odd_size(tmp_path, orientation):
    """Upright planes are the planes of the upright picture: a flip of an odd side moves no chroma."""
    y, x = np.mgrid[:75, :93]
    blob = np.hypot(x - 40, y - 30) < 18
    picture = np.where(blob[..., None], (200, 60, 60), (120, 120, 120)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=2, exif=exif(orientation))
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    frame = read_image(tmp_path / "a.jpg").frame
    weights = [np.abs(plane.astype(float) - np.median(plane)) for plane in (frame.planes[0], frame.planes[2])]
    luma, chroma = (
        np.array([np.average(axis, weights=w * (w > 5)) for axis in np.mgrid[: w.shape[0], : w.shape[1]]])
        for w in weights
    )
    np.testing.assert_allclose(chroma * 2 + 0.5, luma, atol=0.35)  # unflipped padding would be a whole sample off


@pytest.mark.parametrize("progressive", [False, True])
def test_restart_markers_are_kept(tmp_path, progressive):
    data = encode(restart=5, progressive=progressive)
    still, frame, out = rewrite(tmp_path, data)
    assert parse_jpeg(out).restart_interval == parse_jpeg(data).restart_interval == 5
    count = sum(data.count(bytes([0xFF, 0xD0 + i])) for i in range(8))
    assert count > 10
    assert sum(out.count(bytes([0xFF, 0xD0 + i])) for i in range(8)) == count
    check_untouched(still, frame, data, out)


@pytest.mark.parametrize("quality", [30, 75, 95, 100])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"restart": 9}], ids=str)
def test_the_file_stays_as_large_as_it_was(tmp_path, quality, options):
    data = encode(quality=quality, size=(900, 1200), **options)
    _, _, out = rewrite(tmp_path, data, amount=12)
    assert abs(len(out) / len(data) - 1) < MAX_GROWTH
    _, _, same = rewrite(tmp_path, data, amount=0)
    assert len(same) == len(data)  # the same Huffman tables
    assert same == data


SEGMENTS = [
    (0xE1, exif()),
    (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF"
     b" xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'></rdf:RDF></x:xmpmeta>"),
    (0xE2, b"ICC_PROFILE\0\1\1" + bytes(300)),
    (0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\0"),
    (0xE9, b"a maker's own"),
    (0xFE, b"a comment"),
    (0xFE, b"another"),
    (0xEE, b"Adobe\0\x64\0\0\0\0\1"),
]  # fmt: skip


def test_segments_are_kept_in_their_order(tmp_path, caplog):
    data = with_segments(encode(progressive=True), *SEGMENTS)
    before = parse_jpeg(data).segments
    _, _, out = rewrite(tmp_path, data)
    kept = [s for s in before if s.marker != DHT]
    assert [s for s in parse_jpeg(out).segments if s.marker != DHT] == kept
    _, _, out = rewrite(tmp_path, data, label={"tool": "faceage"})
    labelled = [s for s in parse_jpeg(out).segments if s.marker != DHT]
    assert [a == b for a, b in zip(labelled, kept, strict=True)].count(False) == 1
    assert b"compositeWithTrainedAlgorithmicMedia" in labelled[2].body
    plain = with_segments(encode(), SEGMENTS[0], SEGMENTS[2])
    _, _, out = rewrite(tmp_path, plain, label={"tool": "faceage"})
    assert [s.marker for s in parse_jpeg(out).segments][:4] == [0xE0, 0xE1, 0xE1, 0xE2]
    assert not caplog.records


def dropped(caplog):
    """The one warning."""
    (record,) = [r for r in caplog.records if "left out" in r.message]
    return record.message


def test_the_thumbnail_is_drawn_anew(tmp_path, caplog):
    thumbnail = encode(size=(120, 160), quality=85)
    _, frame, out = rewrite(tmp_path, with_segments(encode(), (0xE1, exif(1, thumbnail))), amount=120)
    body = next(s.body for s in parse_jpeg(out).segments if s.marker == 0xE1)
    assert len(body) == len(exif(1, thumbnail))
    start = 6 + 26 + 30
    with Image.open(io.BytesIO(body[start:])) as image:
        assert image.size == (160, 120)
        small = np.asarray(image.convert("L")).astype(float)
    width = round(241 * 120 / 203)
    wanted = cv2.resize(frame.planes[0], (width, 120), interpolation=cv2.INTER_AREA)
    assert np.abs(small[:, 9 : 9 + width] - wanted).mean() < 4
    assert small[:, :7].max() < 10  # the shapes differ: black rims
    (length,) = struct.unpack("<I", body[6 + 26 + 2 + 12 + 8 :][:4])
    assert body[start : start + length].endswith(b"\xff\xd9")
    assert not caplog.records
    tiny = with_segments(encode(), (0xE1, exif(1, b"\xff\xd8 no JPEG")))
    _, _, out = rewrite(tmp_path, tiny)
    assert "the EXIF thumbnail" in dropped(caplog)
    with Image.open(io.BytesIO(out)) as image:
        assert not image.getexif().get_ifd(1)
        assert image.getexif()[0x0112] == 1


def test_what_signs_or_shows_the_old_samples_is_left_out(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    claim = b"JP\0\1\0\0\0\1" + struct.pack(">I", 40) + b"jumb" + b"...c2pa..."
    packet = SEGMENTS[1][1].replace(b"<rdf:RDF", b"<rdf:RDF GCamera:MotionPhoto='1'")
    data = with_segments(encode(), (0xEB, claim), (0xE1, packet)) + b"\0\0\0\x18ftypmp42" + bytes(500)
    _, _, out = rewrite(tmp_path, data)
    assert "content credentials (C2PA)" in dropped(caplog)
    assert "a motion photo's video" in dropped(caplog)
    assert b"c2pa" not in out
    assert b"ftyp" not in out
    assert b"MotionPhoto='0'" in out
    assert parse_jpeg(out).end == len(out)


def multi_picture(first, *others):
    """A file with further pictures behind the first, in a multi-picture index in Motorola order."""
    count = 1 + len(others)

    def index(sizes, offsets):
        entries = b"".join(struct.pack(">IIIHH", 0, s, o, 0, 0) for s, o in zip(sizes, offsets, strict=True))
        version, number = (0xB000, 7, 4, b"0100"), (0xB001, 4, 1, struct.pack(">I", count))
        directory = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in (version, number))
        directory += struct.pack(">HHII", 0xB002, 7, 16 * count, 8 + 2 + 3 * 12 + 4)
        tiff = b"MM\0*" + struct.pack(">IH", 8, 3) + directory + bytes(4) + entries
        return b"MPF\0" + tiff

    sizes = [len(with_segments(first, (0xE2, index([0] * count, [0] * count)))), *map(len, others)]
    base = with_segments(first, (0xE2, index([0] * count, [0] * count))).index(b"MM\0*")
    offsets = [0, *(sum(sizes[: i + 1]) - base for i in range(len(others)))]
    return with_segments(first, (0xE2, index(sizes, offsets))) + b"".join(others)


def test_a_gain_map_is_kept_and_found_again(tmp_path, caplog):
    gain_map = with_segments(
        encode("gray", size=(50, 60)), (0xE1, b"http://ns.adobe.com/xap/1.0/\0http://ns.adobe.com/hdr-gain-map/1.0/")
    )
    data = multi_picture(encode(), gain_map)
    _, _, out = rewrite(tmp_path, data, label={"tool": "faceage"})
    assert len(out) != len(data)
    assert out.endswith(gain_map)
    assert not caplog.records
    with Image.open(io.BytesIO(out)) as image:
        assert image.n_frames == 2
        image.seek(1)
        assert image.size == (60, 50)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(gain_map))))
    assert parse_jpeg(out).end == len(out) - len(gain_map)


def test_a_second_view_is_left_out(tmp_path, caplog):
    _, _, out = rewrite(tmp_path, multi_picture(encode(), encode(size=(100, 100))))
    assert "further pictures" in dropped(caplog)
    assert parse_jpeg(out).end == len(out)
    with Image.open(io.BytesIO(out)) as image:
        assert image.format == "JPEG"  # no index is left


def test_rare_codings_are_refused_in_one_line(tmp_path):
    def check(data, message, error=UnsupportedError):
        (tmp_path / "a.jpg").write_bytes(data)
        with pytest.raises(error, match=message) as caught:
            read_image(tmp_path / "a.jpg")
        assert "\n" not in str(caught.value)

    data = encode()
    at = data.index(b"\xff\xc0")
    check(data[: at + 1] + b"\xc9" + data[at + 2 :], "arithmetic coding")
    check(data[: at + 1] + b"\xc3" + data[at + 2 :], "lossless or hierarchical coding")
    check(data[: at + 4] + b"\x0c" + data[at + 5 :], "12 bits a sample")
    check(data[:-2], "its end is missing", MediaError)
    check(data[: at + 6] + b"\xff\xd9", "damaged", MediaError)


def test_colours_without_planes_of_their_own_are_coded_anew(tmp_path, caplog):
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()[:100, :100]).save(buffer, "JPEG", quality=90, keep_rgb=True)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    still = read_image(tmp_path / "a.jpg")
    assert still.frame.pixel_format == "rgb24"
    assert "coded anew" in caplog.text
    write_image(tmp_path / "b.jpg", still, still.frame)
    again = read_image(tmp_path / "b.jpg")
    assert again.frame.pixel_format == "yuvj444p"
    assert np.abs(np.asarray(Image.open(tmp_path / "b.jpg")).astype(int) - still.frame.planes[0]).mean() < 2


@pytest.mark.parametrize("name", ["group_photo", "obama-240p", "obama-1080p", "two_people"])
def test_real_photos(tmp_path, name):
    path = MEDIA / f"{name}.jpg"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    data = path.read_bytes()
    still, frame, out = rewrite(tmp_path, data, amount=12)
    check_untouched(still, frame, data, out)
    before, after = parse_jpeg(data), parse_jpeg(out)
    assert [s for s in after.segments if s.marker != DHT] == [s for s in before.segments if s.marker != DHT]
    assert abs(len(out) / len(data) - 1) < MAX_GROWTH


def test_a_bug_in_an_edit_comes_out():
    def edit(component, row, values):
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"):
        edit_coefficients(encode(), edit, ALL_ROWS, progressive=False)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_quality_codes_the_whole_picture_anew(tmp_path, suffix):
    source = tmp_path / f"photo{suffix}"
    Image.fromarray(skimage.data.astronaut()[:96, :128]).save(source, quality=95)
    still = read_image(source)
    sizes = []
    for quality in (30, 80):
        target = tmp_path / f"{quality}{suffix}"
        write_image(target, still, still.frame, quality=quality)
        again = Image.open(target)
        difference = np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(source))).mean()
        assert 0.5 < difference < 12
        assert suffix == ".webp" or JpegImagePlugin.get_sampling(again) == still.subsampling
        sizes.append(target.stat().st_size)
    assert sizes[0] < 0.7 * sizes[1] < 0.7 * source.stat().st_size


def test_without_libjpeg_turbo_a_jpeg_is_coded_anew_and_a_warning_says_so(tmp_path, monkeypatch, caplog):
    source, target = tmp_path / "photo.jpg", tmp_path / "out.jpg"
    Image.fromarray(skimage.data.astronaut()[:96, :128]).save(source, quality=90)
    monkeypatch.setattr("faceage.media.turbojpeg.find_spec", lambda name: None)
    turbojpeg._library.cache_clear()
    still = read_image(source)
    turbojpeg._library.cache_clear()
    assert still.jpeg is None
    assert still.frame.pixel_format == "rgb24"
    assert "libjpeg-turbo was not found in pylibjxl" in caplog.text
    assert "it is coded anew" in caplog.text
    write_image(target, still, still.frame)
    assert np.abs(np.asarray(Image.open(target)).astype(int) - np.asarray(Image.open(source))).mean() < 2
