"""External data is found for every kind of tensor of a model, without the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from bridge_stg.runtime.bundle.onnx_file import external_locations
from tests.errors import raises


def outside(name: str, location: str) -> TensorProto:
    tensor = onnx.numpy_helper.from_array(np.zeros(1, np.float32), name)
    onnx.external_data_helper.set_external_data(tensor, location, offset=0, length=4)
    tensor.ClearField("raw_data")
    return tensor


def save(path: Path, graph: onnx.GraphProto, functions: tuple[onnx.FunctionProto, ...] = ()) -> Path:
    path.write_bytes(helper.make_model(graph, functions=functions).SerializeToString())
    return path


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=outside("c", location))


def test_tensors_are_found_everywhere_in_a_model(tmp_path):
    inner = helper.make_graph([constant("inner")], "inner", [], [])
    sparse = onnx.SparseTensorProto(values=outside("v", "sparse"), indices=outside("i", "indices"), dims=[1])
    graph = helper.make_graph(
        [constant("attribute"), helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)],
        "g",
        [],
        [],
        initializer=[outside("a", "weights.data"), onnx.numpy_helper.from_array(np.zeros(4096, np.float32), "b")],
        sparse_initializer=[sparse],
    )
    function = helper.make_function("d", "f", [], ["c"], [constant("function")], [helper.make_opsetid("", 18)])
    found = external_locations(save(tmp_path / "m.onnx", graph, (function,)))
    assert found == {"weights.data", "attribute", "inner", "sparse", "indices", "function"}


def test_a_model_without_external_data(tmp_path):
    assert external_locations(save(tmp_path / "m.onnx", helper.make_graph([], "g", [], []))) == set()


def test_files_that_are_not_models(tmp_path):
    path = save(tmp_path / "m.onnx", helper.make_graph([constant("x")], "g", [], []))
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[: len(whole) // 2], b"\x08\x0a", b"\xff" * 16):
        path.write_bytes(content)
        with raises("bundle.not_onnx", path):
            external_locations(path)
