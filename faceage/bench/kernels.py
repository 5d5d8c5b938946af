"""Speed of the pixel operations, each against its PyTorch reference, and the share of the memory's bandwidth.

On a GPU the Triton kernels are measured against the references compiled by `torch.compile`; a kernel that does not beat
its own is to be deleted. On the CPU the NumPy and OpenCV implementations are measured against the references.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter
from typing import TYPE_CHECKING, cast

import numpy as np

from faceage.align import align_faces
from faceage.bench.runs import Notify
from faceage.geometry import TEMPLATE_5
from faceage.kernels import AreaMeans, apply_change, gather_crops, upload_planes
from faceage.kernels.implementation import Implementation
from faceage.types import Change, ColorSpec, FloatArray, Frame, Samples

if TYPE_CHECKING:
    pass

SIZES = ((1920, 1080), (3840, 2160))
"""Of the frames, NV12. On a CPU, where the references take seconds for many faces in 4K, the first alone."""
FACES = (1, 8)
FACE_PX = 500
"""Side of an aligned crop in the frame, at 1080p."""
CROP_PX = 192
PYRAMID_FACTOR = 0.709
LARGEST_LEVEL = 0.44
"""The pyramid's first level over the frame, for faces of 27 pixels."""
MEASURED_S = 0.5
MIN_CALLS = 5
COPIED_BYTES = 1 << 28


@dataclass(frozen=True)
class _Operation:
    name: str
    frame: str
    faces: int
    bytes_moved: float
    """What has to be read and written at least."""
    call: Callable[[Frame, Implementation], object]
    """Takes the frame and the implementation."""


def bench_kernels(
    device: str | None = None,
    *,
    sizes: tuple[tuple[int, int], ...] | None = None,
    faces: tuple[int, ...] = FACES,
    measured_s: float = MEASURED_S,
    notify: Notify,
) -> dict:
    """Measure each operation by each implementation.

    Args:
        device: a GPU; None: arrays on the CPU.
        sizes: widths and heights of the frames; None: `SIZES`.
        faces: how many are read or changed in one call.
        measured_s: how long each is measured at least.
        notify: told what runs.

    Returns:
        "copy_gb_per_s" and "rows": an operation and an implementation each, with "p20_ms", "p50_ms", "p80_ms",
        "gb_per_s", "share_of_copy" and, of what is not the baseline, "factor": how many times as fast.
    """
    clock = _Clock(device, measured_s)
    copy_gb_per_s = 2 * COPIED_BYTES / 1e6 / _copy_ms(device, clock)
    rows: list[dict] = []
    for width, height in sizes or (SIZES if device else SIZES[:1]):
        frame = _noise(width, height)
        if device is not None:
            frame = Frame(
                planes=upload_planes(cast(tuple, frame.planes), device), pixel_format="nv12", color=frame.color
            )
        for operation in _operations(width, height, faces):
            notify(f"{operation.name}, {operation.frame}, {operation.faces} faces")
            fast: Implementation = "cpu" if device is None else "triton"
            reference = _reference(operation, device)
            times: dict[str, list[float]] = {
                "reference": clock.measure(functools.partial(reference, frame)),
                fast: clock.measure(functools.partial(operation.call, frame, fast)),
            }
            for name, milliseconds in times.items():
                p20, p50, p80 = (quantiles(milliseconds, n=10, method="inclusive")[at] for at in (1, 4, 7))
                speed = operation.bytes_moved / 1e6 / p50
                row = {
                    "operation": operation.name, "frame": operation.frame, "faces": operation.faces,
                    "implementation": name, "p20_ms": round(p20, 4), "p50_ms": round(p50, 4), "p80_ms": round(p80, 4),
                    "gb_per_s": round(speed, 2), "share_of_copy": round(speed / copy_gb_per_s, 3),
                }  # fmt: skip
                if name == fast:
                    row["factor"] = round(rows[-1]["p50_ms"] / p50, 2)
                rows.append(row)
    return {
        "device": _device_name(device),
        "baseline": "the PyTorch reference" if device is None else "the PyTorch reference by torch.compile",
        "copy_gb_per_s": round(copy_gb_per_s, 1),
        "rows": rows,
    }


def _reference(operation: _Operation, device: str | None) -> Callable[[Frame], object]:
    """Return what runs the reference: compiled, on a GPU."""

    def run(frame: Frame) -> object:
        return operation.call(frame, "ref")

    if device is None:
        return run
    import torch

    # Positions and tables are numpy on the host in both; only what runs on the device is to be compiled.
    torch._dynamo.config.trace_numpy = False
    torch._dynamo.reset()  # or, after some functions, the next ones would not be compiled any more
    return cast("Callable[[Frame], object]", torch.compile(run))


