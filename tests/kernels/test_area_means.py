from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
from frames import as_tensors, noise_frame
from torch import from_numpy
from torch.nn.functional import interpolate

from faceage.kernels import AreaMeans, gather_crops, yuv_to_rgb
from faceage.kernels.color import color_of
from faceage.types import PIXEL_LAYOUTS, RGB, Frame

LOW, HIGH = np.array([[0, 0], [70, 20], [17, 3], [96, 82]]), np.array([[91, 75], [81, 29], [65, 52], [97, 83]])
INDEX = np.zeros(4, np.int64)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize(("pixel_format", "peak"), [("rgb24", 255), ("rgba", 255), ("rgb48", 65535), ("gray", 255)])
def test_equals_adaptive_pooling(impl, pixel_format, peak):
    """Frames with samples at full resolution give MTCNN's own pixels: (x - 127.5) / 128 of 8-bit values."""
    frame = noise_frame(pixel_format, color=RGB)
    plane = frame.planes[0] if frame.planes[0].ndim == 3 else np.repeat(frame.planes[0][..., None], 3, 2)
    picture = np.float32(plane[..., :3]) * np.float32(255 / peak)
    pixels = from_numpy((picture.transpose(2, 0, 1)[None] - np.float32(127.5)) / 128)
    means = AreaMeans([frame], scale=127.5 / 128, impl=impl)
    level = means.pictures(40, 33)[0]
    assert level.shape == (3, 34, 40)
    np.testing.assert_allclose(level[:, :33], interpolate(pixels, size=(33, 40), mode="area")[0], atol=1e-5)
    np.testing.assert_allclose(level[:, 33], level[:, 32], atol=1e-6)
    for (x0, y0), (x1, y1), crop in zip(LOW, HIGH, means.rectangles(INDEX, LOW, HIGH, 24), strict=True):
        want = interpolate(pixels[..., y0:y1, x0:x1], size=(24, 24), mode="area")[0]
        np.testing.assert_allclose(crop, want, atol=1e-5)


def mean_by_loops(frame, low, high, size_px):
    """The formula, bin by bin, in float64."""
    matrix, offset = yuv_to_rgb(color_of(frame), frame.layout.bit_depth)
    out = np.empty((3, size_px, size_px))
    for row in range(size_px):
        for column in range(size_px):
            codes = []
            for plane, spec in zip(frame.planes, frame.layout.planes, strict=True):
                ends = []
                for i, axis, sub in ((column, 0, spec.sub_x), (row, 1, spec.sub_y)):
                    length = high[axis] - low[axis]
                    first = (low[axis] + i * length // size_px) // sub
                    ends.append((first, -(-(low[axis] - (-(i + 1) * length // size_px)) // sub)))
                (x0, x1), (y0, y1) = ends
                samples = plane[y0:y1, x0:x1].astype(np.float64) / 2**frame.layout.shift
                codes += [samples.mean()] if samples.ndim == 2 else list(samples.mean((0, 1)))
            codes += [2 ** (frame.layout.bit_depth - 1)] * (3 - len(codes))
            out[:, row, column] = matrix @ codes[:3] + offset
    return out.clip(-1, 1)


@pytest.mark.parametrize("kind", ["cpu", "ref", "tensor"])
@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
def test_equals_the_formula_in_every_format(pixel_format, kind):
    frame = noise_frame(pixel_format, padding=5)
    means = AreaMeans([as_tensors(frame)]) if kind == "tensor" else AreaMeans([frame], impl=kind)
    got = means.rectangles(INDEX, LOW, HIGH, 6)
    for crop, low, high in zip(got, LOW, HIGH, strict=True):
        np.testing.assert_allclose(crop, mean_by_loops(frame, low, high, 6), atol=1e-5)
    whole = means.rectangles(INDEX[:1], np.zeros((1, 2), np.int64), np.array([[97, 83]]), 12)
    np.testing.assert_allclose(whole, means.pictures(12, 12), atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
def test_rectangles_of_several_frames_come_in_their_own_order(impl):
    frames = [noise_frame("nv12", seed=seed) for seed in range(3)]
    index = np.array([2, 0, 2, 1])
    got = AreaMeans(frames, impl=impl).rectangles(index, LOW, HIGH, 8)
    for row, frame in enumerate(index):
        one = AreaMeans([frames[frame]], impl=impl).rectangles(INDEX[:1], LOW[[row]], HIGH[[row]], 8)
        np.testing.assert_allclose(got[row], one[0], atol=1e-6)
    assert AreaMeans(frames, impl=impl).rectangles(index[:0], LOW[:0], HIGH[:0], 8).shape == (0, 3, 8, 8)


def test_agrees_with_the_gathered_crop():
    """Two ways to read the same rectangle: bins of two by two, and a box mean of two by two."""
    frame = Frame(
        planes=(np.random.default_rng(0).integers(60, 190, (64, 64)).astype(np.uint8),), pixel_format="gray", color=RGB
    )
    matrix = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25]], np.float32)
    crop = gather_crops([frame], np.zeros(1, np.int64), matrix[None], 32)
    np.testing.assert_allclose(AreaMeans([frame]).pictures(32, 32), crop, atol=1e-5)


def waves(pixel_format, width, height, rotation):
    """A frame of broad shapes, the same ones in all planes: noise would be blurred more or less."""
    layout = PIXEL_LAYOUTS[pixel_format]
    planes = []
    for plane, spec in zip(noise_frame(pixel_format, width, height).planes, layout.planes, strict=True):
        y, x = np.mgrid[: plane.shape[0], : plane.shape[1]]
        wave = np.sin((x + 0.5) * spec.sub_x / 17) * np.cos((y + 0.5) * spec.sub_y / 23)
        depth = 0.3 if spec.components[0] in "YR" else 0.06
        codes = ((0.5 + depth * wave) * 2**layout.bit_depth).astype(plane.dtype) << layout.shift
        planes.append(codes if plane.ndim == 2 else np.dstack([codes] * plane.shape[2]))
    return replace(noise_frame(pixel_format, width, height, rotation=rotation), planes=tuple(planes))


@pytest.mark.parametrize(("pixel_format", "rotation"), zip(PIXEL_LAYOUTS, cycle([0, 90])))
def test_a_reduced_frame_shows_nearly_the_same(pixel_format, rotation):
    frame = waves(pixel_format, 241, 190, rotation)
    whole, reduced = AreaMeans([frame]), AreaMeans([frame], shrink=2)
    low, high = np.array([[0, 0], [33, 51], [7, 90]]), np.array([[whole.width, whole.height], [92, 110], [88, 170]])
    pairs = [(whole.pictures(*size), reduced.pictures(*size)) for size in ((60, 47), (25, 20), (13, 11))]
    pairs.append(tuple(means.rectangles(INDEX[:3], low, high, 24) for means in (whole, reduced)))
    for wanted, got in pairs:
        assert got.shape == wanted.shape
        # A shift by half a cell would change cells by half of what neighbours differ by.
        assert np.abs(got - wanted).mean() < 0.3 * np.abs(np.diff(wanted)).mean()
    assert reduced.rectangles(INDEX[:0], low[:0], high[:0], 8).shape == (0, 3, 8, 8)
