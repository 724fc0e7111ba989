"""External data is found wherever a tensor can hang in a model, without the onnx package's help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bridge_stg.runtime.bundle.onnx_file import external_locations


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


def test_every_place_of_a_tensor_is_found(tmp_path):
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


def test_files_that_are_no_model(tmp_path):
    path = save(tmp_path / "m.onnx", helper.make_graph([constant("x")], "g", [], []))
    whole = path.read_bytes()
    for content, message in (
        (b"", "empty"),
        (b"{}", "number|field|protobuf"),
        (whole[: len(whole) // 2], "in the middle"),
        (b"\x08\x0a", "no graph"),
        (b"\xff" * 16, "number|protobuf"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            external_locations(path)
