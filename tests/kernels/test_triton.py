"""The Triton kernels, on a machine without a GPU under Triton's interpreter: `conftest` turns it on."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from frames import as_tensors, noise_frame
from numerics import ADD_ATOL_CODES, KERNEL_ADD_MAX_TIES, KERNEL_ATOL

from faceage.kernels import (
    AreaMeans,
    apply_change,
    begin_thumbnail,
    color_of,
    gather_crops,
    rgb_to_yuv_delta,
    yuv_to_rgb,
)
from faceage.kernels import implementation as implementation_module
from faceage.kernels.apply_change import BLACK_OFFSET, enlarge_factor
from faceage.kernels.color import RGB_LUMA, luma_codes
from faceage.kernels.gather import box_factors
from faceage.kernels.implementation import choose_implementation
from faceage.kernels.placement import crop_to_plane, upright
from faceage.types import PIXEL_LAYOUTS, Change, ColorSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HEIGHT = 45, 37
SIZE = 10
ROTATIONS = (0, 90, 180, 270)


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter takes the same time for a large block as for a small one."""
    from faceage.kernels import apply_change_triton, area_means_triton, gather_triton

    monkeypatch.setattr(apply_change_triton, "BLOCK", 2048)
    monkeypatch.setattr(area_means_triton, "TILE", 4096)
    monkeypatch.setattr(gather_triton, "BLOCK", 128)


def similarity(scale, degrees, center):
    a = scale * np.exp(1j * np.radians(degrees))
    linear = np.array([[a.real, -a.imag], [a.imag, a.real]])
    return np.column_stack([linear, (SIZE - 1) / 2 - linear @ np.array(center)]).astype(np.float32)


FACES = {
    "enlarged, rotated": similarity(0.4, 25, (20, 15)),
    "same size": similarity(1.0, 0, (15, 14)),
    "reduced, rotated": similarity(0.45, -130, (22, 18)),
    "over the border": similarity(0.3, 10, (2, 33)),
    "far outside": similarity(0.7, 5, (-500, 900)),
}


def make_frame(pixel_format, seed=0, **options):
    """A frame of odd sizes in padded rows, turned in one of four ways."""
    number = list(PIXEL_LAYOUTS).index(pixel_format) + seed
    sitings = ("left", "center", "topleft")
    is_rgb = PIXEL_LAYOUTS[pixel_format].planes[0].components.startswith("RGB")
    color = None if is_rgb else ColorSpec(matrix="bt601", full_range=number % 2 == 0, chroma_siting=sitings[number % 3])
    options = {"padding": 5, "rotation": ROTATIONS[number % 4], "seed": seed, "color": color, **options}
    return noise_frame(pixel_format, WIDTH, HEIGHT, **options)


def on_device(frame):
    frame = as_tensors(frame)
    if DEVICE == "cpu":
        return frame
    return replace(frame, planes=tuple(plane.to(DEVICE) for plane in frame.planes))


def codes_of(frame):
    """The components of a frame as they are stored: float64 [H, W], their layouts."""
    found = []
    for plane, spec in zip(frame.planes, frame.layout.planes, strict=True):
        for codes in np.moveaxis(plane.reshape(*plane.shape[:2], -1), -1, 0):
            found.append((codes.astype(np.float64) / 2**frame.layout.shift, spec))
    return found[:3]


def to_rgb(frame, components):
    matrix, offset = yuv_to_rgb(color_of(frame), frame.layout.bit_depth)
    neutral = np.full_like(components[0], 2 ** (frame.layout.bit_depth - 1))
    codes = np.stack([*components, neutral, neutral][:3])
    return np.clip(np.tensordot(matrix, codes, 1) + offset.reshape(-1, *[1] * (codes.ndim - 1)), -1, 1)


