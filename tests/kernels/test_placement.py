"""Frames that are stored turned: positions are those of the picture as it is shown, whatever the memory holds."""

from dataclasses import replace

import numpy as np
import pytest

from faceage.errors import ShapeError
from faceage.kernels import AreaMeans, apply_change, cut_out, gather_crops, luma_plane
from faceage.types import PIXEL_LAYOUTS, Change, ColorSpec, Frame

FORMATS = ["yuv420p", "nv12", "yuv422p10le", "yuv440p", "yuv411p", "p010le", "gray", "rgb24"]
WIDTH, HEIGHT = 64, 48


def make_frame(pixel_format, width=WIDTH, height=HEIGHT):
    layout = PIXEL_LAYOUTS[pixel_format]
    rng = np.random.default_rng(0)
    planes = []
    for spec in layout.planes:
        shape = (height // spec.sub_y, width // spec.sub_x, len(spec.components))
        codes = rng.integers(0.4 * 2**layout.bit_depth, 0.6 * 2**layout.bit_depth, shape)
        planes.append((codes << layout.shift).astype(layout.dtype).reshape(shape if shape[2] > 1 else shape[:2]))
    return Frame(planes=tuple(planes), pixel_format=pixel_format, color=ColorSpec(chroma_siting="center"))


def as_stored(frame, rotation):
    """The same picture in 4:4:4, gray or RGB, stored so that a player has to turn it."""
    planes = tuple(np.ascontiguousarray(np.rot90(plane, -rotation // 90)) for plane in frame.planes)
    return replace(frame, planes=planes, rotation=rotation)


def at_centre(scale, degrees, size_px):
    a = scale * np.exp(1j * np.radians(degrees))
    linear = np.array([[a.real, -a.imag], [a.imag, a.real]])
    return np.column_stack([linear, (size_px - 1) / 2 - linear @ [30.0, 20.0]]).astype(np.float32)


@pytest.mark.parametrize("rotation", [90, 180, 270, -90, 450])
@pytest.mark.parametrize("pixel_format", ["yuv444p", "gray", "rgb24", "yuv444p10le"])
def test_a_turned_frame_gives_the_crops_of_the_upright_one(pixel_format, rotation):
    upright = make_frame(pixel_format)
    turned = as_stored(upright, rotation)
    assert (turned.width, turned.height) == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(luma_plane(turned), luma_plane(upright))
    index, matrix = np.zeros(1, np.int64), at_centre(0.7, 20, 16)[None]
    crops = [gather_crops([frame], index, matrix, 16) for frame in (upright, turned)]
    np.testing.assert_allclose(*crops, atol=2e-5)
    np.testing.assert_allclose(gather_crops([turned], index, matrix, 16, impl="ref"), crops[1], atol=2e-5)


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_a_change_lands_where_the_face_is_shown(pixel_format, rotation):
    """On chroma of any subsampling and siting, by the frame's own planes and by those of the turned picture."""
    frame = replace(make_frame(pixel_format), rotation=rotation)
    before = replace(frame, planes=tuple(plane.copy() for plane in frame.planes))
    size = 32
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    window = ((np.sin(np.pi * x) * np.sin(np.pi * y)) ** 2 * (x < 0.6)).astype(np.float32)
    window[[0, 1, -2, -1]], window[:, [0, 1, -2, -1]] = 0, 0
    delta = np.float32([0.2, 0.1, 0.15])[:, None, None] * window
    matrix = at_centre(0.9, 15, size)
    index = np.zeros(1, np.int64)
    was = gather_crops([frame], index, matrix[None], size)[0]
    apply_change(frame, Change(delta=delta), matrix)
    got = gather_crops([frame], index, matrix[None], size)[0] - was
    assert any((a != b).any() for a, b in zip(frame.planes, before.planes, strict=True))
    luma_got, luma_wanted = (np.tensordot([0.2126, 0.7152, 0.0722], d, 1) for d in (got, delta))
    assert np.corrcoef(luma_got.ravel(), luma_wanted.ravel())[0, 1] > 0.97
    assert abs(luma_got.sum() / luma_wanted.sum() - 1) < 0.05


@pytest.mark.parametrize("siting", ["left", "topleft", "center"])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_chroma_keeps_its_own_siting_when_the_picture_is_turned(siting, rotation):
    """A chroma ramp along the stored x is exact at every position, so a shift of half a sample would show."""
    chroma = np.tile(np.arange(60, 92, dtype=np.uint8), (24, 1))
    planes = (np.full((48, 64), 128, np.uint8), chroma, np.full_like(chroma, 128))
    frame = Frame(
        planes=planes,
        pixel_format="yuv420p",
        color=ColorSpec(matrix="bt601", full_range=True, chroma_siting=siting),
        rotation=rotation,
    )
    size = 8
    matrix = np.array([[1, 0, -20], [0, 1, -20]], np.float32)
    blue = gather_crops([frame], np.zeros(1, np.int64), matrix[None], size)[0, 2]
    y, x = np.mgrid[20 : 20 + size, 20 : 20 + size]
    stored_x = {0: x, 90: 63 - y, 180: 63 - x, 270: y}[rotation]
    code = 60 + stored_x / 2 - (0.25 if siting == "center" else 0)
    np.testing.assert_allclose(blue, 2 * (128 + 1.772 * (code - 128)) / 255 - 1, atol=1e-5)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_a_cut_out_part_shows_what_the_frame_shows_there(pixel_format, rotation):
    frame = replace(make_frame(pixel_format), rotation=rotation)
    part, corner = cut_out(frame, np.float32([11.3, 9.8]), np.float32([33.5, 30.2]))
    x, y = corner.astype(int)
    assert 11 - 3 <= x <= 11
    assert 9 - 3 <= y <= 9
    assert part.width >= 33 - x
    assert part.height >= 30 - y
    np.testing.assert_array_equal(luma_plane(part), luma_plane(frame)[y : y + part.height, x : x + part.width])
    assert all(np.shares_memory(a, b) for a, b in zip(part.planes, frame.planes, strict=True))
    matrix = np.array([[1, 0, -15], [0, 1, -13]], np.float32)[None]
    whole = gather_crops([frame], np.zeros(1, np.int64), matrix, 12)
    matrix[0, :, 2] += corner
    np.testing.assert_allclose(gather_crops([part], np.zeros(1, np.int64), matrix, 12), whole, atol=1e-5)


def test_no_part_lies_outside():
    frame = make_frame("yuv420p")
    assert cut_out(frame, np.float32([-30, 5]), np.float32([0, 20]))[0] is None
    assert cut_out(frame, np.float32([5, 48]), np.float32([20, 60]))[0] is None
    whole, corner = cut_out(frame, np.float32([-30, -5]), np.float32([900, 900]))
    assert (whole.width, whole.height, *corner) == (WIDTH, HEIGHT, 0, 0)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_means_of_a_turned_frame(rotation):
    upright = make_frame("yuv444p")
    frames = [upright, as_stored(upright, rotation)]
    index, low, high = np.zeros(2, np.int64), np.array([[3, 5], [0, 0]]), np.array([[40, 31], [WIDTH, HEIGHT]])
    for impl in ("cpu", "ref"):
        one, other = (AreaMeans([frame], impl=impl) for frame in frames)
        assert (other.width, other.height) == (WIDTH, HEIGHT)
        np.testing.assert_allclose(one.pictures(21, 15), other.pictures(21, 15), atol=1e-6)
        np.testing.assert_allclose(
            one.rectangles(index, low, high, 12), other.rectangles(index, low, high, 12), atol=1e-6
        )


def test_a_rotation_that_is_no_quarter_turn_is_refused():
    with pytest.raises(ShapeError, match="got 45 degrees"):
        replace(make_frame("gray"), rotation=45)
