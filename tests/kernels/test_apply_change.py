import subprocess
import sys

import numpy as np
import pytest
from frames import noise_frame
from numerics import ADD_ATOL_CODES, ADD_MAX_TIES, ROUND_TRIP_ATOL

from faceage.errors import ShapeError
from faceage.kernels import apply_change, change_crop, gather_crops
from faceage.types import PIXEL_LAYOUTS, RGB, Change, ColorSpec, Frame

SIZE = 32


def make_frame(pixel_format, width=150, height=121, color=None, seed=0, span=(0.3, 0.7)):
    """Noise in padded planes; chroma lies in the middle of its luma samples."""
    is_rgb = PIXEL_LAYOUTS[pixel_format].planes[0].components.startswith("RGB")
    color = color or (RGB if is_rgb else ColorSpec(chroma_siting="center"))
    return noise_frame(pixel_format, width, height, color=color, seed=seed, span=span, padding=7)


def copy_frame(frame):
    planes = tuple(p.copy() for p in frame.planes)
    return Frame(planes=planes, pixel_format=frame.pixel_format, color=frame.color)


def similarity(scale, degrees=0.0, center=(75.0, 60.0), size_px=SIZE):
    a = scale * np.exp(1j * np.radians(degrees))
    linear = np.array([[a.real, -a.imag], [a.imag, a.real]])
    return np.column_stack([linear, (size_px - 1) / 2 - linear @ np.array(center)]).astype(np.float32)


def smooth_delta(size_px=SIZE, amplitude=0.3, seed=0):
    """A colourful bump under a mask that is 0 on the rim of two: float32 [3, S, S]."""
    y, x = (np.mgrid[:size_px, :size_px] + 0.5) / size_px
    window = (np.sin(np.pi * x) * np.sin(np.pi * y)) ** 2
    phase = np.random.default_rng(seed).uniform(0, 6, 3)[:, None, None]
    delta = amplitude * window * np.cos(4 * x + 3 * y + phase)
    delta[:, [0, 1, -2, -1]] = 0
    delta[:, :, [0, 1, -2, -1]] = 0
    return delta.astype(np.float32)


def rough_delta(size_px=SIZE, amplitude=0.5, seed=0):
    delta = np.zeros((3, size_px, size_px), np.float32)
    inner = np.random.default_rng(seed).normal(0, amplitude, (3, size_px - 4, size_px - 4))
    delta[:, 2:-2, 2:-2] = inner
    return delta


def rough_gain(size_px=SIZE, amplitude=0.3):
    return rough_delta(size_px, amplitude, seed=1)[0]


def only(delta):
    return Change(delta=delta)


MATRICES = {
    "enlarged": similarity(0.3),
    "much enlarged, rotated": similarity(0.11, 20),
    "same size": similarity(1.0, center=(70, 60)),
    "reduced, rotated": similarity(1.7, -50),
    "much reduced": similarity(6.3, 10),
    "over the edge": similarity(0.4, 130, (5, 118)),
}


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize(
    ("has_gain", "dark"),
    [(False, None), (True, None), (True, (0.3, 0.7))],
    ids=["delta", "gain and delta", "dark samples"],
)
def test_cpu_equals_reference(pixel_format, matrix, has_gain, dark):
    fast = make_frame(pixel_format)
    slow = copy_frame(fast)
    change = Change(delta=rough_delta(), gain=rough_gain() if has_gain else None, dark=dark)
    rect = apply_change(fast, change, matrix)
    assert rect == apply_change(slow, change, matrix, impl="ref")
    for a, b in zip(fast.planes, slow.planes, strict=True):
        apart = np.abs(a.astype(np.int64) - b) >> PIXEL_LAYOUTS[pixel_format].shift
        assert apart.max() <= ADD_ATOL_CODES
        assert np.mean(apart > 0) <= ADD_MAX_TIES[PIXEL_LAYOUTS[pixel_format].bit_depth]


