"""Out of torch, once: a network becomes an ONNX graph whose weights stay in its checkpoints' safetensors files.

A graph names its weights by file, offset and length, in the precision in which they are stored, and casts them to
float32. So the checkpoint stays the only store of the weights, and a graph is some ten kilobytes. What follows from
weights (a batch norm folded into a convolution) is computed in the graph; every runtime does that once, when it opens
the graph.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from faceage.engines.base import Axis, Precision, Program, Spec, sha256_of_file
from faceage.engines.eager import TorchEngine
from faceage.engines.ort import INPUT_PREFIX, OUTPUT_PREFIX, open_graph
from faceage.engines.parity import check_parity
from faceage.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    from torch import Tensor, nn
    from torch.export import ExportedProgram

OPSET = 20
"""The ONNX operator set of the graphs."""
MAX_INLINE_VALUES = 40_000
"""A constant of a graph has at most so many values: the mask of a 192-pixel crop. A larger one is a weight that was not
found in the checkpoints."""


def write_graph(program: Program) -> dict:
    """Write a program's graph and the JSON file beside it, and return what that says.

    Raises:
        EngineError: if the graph differs from torch, or a weight is in none of the program's checkpoints.
    """
    import onnx_ir as ir
    import torch

    network = program.network(False)
    examples = tuple(map(torch.from_numpy, program.examples()))
    model = _to_onnx(program, export(program, network, examples))
    _point_into_checkpoints(model, program)
    _forget_sources(model)
    part = program.graph.with_suffix(".part.onnx")
    try:
        ir.save(model, part)
        reference = TorchEngine(program, program.network(True), torch.device("cpu"))
        parity = check_parity(program, open_graph(program, part), reference, "fp32")
        os.replace(part, program.graph)
    finally:
        part.unlink(missing_ok=True)
    record = {
        "graph": sha256_of_file(program.graph),
        "weights": {path.name: sha256_of_file(path) for path in program.checkpoints},
        "parity_with_torch": parity,
        "exported_by": {name: version(name) for name in ("torch", "onnxscript")} | {"opset": OPSET},
    }
    program.sidecar.write_text(json.dumps(record, indent=2) + "\n")
    return record


def export_for(program: Program, spec: Spec) -> ExportedProgram:
    """Return torch's graph of a program for a target, on the GPU if that is "cuda", else on the CPU."""
    import torch

    device = spec.target if spec.kind == "cuda" else "cpu"
    examples = tuple(torch.from_numpy(array).to(device) for array in program.examples())
    return export(program, program.network(True).to(device), examples, spec.precision)


def export(
    program: Program, network: nn.Module, examples: tuple[Tensor, ...], precision: Precision = "fp32"
) -> ExportedProgram:
    """Return torch's graph of `network`, its changing axes free in the range that `program` names.

    Args:
        program: names the axes.
        network: on the device of `examples`.
        examples: inputs.
        precision: see `Precision`. Losses, norms and sums stay in float32: in half they would overflow or vanish.
    """
    exported = _export(program, network, examples)
    if precision != "fp16":
        return exported
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