def crop_by_formula(frame, frame_to_crop):
    """`gather`'s formula in float64."""
    sampled = []
    for codes, spec in codes_of(frame):
        to_plane = crop_to_plane(frame, spec, frame_to_crop)
        height, width = codes.shape
        dx, dy = box_factors(to_plane)
        y, x = np.mgrid[:SIZE, :SIZE]
        u, v = np.tensordot(to_plane, np.stack([x, y, np.ones_like(x)]), 1)
        u, v = (u - (dx - 1) / 2) / dx, (v - (dy - 1) / 2) / dy
        i, j = np.floor(v).astype(int), np.floor(u).astype(int)

        def cell(i, j, dx=dx, dy=dy, codes=codes, height=height, width=width):
            rows = np.clip(dy * i[..., None] + np.arange(dy), 0, height - 1)
            columns = np.clip(dx * j[..., None] + np.arange(dx), 0, width - 1)
            return codes[rows[..., :, None], columns[..., None, :]].mean((2, 3))

        a, b = u - j, v - i
        top = cell(i, j) * (1 - a) + cell(i, j + 1) * a
        sampled.append(top * (1 - b) + (cell(i + 1, j) * (1 - a) + cell(i + 1, j + 1) * a) * b)
    return to_rgb(frame, sampled)


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
def test_gathered_crops(pixel_format):
    frame = make_frame(pixel_format)
    matrices = np.stack(list(FACES.values()))
    index = np.zeros(len(matrices), np.int64)
    got = gather_crops([on_device(frame)], index, matrices, SIZE, impl="triton").cpu().numpy()
    np.testing.assert_allclose(got, gather_crops([frame], index, matrices, SIZE, impl="ref"), atol=KERNEL_ATOL)
    for crop, matrix in zip(got, matrices, strict=True):
        np.testing.assert_allclose(crop, crop_by_formula(frame, matrix), atol=KERNEL_ATOL)


def test_crops_of_frames_of_several_formats_and_sizes():
    frames = [
        make_frame("nv12"),
        noise_frame("rgb48", 20, 31, seed=1),
        noise_frame("gray", 64, 9),
        make_frame("nv12", 1),
    ]
    index = np.array([3, 1, 0, 2, 1])
    matrices = np.stack(list(FACES.values()))
    got = gather_crops([on_device(f) for f in frames], index, matrices, SIZE, impl="triton").cpu().numpy()
    np.testing.assert_allclose(got, gather_crops(frames, index, matrices, SIZE, impl="ref"), atol=KERNEL_ATOL)
    none = gather_crops([on_device(frames[0])], index[:0], matrices[:0], SIZE, impl="triton")
    assert none.shape == (0, 3, SIZE, SIZE)


def test_crops_of_one_pixel():
    for pixel_format in ("nv12", "yuv411p", "rgba", "gray16"):
        frame = noise_frame(pixel_format, 1, 1)
        crops = gather_crops([on_device(frame)], np.zeros(1, np.int64), FACES["same size"][None], SIZE, impl="triton")
        assert np.ptp(crops.cpu().numpy(), axis=(2, 3)).max() < 1e-6


LOW = np.array([[0, 0], [5, 9], [30, 7], [21, 20]])
HIGH = np.array([[WIDTH, HEIGHT], [28, 30], [31, 8], [32, 30]])
TURNED_LOW, TURNED_HIGH = LOW[:, ::-1], HIGH[:, ::-1]