@pytest.mark.parametrize(
    ("pixel_format", "impl"), [*((f, "cpu") for f in PIXEL_LAYOUTS), ("yuv420p", "ref"), ("rgb48", "ref")]
)
def test_nothing_outside_the_quadrilateral_changes(pixel_format, impl):
    for name, matrix in MATRICES.items():
        frame = make_frame(pixel_format, span=(0, 1))
        before = copy_frame(frame)
        x0, y0, x1, y1 = apply_change(frame, Change(delta=rough_delta(), gain=rough_gain()), matrix, impl=impl)
        for plane, old, spec in zip(frame.planes, before.planes, frame.layout.planes, strict=True):
            y, x = np.mgrid[: plane.shape[0], : plane.shape[1]].astype(np.float64)
            x, y = (x + 0.5) * spec.sub_x - 0.5, (y + 0.5) * spec.sub_y - 0.5  # the sample's luma centre
            u = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
            v = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
            outside = (np.minimum(u, v) < -0.5) | (np.maximum(u, v) > SIZE - 0.5)
            changed = plane != old
            changed = changed.any(-1) if changed.ndim == 3 else changed
            assert changed.any(), name
            assert not (changed & outside).any(), name
            touched = (x >= x0 - 0.5) & (x <= x1) & (y >= y0 - 0.5) & (y <= y1)
            assert not (changed & ~touched).any(), name
            whole = plane.base  # the padding of the rows
            assert not whole[plane.shape[0] :].any()
            assert not whole[:, plane.shape[1] :].any()


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
def test_no_delta_and_no_overlap_touch_nothing(pixel_format):
    frame = make_frame(pixel_format, span=(0, 1))
    before = copy_frame(frame)
    assert apply_change(frame, only(np.zeros((3, SIZE, SIZE), np.float32)), MATRICES["enlarged"]) is None
    assert apply_change(frame, only(rough_delta()), similarity(0.5, 0, (-500, 20))) is None
    assert apply_change(frame, only(rough_delta()), similarity(0.5, 0, (75, 900))) is None
    tiny = rough_delta(amplitude=1e-7)
    assert apply_change(frame, only(tiny), MATRICES["enlarged"]) is not None
    for a, b in zip(frame.planes, before.planes, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("impl", ["cpu", "ref"])
def test_of_a_change_whose_part_is_known_the_rest_is_left_out(impl, matrix):
    left, top, right, bottom = part = (5, 8, SIZE - 9, SIZE - 4)
    inside = np.zeros((SIZE, SIZE), np.float32)
    inside[top:bottom, left:right] = 1
    maps = {"delta": rough_delta() * inside, "gain": rough_gain() * inside}
    whole, cut = make_frame("yuv420p"), make_frame("yuv420p")
    apply_change(whole, Change(**maps), matrix, impl=impl)
    apply_change(cut, Change(**maps, part=part), matrix, impl=impl)
    for a, b in zip(whole.planes, cut.planes, strict=True):
        np.testing.assert_allclose(a.astype(int), b, atol=ADD_ATOL_CODES)
    assert apply_change(cut, Change(**maps, part=(4, 4, 4, 4)), matrix, impl=impl) is None


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "nv12", "rgb48"])
def test_a_change_and_the_one_that_it_turns_into_are_mixed(impl, pixel_format):
    first = Change(delta=rough_delta(), gain=rough_gain(), dark=(0.2, 0.6))
    second = Change(delta=rough_delta()[:, ::-1].copy(), gain=rough_gain().T.copy(), dark=(0.4, 0.9))
    other = Change(delta=second.delta, gain=second.gain)  # without limits of its own it takes the first one's
    nothing = Change(delta=np.zeros((3, SIZE, SIZE), np.float32))
    for after, dark in ((second, (0.26, 0.69)), (other, (0.2, 0.6)), (nothing, (0.2, 0.6))):
        gain = 0.7 * first.gain + (0 if after.gain is None else 0.3 * after.gain)
        want = Change(delta=0.7 * first.delta + np.float32(0.3) * after.delta, gain=gain.astype(np.float32), dark=dark)
        mixed, expected = make_frame(pixel_format), make_frame(pixel_format)
        apply_change(mixed, first, MATRICES["enlarged"], 0.8, following=after, share=0.3, impl=impl)
        apply_change(expected, want, MATRICES["enlarged"], 0.8, impl="ref")
        for a, b in zip(mixed.planes, expected.planes, strict=True):
            np.testing.assert_allclose(a.astype(int), b, atol=ADD_ATOL_CODES)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "nv12", "yuv444p10le", "rgb24", "gray"])
