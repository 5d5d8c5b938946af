"""The two steps of a build that all backends share: out of torch once, and the comparison with torch."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from faceage.engines.base import Axis, Engine, Precision, Program
from faceage.engines.eager import TorchEngine
from faceage.errors import EngineError
from faceage.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

EXACT_DB = 200.0
"""PSNR that is written for outputs without any error."""
MAX_ABS_ERROR = 1e-3
"""An fp32 engine that differs from torch by more is refused."""
MIN_PSNR_DB = 45.0
"""An fp16 or bf16 engine that is less like torch is refused."""


def export(
    program: Program, network: nn.Module, examples: tuple[Tensor, ...], precision: Precision = "fp32"
) -> ExportedProgram:
    """Return the graph of `network`, its changing axes free in the range that `program` names.

    Args:
        program: names the axes.
        network: on the device of `examples`.
        examples: inputs.
        precision: see `Precision`. Losses, norms and sums stay in float32: in half they would overflow or vanish.
    """
    exported = _export(program, network, examples)
    if precision != "fp16":
        return exported  # bf16 is chosen when the engine is loaded
    return _export(program, _with_half_products(exported), examples)


def _export(program: Program, network: nn.Module, examples: tuple[Tensor, ...]) -> ExportedProgram:
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(network, examples, dynamic_shapes=dynamic_shapes(program), strict=False)
    for node in list(exported.graph.nodes):
        if node.target == torch.ops.aten._assert_tensor_metadata.default:
            exported.graph.erase_node(node)  # they guard casts; Torch-TensorRT does not know them
    exported.graph_module.recompile()
    return exported


def dynamic_shapes(program: Program) -> tuple[dict, ...]:
    """Return each input's free axes, as `torch.export.export` takes them."""
    import torch

    dims = {}
    for axis in {axis for spec in program.inputs for axis in spec.shape if isinstance(axis, Axis)}:
        unit = axis.multiple
        base = torch.export.Dim(f"{axis.name}_units", min=axis.min // unit, max=axis.max // unit)
        dims[axis.name] = base if unit == 1 else unit * base
    return tuple(
        {i: dims[axis.name] for i, axis in enumerate(spec.shape) if isinstance(axis, Axis)} for spec in program.inputs
    )


def _with_half_products(exported: ExportedProgram) -> nn.Module:
    """Return the graph with casts around its convolutions and matrix products."""
    import torch

    products = {"conv2d", "convolution", "conv_transpose2d", "linear", "addmm", "mm", "matmul", "bmm"}
    to = torch.ops.aten.to.dtype
    module = exported.module()
    graph = module.graph

    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target).removeprefix("aten.").split(".")[0] not in products:
            continue
        with graph.inserting_before(node):
            node.args = tuple(
                graph.call_function(to, (value, torch.float16)) if isinstance(value, torch.fx.Node) else value
                for value in node.args
            )
        with graph.inserting_after(node):
            back = graph.call_function(to, (node, torch.float32))
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
    module.recompile()
    return module


def check_parity(
    program: Program, engine: Engine, network: nn.Module, examples: tuple[Tensor, ...], precision: Precision = "fp32"
) -> dict[str, float]:
    """Compare `engine` with `network` on the example inputs, and on other sizes made of them.

    Returns:
        "max_abs_error", and "psnr_db" with each output's largest magnitude as its peak: the worst of all.

    Raises:
        EngineError: if it differs by more than `precision` allows, or a value is not finite.
    """
    import torch

    reference = TorchEngine(program, network, torch.device("cpu"))
    arrays = tuple(example.cpu().numpy() for example in examples)
    # The typical size plus one step, so that an exporter which froze the typical size is found out.
    cases = [arrays, *(_resized(program, arrays, at_minimum) for at_minimum in (True, False))]
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
    if precision == "fp32" and worst["max_abs_error"] > MAX_ABS_ERROR:
        found = f"by {worst['max_abs_error']:.2g}, at most {MAX_ABS_ERROR:g} is allowed"
    elif precision != "fp32" and worst["psnr_db"] < MIN_PSNR_DB:
        found = f"PSNR {worst['psnr_db']} dB, at least {MIN_PSNR_DB:g} is wanted"
    else:
        return worst
    raise EngineError(
        f"{program.name}: {engine.backend} in {precision} differs from torch ({found}) and is not stored; "
        f"use {'--precision fp32' if precision != 'fp32' else '--backend torch'}, and report this"
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
