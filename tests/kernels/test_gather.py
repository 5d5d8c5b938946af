import dataclasses
import itertools

import numpy as np
import pytest
from frames import noise_frame
from numerics import GATHER_ATOL

from faceage.errors import ShapeError
from faceage.kernels import color_of, gather_crops, rgb_to_yuv_delta, yuv_to_rgb
from faceage.kernels.gather import box_factors
from faceage.kernels.placement import crop_to_plane
from faceage.types import PIXEL_LAYOUTS, RGB, ColorSpec, Frame, PlaneLayout

SITINGS = ("left", "center", "topleft")


def similarity(scale, degrees=0.0, center=(0.0, 0.0), size_px=16):
    """Frame to crop, with the frame's point `center` at the crop's centre: float32 [1, 2, 3]."""
    a = scale * np.exp(1j * np.radians(degrees))
    linear = np.array([[a.real, -a.imag], [a.imag, a.real]])
    offset = (size_px - 1) / 2 - linear @ np.array(center)
    return np.column_stack([linear, offset])[None].astype(np.float32)


MATRICES = {
    "same size": similarity(1.0, center=(40, 40)),
    "enlarged, rotated": similarity(3.1, 25, (50.3, 30.7)),
    "reduced by 2": similarity(0.5, center=(45, 41)),
    "reduced, rotated": similarity(0.23, -130, (48, 40)),
    "over the edge": similarity(0.4, 10, (2, 80)),
    "far outside": similarity(0.7, 5, (-500, 900)),
    "whole frame and more": similarity(0.09, 3, (50, 40)),
}


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_cpu_equals_reference(pixel_format, matrix):
    chroma = any(spec.sub_x * spec.sub_y > 1 for spec in PIXEL_LAYOUTS[pixel_format].planes)
    for siting in SITINGS if chroma else SITINGS[:1]:
        color = ColorSpec(matrix="bt601", chroma_siting=siting)
        frame = noise_frame(pixel_format, color=None if "rgb" in pixel_format else color)
        index = np.zeros(1, np.int64)
        fast = gather_crops([frame], index, matrix, 16)
        assert fast.shape == (1, 3, 16, 16)
        assert fast.dtype == np.float32
        np.testing.assert_allclose(fast, gather_crops([frame], index, matrix, 16, impl="ref"), atol=GATHER_ATOL)


def ramp_frame(pixel_format, color, width, height, slopes):
    """Planes whose codes are linear in the luma position: slopes[c] = value at the origin, per x, per y."""
    layout = PIXEL_LAYOUTS[pixel_format]
    planes, component = [], 0
    for spec in layout.planes:
        y, x = np.mgrid[: -(-height // spec.sub_y), : -(-width // spec.sub_x)].astype(np.float64)
        x = x * spec.sub_x + (0.5 if spec.sub_x == 2 and color.chroma_siting == "center" else 0)
        y = y * spec.sub_y + (0.5 if spec.sub_y == 2 and color.chroma_siting != "topleft" else 0)
        parts = []
        for _ in spec.components:
            at_origin, per_x, per_y = slopes[component]
            parts.append(at_origin + per_x * x + per_y * y)
            component += 1
        codes = np.stack(parts, -1) if len(parts) > 1 else parts[0]
        planes.append(np.round(codes).astype(np.int64) << layout.shift)
        assert np.abs(codes - np.round(codes)).max() < 1e-9, "the ramp must be exact in codes"
    planes = tuple(p.astype(layout.dtype) for p in planes)
    return Frame(planes=planes, pixel_format=pixel_format, color=color)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "nv12", "yuv422p10le", "yuv444p", "p010le"])
@pytest.mark.parametrize("siting", SITINGS)
@pytest.mark.parametrize(("scale", "degrees"), [(1, 0), (0.5, 0), (0.25, 30), (2.5, -70), (1 / 3, 90)])
def test_ramp_is_exact_at_every_position(impl, pixel_format, siting, scale, degrees):
    # A box mean and a bilinear sample both reproduce a linear ramp, so any half-pixel error shows.
    color = ColorSpec(matrix="bt709", chroma_siting=siting)
    layout = PIXEL_LAYOUTS[pixel_format]
    unit = 2 ** (layout.bit_depth - 8)
    slopes = np.array([[20, 1, 1], [100, 0, 0], [100, 0, 0]], float) * unit
    slopes[1], slopes[2] = (90 * unit, 2, 0), (160 * unit, 0, -2)  # even, so half-way sites have whole codes
    width, height = (96, 60) if layout.bit_depth > 8 else (72, 40)
    frame = ramp_frame(pixel_format, color, width, height, slopes)
    size = 8
    matrix = similarity(scale, degrees, (width / 2, height / 2), size)
    if scale < 0.5:
        size, matrix = 4, similarity(scale, degrees, (width / 2, height / 2), 4)
    crop = gather_crops([frame], np.zeros(1, np.int64), matrix, size, impl=impl)[0]

    full = np.vstack([matrix[0].astype(np.float64), [0, 0, 1]])
    y, x = np.mgrid[:size, :size]
    points = np.linalg.inv(full) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    codes = slopes @ np.stack([np.ones(x.size), points[0], points[1]])
    y_lim, c_lim = (codes[0] / unit - 16) / 219, (codes[1:] / unit - 128) / 224
    red, blue = y_lim + 1.5748 * c_lim[1], y_lim + 1.8556 * c_lim[0]
    green = (y_lim - 0.2126 * red - 0.0722 * blue) / 0.7152
    want = np.clip(2 * np.stack([red, green, blue]) - 1, -1, 1).reshape(3, size, size)
    assert np.abs(want).max() < 1, "the ramp must not be clamped"
    np.testing.assert_allclose(crop, want, atol=1e-5)