def test_a_change_that_was_applied_before_gives_what_a_new_one_gives(pixel_format):
    parts = {"delta": rough_delta(), "gain": rough_gain(), "dark": (0.3, 0.7)}
    known, scaled = Change(**parts), Change(**parts).scaled(0.6)
    for matrix in MATRICES.values():
        apply_change(make_frame(pixel_format), known, matrix)
    for matrix in MATRICES.values():
        again, fresh, of_scaled = (make_frame(pixel_format) for _ in range(3))
        assert apply_change(again, known, matrix, 0.6) == apply_change(fresh, Change(**parts), matrix, 0.6)
        apply_change(of_scaled, scaled, matrix)
        for a, b, c in zip(again.planes, fresh.planes, of_scaled.planes, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, c.astype(np.int64), atol=ADD_ATOL_CODES)


def test_samples_whose_difference_rounds_to_zero_keep_stray_bits():
    frame = make_frame("p010le")
    for plane in frame.planes:
        plane |= 0x2A
    frame.planes[0][:] = 0xFFFF
    before = copy_frame(frame)
    delta = smooth_delta(amplitude=-1e-4)
    delta[:, 16, 16] = -1.0
    apply_change(frame, only(delta), MATRICES["same size"])
    changed = frame.planes[0] != before.planes[0]
    assert 0 < changed.sum() < 60
    np.testing.assert_array_equal(frame.planes[0][~changed], 0xFFFF)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p10le", "p010le", "gray16", "rgb24", "rgb48"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_clips_at_the_ends_of_the_code_range(impl, pixel_format, sign):
    frame = make_frame(pixel_format, span=(0, 1))
    delta = np.zeros((3, SIZE, SIZE), np.float32)
    delta[:, 2:-2, 2:-2] = sign * 3
    apply_change(frame, only(delta), similarity(0.3), impl=impl)
    middle = frame.planes[0][50:70, 65:85]
    layout = frame.layout
    want = 0 if sign < 0 else (2**layout.bit_depth - 1) << layout.shift
    np.testing.assert_array_equal(middle, want)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("pixel_format", ["rgba", "rgba64"])
def test_alpha_is_never_touched(impl, pixel_format):
    frame = make_frame(pixel_format)
    alpha = frame.planes[0][..., 3].copy()
    apply_change(frame, only(rough_delta()), MATRICES["much enlarged, rotated"], impl=impl)
    np.testing.assert_array_equal(frame.planes[0][..., 3], alpha)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "nv12", "yuv444p10le", "p010le", "rgb48"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020", "smpte240m"])
@pytest.mark.parametrize("full_range", [False, True])
def test_adding_then_gathering_gives_the_delta_back(pixel_format, matrix, full_range):
    color = ColorSpec(matrix=matrix, full_range=full_range)
    frame = make_frame(pixel_format, 320, 240, color)
    index, to_crop = np.zeros(1, np.int64), similarity(0.16, 15, (160, 120))
    before = gather_crops([frame], index, to_crop[None], SIZE)
    delta = smooth_delta()
    apply_change(frame, only(delta), to_crop)
    got = (gather_crops([frame], index, to_crop[None], SIZE) - before)[0]
    np.testing.assert_allclose(got, delta, atol=ROUND_TRIP_ATOL[frame.layout.bit_depth])
    # The bound is a small part of the signal, and there is no offset and no wrong colour.
    assert np.abs(delta).max() > 0.25
    assert abs((got - delta).mean()) < 1e-3
    gain = [float((g * d).sum() / (d * d).sum()) for g, d in zip(got, delta, strict=True)]
    np.testing.assert_allclose(gain, 1, atol=0.02)


