"""The bundled graphs: what `train.bundle` makes of the bundled checkpoints, weights in those and nowhere else."""

import json
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import onnx
import pytest
import torch

from faceage.engines import ort
from faceage.engines.eager import TorchEngine
from faceage.engines.export import MAX_INLINE_VALUES, write_graph
from faceage.engines.parity import check_parity
from faceage.errors import CheckpointError, EngineError
from train.bundle import bundled_programs

PROGRAMS = {program.name: program for program in bundled_programs()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_bundled_graph_is_the_network_of_its_checkpoints(name):
    program = PROGRAMS[name]
    assert program.fingerprint  # the hashes beside it are those of the graph and of the checkpoints
    reference = TorchEngine(program, program.network(True), torch.device("cpu"))
    found = check_parity(program, ort.open_graph(program, program.graph), reference, "fp32")
    recorded = json.loads(program.sidecar.read_text())["parity_with_torch"]
    assert found["max_abs_error"] <= max(2 * recorded["max_abs_error"], 1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_bundled_graph_has_its_weights_in_the_checkpoints(name):
    program = PROGRAMS[name]
    model = onnx.load(program.graph, load_external_data=False)
    inside = [tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert all(np.prod(tensor.dims) <= MAX_INLINE_VALUES for tensor in inside)
    stored = onnx.TensorProto.FLOAT if name.startswith("mtcnn") else onnx.TensorProto.FLOAT16
    assert {tensor.data_type for tensor in outside} == {stored}
    places = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
    assert places == {path.name for path in program.checkpoints}
    assert program.graph.stat().st_size < 250_000
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)  # no paths of who made it


@pytest.mark.parametrize("name", ["mtcnn-rnet", "space-hair"])
def test_bundling_again_gives_the_same_bytes(name, tmp_path):
    program = PROGRAMS[name]
    record = json.loads(program.sidecar.read_text())
    now = {package: version(package) for package in ("torch", "onnxscript")}
    if {package: record["exported_by"][package] for package in now} != now:
        pytest.skip(f"the graphs were made by {record['exported_by']}, here are {now}")
    for path in program.checkpoints:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    again = replace(
        program,
        graph=tmp_path / program.graph.name,
        checkpoints=tuple(tmp_path / path.name for path in program.checkpoints),
    )
    assert write_graph(again)["graph"] == record["graph"]


@pytest.mark.parametrize("damage", ["graph", "weights", "no sidecar"])
def test_a_damaged_file_is_one_line_and_not_another_age(damage, tmp_path):
    program = PROGRAMS["mtcnn-rnet"]
    (weights,) = program.checkpoints
    for path in (program.graph, program.sidecar, weights):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    mine = replace(program, graph=tmp_path / program.graph.name, checkpoints=(tmp_path / weights.name,))
    ort.open_graph(mine, mine.graph)
    victim = {"graph": mine.graph, "weights": mine.checkpoints[0], "no sidecar": mine.sidecar}[damage]
    data = bytearray(victim.read_bytes())
    data[-10] ^= 1
    victim.write_bytes(data) if damage != "no sidecar" else victim.unlink()
    mine = replace(mine)
    with pytest.raises(CheckpointError, match=r"damaged.*restore it by what brought it: pip install"):
        ort.open_graph(mine, mine.graph)


def test_a_weight_that_is_in_no_checkpoint_is_refused(tmp_path):
    program = PROGRAMS["space-hair"]
    with pytest.raises(EngineError, match=r"is in none of its checkpoints; a graph must compute what follows"):
        write_graph(replace(program, graph=tmp_path / "hair.onnx", checkpoints=()))
    assert list(tmp_path.iterdir()) == []