def test_reduction_is_antialiased():
    frame = noise_frame("gray", 512, 512, color=ColorSpec(full_range=True))
    stripes = Frame(
        planes=(np.ascontiguousarray(np.tile(np.uint8([0, 0, 255, 255]), (512, 128))),),
        pixel_format="gray",
        color=frame.color,
    )
    crop = gather_crops([stripes], np.zeros(1, np.int64), similarity(1 / 8, 0, (255.5, 255.5), 64), 64)
    np.testing.assert_allclose(crop, 0, atol=1e-5)


def test_box_is_the_planes_own():
    frame, matrix = noise_frame("yuv420p"), similarity(0.25, 37)[0]
    assert box_factors(crop_to_plane(frame, PlaneLayout("Y"), matrix)) == (4, 4)
    assert box_factors(crop_to_plane(frame, PlaneLayout("U", 2, 2), matrix)) == (2, 2)
    assert box_factors(crop_to_plane(frame, PlaneLayout("U", 2, 1), matrix)) == (2, 4)


def test_no_face_and_several_frames():
    frames = [noise_frame("yuv420p"), noise_frame("nv12", 64, 48, seed=1), noise_frame("rgba64", seed=2)]
    empty = gather_crops(frames, np.zeros(0, np.int64), np.zeros((0, 2, 3), np.float32), 16)
    assert empty.shape == (0, 3, 16, 16)
    index = np.array([2, 0, 1, 0])
    matrices = np.concatenate(list(MATRICES.values())[:4])
    batch = gather_crops(frames, index, matrices, 16)
    for row, frame in enumerate(index):
        one = gather_crops([frames[frame]], np.zeros(1, np.int64), matrices[row : row + 1], 16)
        np.testing.assert_array_equal(batch[row], one[0])


def test_one_pixel_frame_and_padded_planes():
    for pixel_format in PIXEL_LAYOUTS:
        frame = noise_frame(pixel_format, 1, 1)
        crop = gather_crops([frame], np.zeros(1, np.int64), MATRICES["reduced, rotated"], 8)
        assert np.ptp(crop, axis=(2, 3)).max() < 1e-5
        frame = noise_frame(pixel_format, 30, 22)
        wide = [np.pad(p, [(0, 3), (0, 5)] + [(0, 0)] * (p.ndim - 2), constant_values=7) for p in frame.planes]
        views = tuple(w[: p.shape[0], : p.shape[1]] for w, p in zip(wide, frame.planes, strict=True))
        padded = dataclasses.replace(frame, planes=views)
        for matrix in MATRICES.values():
            crops = [gather_crops([f], np.zeros(1, np.int64), matrix, 8) for f in (frame, padded)]
            np.testing.assert_array_equal(*crops)


def test_alpha_is_ignored_and_gray_is_neutral():
    rgba = noise_frame("rgba")
    rgb = Frame(planes=(rgba.planes[0][..., :3],), pixel_format="rgb24", color=RGB)
    gray = noise_frame("gray16")
    index, matrix = np.zeros(1, np.int64), MATRICES["reduced, rotated"]
    np.testing.assert_array_equal(gather_crops([rgba], index, matrix, 16), gather_crops([rgb], index, matrix, 16))
    crop = gather_crops([gray], index, matrix, 16)
    np.testing.assert_allclose(crop[:, :1].repeat(3, 1), crop, atol=1e-6)


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020", "smpte240m", "rgb"])
@pytest.mark.parametrize(("full_range", "depth"), itertools.product([False, True], [8, 10, 16]))
def test_color_matrices(matrix, full_range, depth):
    color = ColorSpec(matrix=matrix, full_range=full_range)
    linear, offset = yuv_to_rgb(color, depth)
    unit, mid = 2 ** (depth - 8), 2 ** (depth - 1)
    black, white = (0, 2**depth - 1) if full_range else (16 * unit, 235 * unit)
    neutral = (lambda v: [v, v, v]) if matrix == "rgb" else (lambda v: [v, mid, mid])
    np.testing.assert_allclose(linear @ neutral(black) + offset, -1, atol=1e-12)
    np.testing.assert_allclose(linear @ neutral(white) + offset, 1, atol=1e-12)
    np.testing.assert_allclose(rgb_to_yuv_delta(color, depth) @ linear, np.eye(3), atol=1e-12)
    if matrix == "bt601" and full_range and depth == 8:  # JFIF: the saturated red of the JPEG standard
        red = rgb_to_yuv_delta(color, 8) @ [2, 0, 0]
        np.testing.assert_allclose(red, [76.245, -0.168736 * 255, 127.5], atol=1e-3)


def test_pixel_format_wins_over_contradicting_tags():
    assert color_of(noise_frame("rgb24", color=ColorSpec())).matrix == "rgb"
    assert color_of(noise_frame("yuvj420p", color=ColorSpec(full_range=False))).full_range
    assert color_of(noise_frame("gray", color=RGB)).matrix != "rgb"


def test_wrong_shape_is_named():
    with pytest.raises(ShapeError, match=r"expected frame_to_crop \[2, 2, 3\], got \(1, 2, 3\)"):
        gather_crops([noise_frame("gray")], np.zeros(2, np.int64), MATRICES["same size"], 8)
