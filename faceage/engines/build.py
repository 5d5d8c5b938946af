"""The two steps of a build that all backends share: out of torch once, and the comparison with torch."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from faceage.engines.base import Axis, Engine, Program
from faceage.engines.eager import EagerEngine
from faceage.errors import EngineError
from faceage.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

EXACT_DB = 200.0
"""PSNR that is written for outputs without any error."""


def export(program: Program, network: nn.Module, examples: tuple[Tensor, ...]) -> ExportedProgram:
    """Return the graph of `network`, its changing axes free in the range that `program` names."""
    import torch

    dims = {}
    for axis in {axis for spec in program.inputs for axis in spec.shape if isinstance(axis, Axis)}:
        unit = axis.multiple
        base = torch.export.Dim(f"{axis.name}_units", min=axis.min // unit, max=axis.max // unit)
        dims[axis.name] = base if unit == 1 else unit * base
    shapes = tuple(
        {i: dims[axis.name] for i, axis in enumerate(spec.shape) if isinstance(axis, Axis)} for spec in program.inputs
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(network, examples, dynamic_shapes=shapes, strict=False)


def check_parity(
    program: Program, engine: Engine, network: nn.Module, examples: tuple[Tensor, ...]
) -> dict[str, float]:
    """Compare `engine` with `network` on the example inputs and on random ones of other sizes.

    Returns:
        "max_abs_error", and "psnr_db" with each output's largest magnitude as its peak: the worst of all.

    Raises:
        EngineError: if the PSNR is below the program's floor, or a value is not finite.
    """
    import torch

    reference = EagerEngine(program, network, torch.device("cpu"))
    random = np.random.default_rng(0)
    cases = [tuple(example.numpy() for example in examples)]
    # The typical size plus one step, so that an exporter which froze the typical size is found out.
    cases += [_random_inputs(program, random, at_minimum) for at_minimum in (True, False)]
    worst = {"max_abs_error": 0.0, "psnr_db": EXACT_DB}
    for inputs in cases:
        for got, want in zip(engine(*inputs), reference(*inputs), strict=True):
            if got.shape != want.shape or not np.isfinite(got).all():
                raise EngineError(f"{program.name}: {engine.backend} gives {got.shape}, or values that are not finite")
            error = np.abs(got.astype(np.float64) - want)
            rmse, peak = float(np.sqrt((error**2).mean())), float(np.abs(want).max())
            psnr = 20 * math.log10(peak / rmse) if rmse and peak else EXACT_DB if not rmse else 0.0
            worst["max_abs_error"] = max(worst["max_abs_error"], float(error.max()))
            worst["psnr_db"] = round(min(worst["psnr_db"], psnr), 1)
    if worst["psnr_db"] < program.parity_floor_db:
        raise EngineError(
            f"{program.name}: {engine.backend} differs from torch (PSNR {worst['psnr_db']} dB, at least "
            f"{program.parity_floor_db} wanted) and is not stored; use --backend torch, and report this"
        )
    return worst


def _random_inputs(program: Program, random: np.random.Generator, at_minimum: bool) -> tuple[FloatArray, ...]:
    def size(axis: int | Axis) -> int:
        return (
            axis if isinstance(axis, int) else axis.min if at_minimum else min(axis.typical + axis.multiple, axis.max)
        )

    shapes = [tuple(size(axis) for axis in spec.shape) for spec in program.inputs]
    return tuple(random.uniform(-1, 1, shape).astype(np.float32) for shape in shapes)