def _noise(width: int, height: int) -> Frame:
    rng = np.random.default_rng(0)
    luma, chroma = rng.integers(50, 200, (height, width)), rng.integers(100, 156, (height // 2, width // 2, 2))
    planes = luma.astype(np.uint8), chroma.astype(np.uint8)
    return Frame(planes=planes, pixel_format="nv12", color=ColorSpec())


def _operations(width: int, height: int, faces: tuple[int, ...]) -> list[_Operation]:
    frame, frame_bytes = f"{width}x{height}", 1.5 * width * height
    face_px = FACE_PX * height / 1080
    sizes, scale = list[tuple[int, int]](), LARGEST_LEVEL
    while min(width, height) * scale >= 12:
        sizes.append((int(width * scale + 1), int(height * scale + 1)))
        scale *= PYRAMID_FACTOR
    level_bytes = sum(12.0 * w * h for w, h in sizes)

    def pyramid(picture: Frame, impl: Implementation) -> list[Samples]:
        means = AreaMeans([picture], impl=impl)
        return [means.pictures(*size) for size in sizes]

    found = [_Operation("pyramid", frame, 0, frame_bytes + level_bytes, pyramid)]
    for count in faces:
        matrices = _places(width, height, face_px, count)
        gather = functools.partial(_gather, matrices)
        apply = functools.partial(_apply, [_change(seed) for seed in range(count)], matrices)
        read = count * 1.5 * face_px**2
        found.append(_Operation("gather", frame, count, read + count * 12.0 * CROP_PX**2, gather))
        found.append(_Operation("apply_change", frame, count, 2 * read + count * 16.0 * CROP_PX**2, apply))
    return found


def _gather(matrices: FloatArray, frame: Frame, impl: Implementation) -> Samples:
    return gather_crops([frame], np.zeros(len(matrices), np.int64), matrices, CROP_PX, impl=impl)


def _apply(changes: list[Change], matrices: FloatArray, frame: Frame, impl: Implementation) -> None:
    for change, matrix in zip(changes, matrices, strict=True):
        apply_change(frame, change, matrix, impl=impl)


def _places(width: int, height: int, face_px: float, count: int) -> FloatArray:
    """Return maps to the crops of upright faces all over a frame: float32 [F, 2, 3]."""
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 1, (count, 2)) * np.maximum(np.array([width, height]) - face_px, 1)
    landmarks = corners[:, None] + TEMPLATE_5 * face_px
    return align_faces(landmarks.astype(np.float32), CROP_PX)


def _change(seed: int) -> Change:
    """Return a change like those of ageing: of all but the rim."""
    rng = np.random.default_rng(seed)
    delta, gain = np.zeros((3, CROP_PX, CROP_PX), np.float32), np.zeros((CROP_PX, CROP_PX), np.float32)
    delta[:, 8:-8, 8:-8] = rng.normal(0, 0.02, (3, CROP_PX - 16, CROP_PX - 16))
    gain[8:-8, 8:-8] = rng.normal(0, 0.05, (CROP_PX - 16, CROP_PX - 16))
    return Change(delta=delta, gain=gain)


def _copy_ms(device: str | None, clock: _Clock) -> float:
    """Return the time in which `COPIED_BYTES` are copied within the memory."""
    if device is None:
        source = np.ones(COPIED_BYTES, np.uint8)
        target = np.empty_like(source)
        return quantiles(clock.measure(lambda: np.copyto(target, source)), n=10, method="inclusive")[4]
    import torch

    there = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    copy = torch.empty_like(there)
    return quantiles(clock.measure(lambda: copy.copy_(there)), n=10, method="inclusive")[4]


class _Clock:
    """Measures calls: on a GPU by events, each call on a cold cache."""

    def __init__(self, device: str | None, measured_s: float) -> None:
        self._is_gpu, self._measured_s = device is not None and device.startswith("cuda"), measured_s

    def measure(self, call: Callable[[], object]) -> list[float]:
        """Return the milliseconds of calls; the first ones, which compile, are not counted."""
        for _ in range(3 if self._is_gpu else 1):
            call()
        if self._is_gpu:
            from triton.testing import do_bench

            return cast("list[float]", do_bench(call, rep=int(1e3 * self._measured_s), return_mode="all"))
        times = list[float]()
        while sum(times) < 1e3 * self._measured_s or len(times) < MIN_CALLS:
            start = perf_counter()
            call()
            times.append(1e3 * (perf_counter() - start))
        return times


def _device_name(device: str | None) -> str:
    if device is None or not device.startswith("cuda"):
        return platform.processor() or platform.machine()
    import torch

    return torch.cuda.get_device_name(device)