@pytest.mark.parametrize("siting", ["left", "center", "topleft"])
def test_chroma_lands_on_its_siting(siting):
    # A ramp is reproduced exactly by every filter, so the chroma's own position can be read off.
    frame = make_frame("yuv420p", 160, 120, ColorSpec(matrix="bt601", full_range=True, chroma_siting=siting))
    delta = np.zeros((3, SIZE, SIZE), np.float32)
    delta[2, 2:-2, 2:-2] = np.arange(2, SIZE - 2) * 0.05  # blue rises with x
    to_crop = similarity(0.25, 0, (79.5, 59.5))
    before = copy_frame(frame)
    apply_change(frame, only(delta), to_crop)
    got = (frame.planes[1].astype(int) - before.planes[1])[30, 20:60]
    luma_x = 2 * np.arange(20, 60) + (0.5 if siting == "center" else 0)
    want = 0.5 * 255 / 2 * 0.05 * (to_crop[0, 0] * luma_x + to_crop[0, 2])
    assert np.abs(got - want).max() <= 0.51
    assert abs((got - want).mean()) < 0.05


def test_enlarged_delta_has_no_facets():
    # 64 pixels on 500: the second difference of the result stays near that of the smooth function itself.
    size = 64
    frame = Frame(planes=(np.full((520, 520), 30000, np.uint16),), pixel_format="gray16", color=ColorSpec())
    delta = smooth_delta(size, 0.5)
    delta[:] = delta[0]
    apply_change(frame, only(delta), similarity(size / 500, 0, (259.5, 259.5), size))
    line = frame.planes[0][260].astype(float)
    curvature = np.abs(np.diff(line, 2))
    steps = np.abs(np.diff(line))
    assert steps.max() > 100
    assert curvature[40:-40].max() < 0.15 * steps.max()


def test_views_that_are_not_contiguous_work_in_place():
    buffer = make_frame("rgba").planes[0].copy()
    mirrored = Frame(planes=(buffer[:, ::-1],), pixel_format="rgba", color=RGB)
    plain = Frame(planes=(np.ascontiguousarray(buffer[:, ::-1]),), pixel_format="rgba", color=RGB)
    for frame in (mirrored, plain):
        apply_change(frame, Change(delta=rough_delta(), gain=rough_gain()), MATRICES["enlarged"])
    np.testing.assert_array_equal(buffer[:, ::-1], plain.planes[0])


def test_wrong_shape_is_named():
    with pytest.raises(ShapeError, match=r"got \(3, 8, 9\)"):
        Change(delta=np.zeros((3, 8, 9), np.float32))
    with pytest.raises(ShapeError, match=r"got \(3, 8, 8\) and \(8, 9\)"):
        Change(delta=np.zeros((3, 8, 8), np.float32), gain=np.zeros((8, 9), np.float32))
    with pytest.raises(ShapeError, match=r"got \(3, 3\)"):
        apply_change(make_frame("gray"), only(rough_delta()), np.eye(3, dtype=np.float32))


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
def test_a_gain_of_zero_is_none(pixel_format):
    plain, zero = make_frame(pixel_format), make_frame(pixel_format)
    rect = apply_change(plain, only(rough_delta()), MATRICES["enlarged"])
    change = Change(delta=rough_delta(), gain=np.zeros((SIZE, SIZE), np.float32))
    assert rect == apply_change(zero, change, MATRICES["enlarged"])
    for a, b in zip(plain.planes, zero.planes, strict=True):
        np.testing.assert_array_equal(a, b)