def means_by_formula(frame, low, high, bins_x, bins_y):
    """`area_means`' formula in float64, bin by bin."""
    planes = []
    for codes, spec in codes_of(frame):
        shown = upright(codes, frame.rotation)
        subs = (spec.sub_x, spec.sub_y)[:: -1 if frame.rotation % 180 else 1]
        means = np.empty((bins_y, bins_x))
        for row, column in np.ndindex(bins_y, bins_x):
            span = []
            for i, count, axis in ((row, bins_y, 1), (column, bins_x, 0)):
                length = int(high[axis] - low[axis])
                first = int(low[axis]) + i * length // count
                last = int(low[axis]) - (-(i + 1) * length // count)
                span.append(slice(first // subs[axis], -(-last // subs[axis])))
            means[row, column] = shown[tuple(span)].mean()
        planes.append(means)
    return to_rgb(frame, planes)


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
def test_area_means(pixel_format):
    frame = make_frame(pixel_format)
    low, high = (LOW, HIGH) if frame.rotation % 180 == 0 else (TURNED_LOW, TURNED_HIGH)
    index = np.zeros(len(low), np.int64)
    scale = 127.5 / 128
    kernel, reference = (
        AreaMeans([f], scale=scale, impl=impl) for f, impl in ((on_device(frame), "triton"), (frame, "ref"))
    )
    got = kernel.rectangles(index, low, high, 6).cpu().numpy()
    np.testing.assert_allclose(got, reference.rectangles(index, low, high, 6), atol=KERNEL_ATOL)
    for means, a, b in zip(got, low, high, strict=True):
        np.testing.assert_allclose(means, scale * means_by_formula(frame, a, b, 6, 6), atol=KERNEL_ATOL)
    for size in ((7, 5), (3, 2)):  # many small bins and a few large ones
        level = kernel.pictures(*size).cpu().numpy()
        assert level.shape == reference.pictures(*size).shape
        np.testing.assert_allclose(level, reference.pictures(*size), atol=KERNEL_ATOL)
        want = scale * means_by_formula(frame, (0, 0), (frame.width, frame.height), *size)
        np.testing.assert_allclose(level[0, :, : size[1], : size[0]], want, atol=KERNEL_ATOL)
    assert kernel.rectangles(index[:0], low[:0], high[:0], 6).shape == (0, 3, 6, 6)


def filter_by_formula(size, step):
    """Every value of D along one axis as weights of the maps' pixels, and k: float64 [k size, size]."""
    k = enlarge_factor(step) if step < 1 else 1
    place = (np.arange(k * size) + 0.5) / k - 0.5
    d = np.abs(place[:, None] - np.arange(size))
    if step < 1:
        far = np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0)
        return np.where(d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, far), k
    weights = np.maximum(1 - d / step, 0)
    total = np.maximum(1 - np.abs(np.arange(-size, size + 1)) / step, 0).sum()
    weights[[0, -1]] = 0
    return weights / total, k


def changed_by_formula(frame, change, frame_to_crop):
    """`apply_change`'s formula in float64: for each component the codes after it, before they are rounded."""
    layout, color = frame.layout, color_of(frame)
    maps = np.tensordot(rgb_to_yuv_delta(color, layout.bit_depth), change.delta.astype(np.float64), 1)
    black, span = luma_codes(color, layout.bit_depth)
    stored = codes_of(frame)
    is_rgb = layout.planes[0].components.startswith("RGB")
    luma = sum(w * c for w, (c, _) in zip(RGB_LUMA, stored, strict=True)) if is_rgb else stored[0][0]
    after = []
    for number, (codes, spec) in enumerate(stored):
        to_plane = crop_to_plane(frame, spec, frame_to_crop)
        steps = [np.hypot(*row) for row in np.linalg.inv(to_plane[:, :2])]
        steps = [step if step < 1 else np.round(16 * step) / 16 for step in steps]
        (filter_x, kx), (filter_y, ky) = (filter_by_formula(SIZE, step) for step in steps)
        y, x = np.mgrid[: codes.shape[0], : codes.shape[1]]
        inverse = np.linalg.inv(np.vstack([to_plane, [0, 0, 1]]))[:2]
        px, py = np.tensordot(inverse, np.stack([x, y, np.ones_like(x)]), 1)
        u, v = (px + 0.5) * kx - 0.5, (py + 0.5) * ky - 0.5

        def sampled(values, u=u, v=v, filter_x=filter_x, filter_y=filter_y):
            d = np.pad(filter_y @ values @ filter_x.T, 1)  # zeros outside
            i, j = (np.clip(np.floor(p).astype(int), -1, n - 2) for p, n in ((v, d.shape[0] - 1), (u, d.shape[1] - 1)))
            a, b = np.clip(u - j, 0, 1), np.clip(v - i, 0, 1)
            top = d[i + 1, j + 1] * (1 - a) + d[i + 1, j + 2] * a
            return top * (1 - b) + (d[i + 2, j + 1] * (1 - a) + d[i + 2, j + 2] * a) * b

        added = sampled(maps[number])
        if change.gain is not None and (is_rgb or number == 0):
            added = added + sampled(change.gain.astype(np.float64)) * (luma - black + BLACK_OFFSET * span)
            if change.dark is not None:
                whole, none = change.dark
                added = added * np.clip((none - (luma - black) / span) / (none - whole), 0, 1)
        after.append(np.clip(codes + added, 0, 2**layout.bit_depth - 1))
    return after


def rough_change(has_gain, seed=0):
    rng = np.random.default_rng(seed)
    delta, gain = np.zeros((3, SIZE, SIZE), np.float32), np.zeros((SIZE, SIZE), np.float32)
    delta[:, 2:-2, 2:-2] = rng.normal(0, 0.4, (3, SIZE - 4, SIZE - 4))
    gain[2:-2, 2:-2] = rng.normal(0, 0.3, (SIZE - 4, SIZE - 4))
    return Change(delta=delta, gain=gain if has_gain else None, dark=(0.3, 0.7) if has_gain and seed > 1 else None)


def assert_nearly_equal(tensors, arrays, layout):
    """At most a code apart, and seldom that."""
    for tensor, array in zip(tensors, arrays, strict=True):
        apart = np.abs(tensor.cpu().numpy().astype(np.int64) - array) >> layout.shift
        assert apart.max() <= ADD_ATOL_CODES
        assert (apart > 0).mean() <= KERNEL_ADD_MAX_TIES[layout.bit_depth]


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
def test_overlapping_changes(pixel_format):
    """A delta, a gain and delta, and those of dark samples, one on the other: compared with the reference and the
    formula after each.
    """
    base = make_frame(pixel_format, span=(0.05, 0.95))
    layout = base.layout
    frame = on_device(base)
    faces = list(FACES.values())[:4]
    for number in range(3):
        matrix = faces[(number + base.rotation // 90) % 4]
        change = rough_change(number > 0, number)
        before = replace(base, planes=tuple(plane.cpu().numpy() for plane in frame.planes))
        reference = replace(base, planes=tuple(plane.copy() for plane in before.planes))
        want = changed_by_formula(before, change, matrix)
        rect = apply_change(frame, change, matrix, impl="triton")
        assert rect == apply_change(reference, change, matrix, impl="ref")
        assert_nearly_equal(frame.planes, reference.planes, layout)
        after = replace(base, planes=tuple(plane.cpu().numpy() for plane in frame.planes))
        for (codes, _), exact in zip(codes_of(after), want, strict=True):
            assert np.abs(codes - exact).max() <= 0.51 + 2.0 ** (layout.bit_depth - 22)
        if pixel_format.startswith("rgba"):
            np.testing.assert_array_equal(after.planes[0][..., 3], before.planes[0][..., 3])
    assert any((a != b).any() for a, b in zip(after.planes, base.planes, strict=True))


@pytest.mark.parametrize("scale", [1.7, 4.2])
@pytest.mark.parametrize("pixel_format", ["nv12", "yuv422p10le", "rgb24"])
def test_changes_that_are_reduced(pixel_format, scale):
    base = make_frame(pixel_format)
    frame, matrix = on_device(base), similarity(scale, 20, (20, 17))
    want = changed_by_formula(base, rough_change(True), matrix)
    apply_change(frame, rough_change(True), matrix, impl="triton")
    after = replace(base, planes=tuple(plane.cpu().numpy() for plane in frame.planes))
    for (codes, _), exact in zip(codes_of(after), want, strict=True):
        assert np.abs(codes - exact).max() <= 0.51
    assert any((a != b).any() for a, b in zip(after.planes, base.planes, strict=True))


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("pixel_format", ["nv12", "p010le", "gray16", "rgba"])
def test_a_change_of_tensors_is_that_of_arrays(pixel_format, impl):
    """Twice: what was made of it the first time serves the second one."""
    base, change = make_frame(pixel_format), rough_change(True, 2)
    array, frame = replace(base, planes=tuple(plane.copy() for plane in base.planes)), on_device(base)
    tensors = Change(
        delta=torch.from_numpy(change.delta).to(DEVICE).permute(1, 2, 0).contiguous().permute(2, 0, 1),
        gain=torch.from_numpy(change.gain).to(DEVICE),
        dark=change.dark,
    )
    for name, weight in (("same size", 0.6), ("over the border", 1.0)):
        apply_change(array, change, FACES[name], weight, impl="ref")
        apply_change(frame, tensors, FACES[name], weight, impl=impl)
    assert_nearly_equal(frame.planes, array.planes, base.layout)
    assert any((a != b).any() for a, b in zip(array.planes, base.planes, strict=True))


def test_what_does_not_change_keeps_its_bits():
    frame = make_frame("p010le")
    for plane in frame.planes:
        plane |= 0x2A  # low bits that no code has
    frame.planes[0][:] = 0xFFFF
    tensors = on_device(frame)
    delta = np.zeros((3, SIZE, SIZE), np.float32)
    delta[:, 2:-2, 2:-2] = -1e-4
    delta[:, 5, 5] = -1.0
    apply_change(tensors, Change(delta=delta), FACES["same size"], impl="triton")
    changed = tensors.planes[0].cpu().numpy() != frame.planes[0]
    assert 0 < changed.sum() < 20
    paddings = [plane.cpu() for plane in tensors.planes]
    assert all(
        torch.equal(a[..., -1:], torch.from_numpy(b[..., -1:].copy()))
        for a, b in zip(paddings, frame.planes, strict=True)
    )


def test_no_change_and_no_overlap_touch_nothing():
    frame = make_frame("yuv420p")
    tensors = on_device(frame)
    zero = Change(delta=np.zeros((3, SIZE, SIZE), np.float32))
    assert apply_change(tensors, zero, FACES["same size"], impl="triton") is None
    assert apply_change(tensors, rough_change(True), FACES["far outside"], impl="triton") is None
    for plane, before in zip(tensors.planes, frame.planes, strict=True):
        np.testing.assert_array_equal(plane.cpu().numpy(), before)


@pytest.mark.parametrize("size", [(400, 301), (96, 57)])
@pytest.mark.parametrize("pixel_format", ["nv12", "p010le", "gray16", "rgb24", "rgba64"])
def test_thumbnails(pixel_format, size):
    frame = noise_frame(pixel_format, *size, padding=5, span=(0, 1))
    got, want = (begin_thumbnail(f, impl=impl)() for f, impl in ((on_device(frame), "triton"), (frame, "ref")))
    assert np.abs(got.luma - want.luma).max() <= 1
    assert (got.luma != want.luma).mean() < 0.04  # halves, of which few samples give many
    np.testing.assert_allclose(got.histogram, want.histogram, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests with impl=triton compile them for the GPU that is here")
def test_every_kernel_compiles_for_gpus():
    """Without a GPU a kernel can be compiled, if not run: to machine code of Turing and Hopper."""
    program = Path(__file__).with_name("compile_for_gpus.py")
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program, "75", "90"], env=without, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = {"gather", "area_means", "apply_change", "thumbnail"}
    assert {line[0] for line in lines} == {f"_{name}_kernel" for name in names}
    assert {line[1] for line in lines} == {"75", "90"}
    assert all(line[3] == "registers" for line in lines), "no kernel spills into memory"


class OnGPU:
    """A frame that says it lies on a GPU."""

    is_array = False
    device = "cuda:0"


def test_what_runs_where(monkeypatch, caplog):
    array = make_frame("gray")
    assert choose_implementation(array, "auto") == "cpu"
    assert choose_implementation(as_tensors(array), "auto") == "ref"
    assert choose_implementation(OnGPU(), "auto") == "triton"
    assert choose_implementation(OnGPU(), "ref") == "ref"
    monkeypatch.setattr(implementation_module, "find_spec", lambda name: None)
    implementation_module.has_triton.cache_clear()
    with caplog.at_level("INFO"):
        assert [choose_implementation(OnGPU(), "auto") for _ in range(3)] == ["ref"] * 3
    assert [record.message for record in caplog.records] == [
        "Triton is not installed, so frames on the GPU are read and changed by PyTorch; pip install triton"
    ]
    implementation_module.has_triton.cache_clear()
