import dataclasses
import io
import logging
import os
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms, IptcImagePlugin, TiffImagePlugin

from faceage.errors import MediaError, UnsupportedError
from faceage.media.encode_still import to_rgb
from faceage.media.find import IMAGE_SUFFIXES, find_images
from faceage.media.image import read_image, write_image
from faceage.media.xmp import SOURCE_TYPE, label_xmp

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LABEL = {"tool": "faceage 0.1", "model": "age-cgan <0a1b>", "target_age": "70"}
SHAPES = {"gray": (1, "u1"), "gray16": (1, "u2"), "rgb24": (3, "u1"), "rgb48": (3, "u2")}
SHAPES |= {"rgba": (4, "u1"), "rgba64": (4, "u2")}


def astronaut():
    return skimage.data.astronaut()[:200, 100:340]


def samples(pixel_format, height=23, width=31):
    channels, dtype = SHAPES[pixel_format]
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def exif_bytes(orientation=1):
    exif = Image.Exif()
    exif[0x010F] = "Camera maker"
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9003] = "2001:02:03 04:05:06"
    return exif.tobytes()


def save(path, array, **options):
    """Write with Pillow, or with OpenCV what Pillow cannot: 16-bit colour."""
    if array.dtype == np.uint16 and array.ndim == 3:
        code = cv2.COLOR_RGB2BGR if array.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        cv2.imwrite(str(path), cv2.cvtColor(array, code))
    else:
        Image.fromarray(array).save(path, **options)
    return path


def rewrite(tmp_path, source, suffix=None, change=None, **options):
    still = read_image(source)
    frame = still.frame
    if change is not None:
        frame = dataclasses.replace(frame, planes=(change(frame.planes[0].copy()),))
    out = tmp_path / "out" / f"x{suffix or source.suffix}"
    write_image(out, still, frame, **options)
    return out


