"""How far an engine is from its reference: a graph from torch, a compiled engine from its graph."""

from __future__ import annotations

import math

import numpy as np

from faceage.engines.base import Axis, Engine, Precision, Program
from faceage.errors import EngineError
from faceage.types import FloatArray

EXACT_DB = 200.0
"""PSNR that is written for outputs without any error."""
MAX_ABS_ERROR = 1e-3
"""An fp32 engine that differs by more is refused."""
MIN_PSNR_DB = 45.0
"""An fp16 or bf16 engine that is less like its reference is refused."""


def check_parity(
    program: Program,
    engine: Engine,
    reference: Engine,
    precision: Precision,
    *,
    runs: int = 1,
    cuts_batches: bool = False,
) -> dict[str, float]:
    """Compare two engines on the program's example inputs, and on other sizes made of them.

    Args:
        program: theirs.
        engine: what is compared.
        reference: what with.
        precision: that of `engine`.
        runs: how often the example inputs are run before other sizes, once more after. Engines on GPUs compile on the
            first run of a shape, capture on the second, and replay from then on.
        cuts_batches: see `Backend.cuts_batches`: then a batch that is cut into all sizes is compared, and no other.

    Returns:
        "max_abs_error", and "psnr_db" with each output's largest magnitude as its peak: the worst of all.

    Raises:
        EngineError: if they differ by more than `precision` allows, or a value is not finite.
    """
    examples = program.examples()
    # The typical size plus one step, so that an exporter which froze the typical size is found out.
    others = [_resized(program, examples, at_minimum) for at_minimum in (True, False)]
    cases = [*[examples] * runs, *others, *[examples] * (runs > 1)]
    if cuts_batches and all(not isinstance(axis, Axis) for spec in program.inputs for axis in spec.shape[1:]):
        cases = others[1:]
    worst = {"max_abs_error": 0.0, "psnr_db": EXACT_DB}
    different = {id(inputs): inputs for inputs in cases}
    wanted = {key: reference(*inputs) for key, inputs in different.items()}
    for inputs in cases:
        for got, want in zip(engine(*inputs), wanted[id(inputs)], strict=True):
            if got.shape != want.shape or not np.isfinite(got).all():
                raise EngineError(f"{program.name}: {engine.backend} gives {got.shape}, or values that are not finite")
            error = np.abs(got.astype(np.float64) - want)
            rmse, peak = float(np.sqrt((error**2).mean())), float(np.abs(want).max())
            psnr = 20 * math.log10(peak / rmse) if rmse and peak else EXACT_DB if not rmse else 0.0
            worst["max_abs_error"] = max(worst["max_abs_error"], float(error.max()))
            worst["psnr_db"] = round(min(worst["psnr_db"], psnr), 1)
    if precision == "fp32" and worst["max_abs_error"] > MAX_ABS_ERROR:
        found = f"by {worst['max_abs_error']:.2g}, at most {MAX_ABS_ERROR:g} is allowed"
    elif precision != "fp32" and worst["psnr_db"] < MIN_PSNR_DB:
        found = f"PSNR {worst['psnr_db']} dB, at least {MIN_PSNR_DB:g} is wanted"
    else:
        return worst
    raise EngineError(
        f"{program.name}: {engine.backend} in {precision} differs from {reference.backend} ({found}) and is not "
        f"stored; use {'--precision fp32' if precision != 'fp32' else '--backend onnxruntime'}, and report this"
    )


def _resized(program: Program, arrays: tuple[FloatArray, ...], at_minimum: bool) -> tuple[FloatArray, ...]:
    """Return inputs of other sizes: the examples cut, or repeated."""

    def size(axis: Axis) -> int:
        return axis.min if at_minimum else min(axis.typical + axis.multiple, axis.max)

    resized = []
    for array, spec in zip(arrays, program.inputs, strict=True):
        for i, axis in enumerate(spec.shape):
            if isinstance(axis, Axis):
                array = np.take(array, np.arange(size(axis)), i, mode="wrap")
        resized.append(np.ascontiguousarray(array))
    return tuple(resized)