def plateau(value):
    """A gain or luma that is the same everywhere but near the rim."""
    gain = np.zeros((SIZE, SIZE), np.float32)
    gain[2:-2, 2:-2] = value
    return gain


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv420p10le", "p010le", "gray12le", "gray16"])
def test_a_gain_scales_the_luma_above_black_and_no_chroma(impl, full_range, pixel_format):
    frame = make_frame(pixel_format, color=ColorSpec(full_range=full_range))
    before = copy_frame(frame)
    change = Change(delta=np.zeros((3, SIZE, SIZE), np.float32), gain=plateau(-0.2))
    apply_change(frame, change, similarity(0.3), impl=impl)
    layout, middle = frame.layout, (slice(50, 70), slice(65, 85))
    old, new = (f.planes[0][middle].astype(float) / 2**layout.shift for f in (before, frame))
    depth = 2.0 ** (layout.bit_depth - 8)
    black, span = (0, 2.0**layout.bit_depth - 1) if full_range else (16 * depth, 219 * depth)
    want = black + span * ((old - black) / span - 0.2 * ((old - black) / span + 0.04))
    assert np.abs(new - want).max() <= 0.51
    for chroma, untouched in zip(frame.planes[1:], before.planes[1:], strict=True):
        np.testing.assert_array_equal(chroma, untouched)


@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("pixel_format", ["rgb24", "rgba", "rgb48", "rgba64"])
def test_a_gain_adds_one_grey_value_to_rgb(impl, pixel_format):
    frame = make_frame(pixel_format)
    before = copy_frame(frame)
    change = Change(delta=np.zeros((3, SIZE, SIZE), np.float32), gain=plateau(0.2))
    apply_change(frame, change, similarity(0.3), impl=impl)
    middle = (slice(50, 70), slice(65, 85), slice(3))
    old, new = (f.planes[0][middle].astype(float) for f in (before, frame))
    luma = old @ [0.299, 0.587, 0.114]
    want = old + 0.2 * (luma + 0.04 * (2.0**frame.layout.bit_depth - 1))[..., None]
    assert np.abs(new - want).max() <= 0.51


def test_a_gain_on_rgb_and_on_yuv_is_the_same_map():
    yuv = make_frame("yuv444p12le", color=ColorSpec(matrix="bt601", full_range=True))
    index, to_crop = np.zeros(1, np.int64), np.float32([[1, 0, -40], [0, 1, -30]])
    (crop,) = gather_crops([yuv], index, to_crop[None], SIZE)
    change = Change(delta=smooth_delta(amplitude=0.1), gain=rough_gain(amplitude=0.1))
    apply_change(yuv, change, to_crop)
    (changed,) = gather_crops([yuv], index, to_crop[None], SIZE)
    np.testing.assert_allclose(changed, change_crop(crop, change), atol=2e-3)  # 12-bit codes
    assert np.abs(changed - crop).max() > 0.1


def test_a_gain_keeps_native_detail():
    # A crop of 32 on a face of about 300: the picture's own texture is finer than the crop's pixels.
    frame = make_frame("gray16", 400, 400)
    before = frame.planes[0].astype(float)
    change = Change(delta=np.zeros((3, SIZE, SIZE), np.float32), gain=plateau(-0.5))
    apply_change(frame, change, similarity(SIZE / 300, 0, (199.5, 199.5)))
    middle = (slice(150, 250), slice(150, 250))
    ratio = frame.planes[0][middle].std() / before[middle].std()
    assert abs(ratio - 0.5) < 0.01


def test_a_cpu_run_imports_no_torch():
    program = (
        "import sys, numpy as np; from faceage.kernels import apply_change, gather_crops; "
        "from faceage.types import Change, ColorSpec, Frame; "
        "frame = Frame(planes=(np.zeros((50, 50), np.uint8),), pixel_format='gray', color=ColorSpec()); "
        "matrix = np.eye(2, 3, dtype=np.float32); gather_crops([frame], np.zeros(1, int), matrix[None], 16); "
        "apply_change(frame, Change(delta=np.ones((3, 16, 16), np.float32)), matrix); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