@pytest.mark.parametrize(("suffix", "pixel_format"), [(s, f) for s in (".png", ".tif") for f in SHAPES])
def test_lossless_formats_keep_every_bit(tmp_path, suffix, pixel_format):
    array = samples(pixel_format)
    source = save(tmp_path / f"a{suffix}", array)
    still = read_image(source)
    assert still.frame.pixel_format == pixel_format
    np.testing.assert_array_equal(still.frame.planes[0], array)
    assert still.frame.planes[0].flags.writeable
    again = read_image(rewrite(tmp_path, source, label=LABEL))
    np.testing.assert_array_equal(again.frame.planes[0], array)
    assert again.frame.pixel_format == pixel_format


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", "16.png", "16.tif"])
def test_orientation_is_applied_and_undone(tmp_path, suffix, orientation):
    upright = samples("rgb48" if suffix.startswith("16") else "rgb24", 16, 32)
    upright = np.kron(upright[:2, :4], np.ones((8, 8, 1), upright.dtype))  # flat JPEG blocks
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    undo |= {5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 8: lambda a: np.rot90(a, -1)}
    undo |= {7: lambda a: np.rot90(a.swapaxes(0, 1), 2)}
    stored = np.ascontiguousarray(undo[orientation](upright))
    source = tmp_path / f"a{suffix}"
    options = {"exif": exif_bytes(orientation)}
    options |= {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    options |= {"lossless": True} if suffix == ".webp" else {}
    save(source, stored, **options)
    if suffix == "16.png":
        data = source.read_bytes()
        body = b"eXIf" + exif_bytes(orientation).removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        source.write_bytes(data[:33] + chunk + data[33:])
    if suffix == "16.tif":
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(source, stored, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    still = read_image(source)
    assert still.orientation == orientation
    np.testing.assert_allclose(to_rgb(still.frame), upright, atol=3 if suffix == ".jpg" else 0)
    out = rewrite(tmp_path, source)
    with Image.open(source) as before, Image.open(out) as after:
        assert after.getexif()[0x0112] == orientation
        if not suffix.startswith("16"):
            assert after.getexif()[0x010F] == "Camera maker"
            assert after.getexif().get_ifd(0x8769)[0x9003] == "2001:02:03 04:05:06"
        assert after.size == before.size
        apart = np.abs(np.asarray(before, np.int64) - np.asarray(after)).max()
        assert apart <= (3 if suffix == ".jpg" else 0)
    if suffix.endswith(".tif"):  # Pillow shows a TIFF upright: look at what is stored
        tifffile = pytest.importorskip("tifffile")
        np.testing.assert_array_equal(tifffile.imread(out), stored)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("target", [".jpg", ".png", ".webp", ".tif"])
def test_metadata_survives_within_and_between_formats(tmp_path, suffix, target):
    options = {"icc_profile": ICC, "exif": exif_bytes(6)} | ({} if suffix == ".webp" else {"dpi": (300, 300)})
    source = save(tmp_path / f"a{suffix}", astronaut(), **options)
    out = rewrite(tmp_path, source, target, label=LABEL)
    with Image.open(out) as image:
        assert image.info["icc_profile"] == ICC
        assert image.getexif()[0x0112] == 6
        assert image.getexif()[0x010F] == "Camera maker"
        assert image.getexif().get_ifd(0x8769)[0x9003] == "2001:02:03 04:05:06"
        if suffix != ".webp" and target != ".webp":
            np.testing.assert_allclose([float(v) for v in image.info["dpi"]], 300, atol=0.1)
    again = read_image(out)
    assert parse(again.xmp)["DigitalSourceType"] == SOURCE_TYPE


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_of_noise_at_the_highest_quality_fits_the_buffer(tmp_path, progressive):
    source = tmp_path / "a.jpg"
    noise = Image.fromarray(samples("rgb24", 900, 1100))
    noise.save(source, quality=100, progressive=False, keep_rgb=True)  # coded anew: it has no planes of its own
    still = dataclasses.replace(read_image(source), progressive=progressive)
    write_image(tmp_path / "b.jpg", still, still.frame)
    out = read_image(tmp_path / "b.jpg")
    assert out.frame.pixel_format == "yuvj444p"
    assert out.quantization == still.quantization


def test_jpeg_keeps_caption_and_credit(tmp_path):
    source = save(tmp_path / "a.jpg", astronaut())
    iptc = b"".join(b"\x1c\x02" + bytes([n]) + struct.pack(">H", len(v)) + v for n, v in ((120, b"Text"), (110, b"Me")))
    body = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc
    data = source.read_bytes()
    source.write_bytes(data[:20] + b"\xff\xed" + struct.pack(">H", 2 + len(body)) + body + data[20:])  # after JFIF's
    with Image.open(rewrite(tmp_path, source, label=LABEL)) as image:
        assert IptcImagePlugin.getiptcinfo(image) == {(2, 120): b"Text", (2, 110): b"Me"}
        assert image.info["xmp"]


def test_webp_stays_lossless_or_lossy(tmp_path):
    lossless = save(tmp_path / "a.webp", samples("rgba"), lossless=True, exact=True, exif=exif_bytes())
    out = rewrite(tmp_path, lossless)
    assert read_image(out).lossless
    np.testing.assert_array_equal(read_image(out).frame.planes[0], samples("rgba"))
    lossy = save(tmp_path / "b.webp", astronaut(), quality=80)
    assert not read_image(rewrite(tmp_path, lossy, overwrite=True)).lossless


def test_png_chunks_and_tiff_compression_are_kept(tmp_path):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "somebody")
    info.add(b"gAMA", struct.pack(">I", 45455))
    source = save(tmp_path / "a.png", samples("rgb24"), pnginfo=info)
    with Image.open(rewrite(tmp_path, source, label=LABEL)) as image:
        assert image.text["Author"] == "somebody"
        assert image.info["gamma"] == pytest.approx(0.45455)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        source = save(tmp_path / "a.tif", samples("rgb24"), compression=compression)
        with Image.open(rewrite(tmp_path, source, overwrite=True)) as image:
            assert image.info["compression"] == compression


def test_tiff_without_a_density_gets_none(tmp_path):
    out = rewrite(tmp_path, save(tmp_path / "a.tif", samples("rgb24")), label=LABEL)
    with Image.open(out) as image:
        assert not {282, 283} & set(image.tag_v2)


def parse(packet):
    """Local names and texts of the elements of a packet; a repeated one fails."""
    root = ET.fromstring(packet.decode().lstrip("\ufeff"))
    found = {}
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        if name not in ("xmpmeta", "RDF", "Description"):
            assert name not in found
            found[name] = element.text
        found |= {k.rpartition("}")[2]: v for k, v in element.attrib.items() if not k.endswith("about")}
    return found


def test_label_is_added_to_the_packet_that_is_there():
    packet = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="uuid:1" xmlns:dc="http://purl.org/dc/elements/1.1/"'
        b' dc:format="image/png" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        b' Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture">'
        b"<dc:source>a &amp; b</dc:source></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    once = label_xmp(packet, LABEL)
    assert b'rdf:about="uuid:1" xmlns:faceage' in once
    want = {"format": "image/png", "source": "a & b", "DigitalSourceType": SOURCE_TYPE, **LABEL}
    assert parse(once) == want
    assert label_xmp(once, LABEL) == once
    for bad in (None, b"", b"\xff\xfe<", b"no rdf"):
        assert parse(label_xmp(bad, LABEL)) == {"DigitalSourceType": SOURCE_TYPE, **LABEL}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_label_replaces_itself_and_none_keeps_the_packet(tmp_path, suffix):
    source = save(tmp_path / f"a{suffix}", astronaut())
    first = rewrite(tmp_path, source, label=LABEL)
    packet = read_image(first).xmp
    assert parse(packet) == {"DigitalSourceType": SOURCE_TYPE, **LABEL}
    still = read_image(first)
    write_image(first, still, still.frame, overwrite=True, label={"tool": "later"})
    assert parse(read_image(first).xmp) == {"DigitalSourceType": SOURCE_TYPE, "tool": "later"}
    unlabelled = rewrite(tmp_path, source, overwrite=True)
    assert read_image(unlabelled).xmp is None


def test_writing_is_atomic_and_asks_before_overwriting(tmp_path, monkeypatch):
    source = save(tmp_path / "a.png", samples("rgb24"))
    out = rewrite(tmp_path, source)
    before = out.read_bytes()
    with pytest.raises(MediaError, match="exists already; pass --overwrite"):
        rewrite(tmp_path, source)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(MediaError, match=r"cannot be written \(No space left on device\)"):
        rewrite(tmp_path, source, change=lambda a: 255 - a, overwrite=True)
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_longest_name_is_written(tmp_path, suffix):
    name = "ä" * 125 + "a" + suffix
    assert len(name.encode()) == 255
    source = save(tmp_path / name, astronaut())
    still = read_image(source)
    write_image(tmp_path / "out" / name, still, still.frame)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


def test_changed_samples_are_written_and_the_rest_is_kept(tmp_path):
    def change(plane):
        plane[5:9, 3:8, :3] = 7
        return plane

    for pixel_format in ("rgba", "rgba64"):
        array = samples(pixel_format)
        source = save(tmp_path / "a.png", array)
        got = read_image(rewrite(tmp_path, source, change=change, overwrite=True)).frame.planes[0]
        np.testing.assert_array_equal(got, change(array.copy()))


def test_formats_that_cannot_hold_the_frame(tmp_path):
    source = save(tmp_path / "a.png", samples("rgba64"))
    for suffix, kind in ((".jpg", "JPEG"), (".webp", "WEBP"), (".bmp", "BMP")):
        with pytest.raises(UnsupportedError, match=rf"{kind} cannot hold rgba64; write \.png or \.tif"):
            rewrite(tmp_path, source, suffix)
    wide = save(tmp_path / "wide.png", np.zeros((1, 20_000, 3), np.uint8))
    with pytest.raises(MediaError, match="cannot be stored as WEBP"):
        rewrite(tmp_path, wide, ".webp")
    with pytest.raises(UnsupportedError, match=r"unknown suffix '\.xyz'"):
        rewrite(tmp_path, source, ".xyz")
    bmp = save(tmp_path / "a.bmp", samples("rgb24"))
    np.testing.assert_array_equal(read_image(rewrite(tmp_path, bmp)).frame.planes[0], samples("rgb24"))


def test_palette_gray_alpha_and_one_bit_are_read_and_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    image = Image.fromarray(astronaut())
    cases = {
        "p.png": (image.quantize(16), "rgb24"),
        "pa.png": (image.convert("RGBA").quantize(16), "rgba"),
        "la.png": (image.convert("LA"), "rgba"),
        "one.png": (image.convert("1"), "gray"),
    }
    for name, (picture, pixel_format) in cases.items():
        caplog.clear()
        options = {"transparency": 0} if name == "pa.png" else {}
        picture.save(tmp_path / name, **options)
        assert read_image(tmp_path / name).frame.pixel_format == pixel_format
        assert f"{name}: stored as" in caplog.text


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
def test_one_pixel_works(tmp_path, suffix):
    source = save(tmp_path / f"a{suffix}", samples("rgb24", 1, 1))
    out = rewrite(tmp_path, source, label=LABEL)
    assert to_rgb(read_image(out).frame).shape == (1, 1, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("keep", [0.7, 0.02])
def test_truncated_files(tmp_path, suffix, keep):
    source = save(tmp_path / f"a{suffix}", astronaut())
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(MediaError, match=r"truncated|damaged"):
        read_image(source)


def test_deep_truncated_png(tmp_path):
    source = save(tmp_path / "a.png", samples("rgb48", 100, 100))
    source.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(MediaError, match="truncated"):
        read_image(source)


def write_planar(path, array):
    """Write a TIFF that stores the three colours one after the other."""
    height, width, _ = array.shape
    plane = height * width * array.itemsize
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    directory[256], directory[257], directory[258] = width, height, (8 * array.itemsize,) * 3
    directory[259], directory[262], directory[277], directory[278] = 1, 2, 3, height
    directory[284] = 2
    directory[279] = (plane,) * 3
    directory[273] = tuple(plane * i for i in range(3))  # Pillow counts strip offsets from the directory's end
    planes = np.ascontiguousarray(array.transpose(2, 0, 1)).astype(array.dtype.newbyteorder("<"))
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory.tobytes(8) + planes.tobytes())


def test_bad_inputs_are_one_clear_line(tmp_path):
    def check(path, message, error=MediaError):
        with pytest.raises(error, match=message) as caught:
            read_image(path)
        assert "\n" not in str(caught.value)

    check(tmp_path / "none.jpg", "no such file")
    check(tmp_path, "cannot be read")
    (tmp_path / "zero.jpg").touch()
    check(tmp_path / "zero.jpg", "the file is empty")
    (tmp_path / "text.jpg").write_text("hello")
    check(tmp_path / "text.jpg", "no picture, or a damaged one")
    Image.fromarray(astronaut()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    check(tmp_path / "cmyk.jpg", "its colours are CMYK; convert it to RGB", UnsupportedError)
    frames = [Image.fromarray(astronaut() // n) for n in (1, 2)]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        message = "a GIF file; convert it" if name == "a.gif" else "has 2 (frames|pages)"
        check(tmp_path / name, message, UnsupportedError)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    check(tmp_path / "float.tif", "floating-point", UnsupportedError)
    write_planar(tmp_path / "planar.tif", samples("rgb48"))
    check(tmp_path / "planar.tif", "16-bit colours in planes of their own; store them interleaved", UnsupportedError)
    write_planar(tmp_path / "planar8.tif", samples("rgb24"))
    np.testing.assert_array_equal(read_image(tmp_path / "planar8.tif").frame.planes[0], samples("rgb24"))


def test_a_phones_double_picture_is_read_as_jpeg(tmp_path):
    frames = [Image.fromarray(astronaut() // n) for n in (1, 2)]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    still = read_image(tmp_path / "a.jpg")
    assert still.format == "JPEG"
    assert still.quantization


def flat_png(path, side):
    """A gray picture of zeros; without rows if it is too large to be meant."""
    rows = zlib.compress(bytes((side + 1) * side), 1) if side < 20_000 else b""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_large_pictures(tmp_path):
    # Above Pillow's own limit (89 megapixels), whose warning would be an error here.
    assert read_image(flat_png(tmp_path / "large.png", 9600)).frame.width == 9600
    with pytest.raises(MediaError, match="30000x30000 is 900 megapixels, the limit is 400"):
        read_image(flat_png(tmp_path / "huge.png", 30_000))


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found_in(inputs, **options):
    """What `find_images` finds, and what it passes over."""
    skipped = []
    found = list(find_images(inputs, left_out=lambda *what: skipped.append(what), **options))
    return found, skipped


def test_find_images_keeps_the_tree(tmp_path):
    touch(tmp_path / "in", "b.JPG", "a.png", "sub/deep/c.tiff", "sub/notes.txt", ".hidden.png", ".git/x.png", "d.HEIC")
    touch(tmp_path / "in", "out/a.png")
    (tmp_path / "in" / "sub" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    found, skipped = found_in([tmp_path / "in"], exclude=tmp_path / "in" / "out")
    assert [str(relative) for _, relative in found] == ["a.png", "b.JPG", "sub/deep/c.tiff"]
    assert [path for path, _ in found] == [tmp_path / "in" / relative for _, relative in found]
    assert skipped == [(tmp_path / "in" / "d.HEIC", "kind"), (tmp_path / "in" / "sub" / "notes.txt", "no image")]
    assert ".jpg" in IMAGE_SUFFIXES


def test_find_images_of_several_inputs(tmp_path):
    touch(tmp_path, "one/a.png", "two/a.png", "two/b.png", "c.webp", "c.txt")
    found, skipped = found_in([str(tmp_path / "c.webp"), tmp_path / "c.txt", tmp_path / "one", tmp_path / "one/a.png"])
    assert [str(relative) for _, relative in found] == ["c.webp", "a.png"]
    assert skipped == [(tmp_path / "c.txt", "no image")]
    with pytest.raises(MediaError, match=r"one/a.png and .*two/a.png would both be written to a.png"):
        found_in([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(MediaError, match="no such file or folder"):
        found_in([tmp_path / "none"])
    assert found_in([]) == ([], [])


def test_a_folder_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    touch(tmp_path, "in/a.png", "in/closed/b.png")
    scandir = os.scandir

    def refuse(path):  # permissions do not bind root, who may run the tests
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, skipped = found_in([tmp_path / "in"])
    assert [str(relative) for _, relative in found] == ["a.png"]
    assert skipped == [(tmp_path / "in" / "closed", "closed")]


def test_pictures_without_a_profile_get_none(tmp_path):
    source = save(tmp_path / "a.jpg", astronaut())
    with Image.open(io.BytesIO(rewrite(tmp_path, source).read_bytes())) as image:
        assert not {"icc_profile", "exif", "xmp"} & set(image.info)
