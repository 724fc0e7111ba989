"""TensorRT's parser takes every graph, on a machine without a GPU too."""

from __future__ import annotations

import weakref
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bridge_stg.export.engines.compile import empty_network, parse_graph, with_capacity
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises
from tests.export.engines.real_tensorrt import any_tensorrt, compile_for, parse, rtx

GRAPH = '<ir_version: 8, opset_import: ["" : 18]> g (float[N] x) => (int64[1, M] y) { y = NonZero(x) }'


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_graphs_parse(exported: Bundle, name: str, variant: str) -> None:
    assert parse(exported.graph_path(name, variant)) == []


def test_a_graph_that_does_not_parse(tmp_path: Path) -> None:
    any_tensorrt()
    text = GRAPH.replace("int64[1, M] y", "string[N] y").replace("float[N] x", "string[N] x")
    onnx.save(onnx.parser.parse_model(text.replace("NonZero", "StringNormalizer")), tmp_path / "g.onnx")
    errors = parse(tmp_path / "g.onnx")
    assert errors and "StringNormalizer" in " ".join(errors)


def test_a_graph_compiles_for_a_range_of_sizes(tmp_path: Path) -> None:
    rtx()
    model = '<ir_version: 8, opset_import: ["" : 18]> g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }'
    onnx.save(onnx.parser.parse_model(model), tmp_path / "g.onnx")
    assert len(compile_for(tmp_path / "g.onnx", {"N": (1, 4, 8)})) > 100
    with raises("engine.bad_profile", "g.onnx", "'N'", "M", kind=EngineError):
        compile_for(tmp_path / "g.onnx", {"M": (1, 4, 8)})
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "n.onnx")
    with pytest.raises(EngineError) as caught:
        compile_for(tmp_path / "n.onnx", {"N": (1, 4, 8), "M": (1, 4, 8)})
    assert caught.value.code in ("engine.rejected_graph", "engine.build_failed")


def test_errors_do_not_keep_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted in a callback of another builder, it would wait for a lock that this one holds."""
    tensorrt, builders = rtx(), []
    make = tensorrt.Builder

    def counted(logger: object) -> object:
        builder = make(logger)
        builders.append(weakref.ref(builder))
        return builder

    monkeypatch.setattr(tensorrt, "Builder", counted)
    model = '<ir_version: 8, opset_import: ["" : 18]> g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }'
    onnx.save(onnx.parser.parse_model(model), tmp_path / "g.onnx")
    with pytest.raises(EngineError) as caught:
        compile_for(tmp_path / "g.onnx", {"M": (1, 4, 8)})
    assert caught.value.__traceback__ is not None
    assert [builder() for builder in builders] == [None]


@pytest.mark.slow
def test_only_a_cache_in_place_gets_a_capacity(exported: Bundle) -> None:
    for variant, size in (("standard", 512), ("primitive", "S")):
        model = onnx.load_from_string(with_capacity(exported.graph_path("language_model", variant), 512))
        past = next(value for value in model.graph.input if value.name == "past_key_0")
        dims = [dim.dim_param or dim.dim_value for dim in past.type.tensor_type.shape.dim]
        assert dims == ["B", 2, size, 16]


def test_lengths_of_a_cache_are_not_parsed(tmp_path: Path) -> None:
    """Graphs keep a mask of positions: causal attention whose lengths are dropped would see the first keys alone."""
    tensorrt = rtx()
    sizes = {"q": ["B", 2, "L", 64], "k": ["B", 2, 128, 64]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, size) for name, size in sizes.items()]
    inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, ["B"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, sizes["q"])]
    node = helper.make_node("Attention", ["q", "k", "k", "", "", "", "lengths"], ["y"], is_causal=1)
    opset = [helper.make_opsetid("", 24)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opset), tmp_path / "g")
    network = empty_network(tensorrt)
    assert parse_graph(tensorrt, network, tmp_path / "g", 128) == []
    layers = [network.value.get_layer(index) for index in range(network.value.num_layers)]
    (layer,) = (layer for layer in layers if layer.type == tensorrt.LayerType.ATTENTION_OUTPUT)
    layer.__class__ = tensorrt.IAttentionOutputLayer
    assert layer.attention.key_value_lengths is None
    assert layer.attention.causal_kind == tensorrt.CausalMaskKind.UPPER_LEFT


def test_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"not an onnx graph")
    with raises("bundle.not_onnx", "g.onnx", kind=EngineError):
        with_capacity(tmp_path / "g.onnx", 64)
    with raises("bundle.not_onnx", "none.onnx", kind=EngineError):
        with_capacity(tmp_path / "none.onnx", 64)