def _to_onnx(program: Program, exported: ExportedProgram) -> ir.Model:
    """Return the ONNX graph, its shapes and constants folded, its weights as they are in torch."""
    import onnxscript.optimizer
    import torch

    with _quiet():
        onnx_program = torch.onnx.export(
            exported,
            # With prefixes, because the exporter names values inside the graph after their operators, and an output
            # called "mean" would meet one of those.
            input_names=[INPUT_PREFIX + spec.name for spec in program.inputs],
            output_names=[OUTPUT_PREFIX + spec.name for spec in program.outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert onnx_program is not None  # it is None only for the exporter that `dynamo` turns off
        model = onnx_program.model
        # As inputs the weights are nothing that the optimizer could fold, so each stays as the checkpoint has it.
        weights = dict(model.graph.initializers)
        model.graph.initializers.clear()
        model.graph.inputs.extend(weights.values())
        onnxscript.optimizer.optimize(model)
        del model.graph.inputs[len(program.inputs) :]
        for weight in weights.values():
            if weight.uses():
                model.graph.initializers.add(weight)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's and its optimizer's reports to themselves: they name each rewrite that they try."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _point_into_checkpoints(model: ir.Model, program: Program) -> None:
    """Replace the weights in a graph by references to the checkpoints' files, and casts where those are in half."""
    import onnx_ir as ir

    graph = model.graph
    stored = {key: tensor for path in program.checkpoints for key, tensor in _stored_tensors(path).items()}
    _separate_transposed(graph)
    first = next(iter(graph))
    for weight in list(graph.initializers.values()):
        assert weight.const_value is not None
        array = weight.const_value.numpy()
        external = stored.get(_key(array))
        if external is None:
            if array.size > MAX_INLINE_VALUES:
                raise EngineError(
                    f"{program.name}: the weight {weight.name} {array.shape} is in none of its checkpoints; a graph "
                    "must compute what follows from weights: report this"
                )
            continue
        name = weight.name or ""
        del graph.initializers[name]
        if external.dtype == weight.dtype:
            weight.const_value = external
            graph.initializers.add(weight)
            continue
        source = ir.Value(
            name=f"{name}_stored", shape=external.shape, type=ir.TensorType(external.dtype), const_value=external
        )
        graph.initializers.add(source)
        cast = ir.node("Cast", [source], attributes={"to": weight.dtype}, name=f"cast_{name}")
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, weight.shape, weight.type
        weight.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(first, cast)


def _key(array: np.ndarray) -> tuple:
    """Return what says that two arrays hold the same numbers in the same shape, whatever their precision."""
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return array.dtype.str, array.shape, array.tobytes()


def _stored_tensors(path: Path) -> dict[tuple, ir.ExternalTensor]:
    """Return the tensors of a safetensors file as references into it, by `_key`."""
    import onnx_ir as ir

    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {
        "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "I64": ir.DataType.INT64,
        "U8": ir.DataType.UINT8, "I8": ir.DataType.INT8,
    }  # fmt: skip
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__" or entry["dtype"] not in kinds:
            continue
        low, high = entry["data_offsets"]
        kind = kinds[entry["dtype"]]
        array = np.frombuffer(data[start + low : start + high], kind.numpy()).reshape(entry["shape"])
        found[_key(array)] = ir.ExternalTensor(
            location=path.name,
            offset=start + low,
            length=high - low,
            dtype=kind,
            shape=ir.Shape(entry["shape"]),
            name=name,
            base_dir=path.parent,
        )
    return found


def _forget_sources(model: ir.Model) -> None:
    """Drop what the exporter notes of the Python code behind each node and value: most of the file, and paths."""
    made = [value for node in model.graph for value in node.outputs]
    values = [*made, *model.graph.inputs, *model.graph.initializers.values()]
    for part in (model, model.graph, *model.graph, *values):
        part.metadata_props.clear()
        part.doc_string = None


def _separate_transposed(graph: ir.Graph) -> None:
    """Give each transposed convolution weights of its own: a copy of the whole expression that makes them.

    A gradient's transposed convolution has the weights of the convolution that it goes back through. OpenVINO (2026.4)
    lays weights out anew for what uses them and takes such a pair for the same: with as many channels out as in, it
    computes the gradient with the wrong layout.
    """
    import onnx_ir as ir

    def copy(value: ir.Value, suffix: str) -> ir.Value:
        if value in copies:
            return copies[value]
        node = value.producer()
        if node is None:
            if value.const_value is None:
                raise EngineError(f"the weights of {suffix} depend on an input; they must be constant: report this")
            twin = ir.Value(
                name=f"{value.name}{suffix}", shape=value.shape, type=value.type, const_value=value.const_value
            )
            graph.initializers.add(twin)
            copies[value] = twin
            return twin
        inputs = [None if each is None else copy(each, suffix) for each in node.inputs]
        attributes = list(node.attributes.values())
        made = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs))
        for new, old in zip(made.outputs, node.outputs, strict=True):
            new.name, new.shape, new.type = f"{old.name}{suffix}", old.shape, old.type
            copies[old] = new
        graph.insert_before(consumer, made)
        return copies[value]

    for number, consumer in enumerate([node for node in graph if node.op_type == "ConvTranspose"]):
        weights = consumer.inputs[1]
        assert weights is not None
        copies: dict[ir.Value, ir.Value] = {}
        if len(weights.uses()) > 1 or weights.producer() is not None:
            consumer.replace_input_with(1, copy(weights, f"_transposed{number}"))
