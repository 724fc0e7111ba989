"""TensorRT's parser takes every graph, on a machine without a GPU too."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import onnx
import pytest

from bridge_stg.export.engines.compile import PACKAGES, compile_in_tensorrt, parse_in_tensorrt, with_capacity
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import EngineError

GRAPH = '<ir_version: 8, opset_import: ["" : 18]> g (float[N] x) => (int64[1, M] y) { y = NonZero(x) }'


@pytest.fixture
def tensorrt() -> None:
    """Any TensorRT package; the RTX wheels need no GPU, but exist for few machines."""
    for name in PACKAGES[:-1]:
        try:
            importlib.import_module(name)
            return
        except ImportError:
            continue
    pytest.importorskip(PACKAGES[-1], reason='no TensorRT here: pip install "bridge-stg[rtx]" to run this test')


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_graphs_parse(tensorrt: None, exported: Bundle, name: str, variant: str) -> None:
    assert parse_in_tensorrt(exported.graph_path(name, variant)) == []


def test_a_graph_that_does_not_parse(tensorrt: None, tmp_path: Path) -> None:
    text = GRAPH.replace("int64[1, M] y", "string[N] y").replace("float[N] x", "string[N] x")
    onnx.save(onnx.parser.parse_model(text.replace("NonZero", "StringNormalizer")), tmp_path / "g.onnx")
    errors = parse_in_tensorrt(tmp_path / "g.onnx")
    assert errors and "StringNormalizer" in " ".join(errors)


def test_a_graph_compiles_for_a_range_of_sizes(tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[-1], reason='no TensorRT-RTX here: pip install "bridge-stg[rtx]" to run this test')
    model = '<ir_version: 8, opset_import: ["" : 18]> g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }'
    onnx.save(onnx.parser.parse_model(model), tmp_path / "g.onnx")
    assert len(compile_in_tensorrt(tmp_path / "g.onnx", {"N": (1, 4, 8)})) > 100
    with pytest.raises(EngineError, match=r"g\.onnx: input 'x' has a free dim 'N'; sizes were given for M"):
        compile_in_tensorrt(tmp_path / "g.onnx", {"M": (1, 4, 8)})
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "n.onnx")
    with pytest.raises(EngineError, match="refuses the graph|cannot compile the graph"):
        compile_in_tensorrt(tmp_path / "n.onnx", {"N": (1, 4, 8), "M": (1, 4, 8)})


@pytest.mark.slow
def test_only_a_cache_in_place_gets_a_capacity(exported: Bundle) -> None:
    for variant, size in (("standard", 512), ("primitive", "S")):
        model = onnx.load_from_string(with_capacity(exported.graph_path("language_model", variant), 512))
        past = next(value for value in model.graph.input if value.name == "past_key_0")
        dims = [dim.dim_param or dim.dim_value for dim in past.type.tensor_type.shape.dim]
        assert dims == ["B", 2, size, 16]


def test_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"not an onnx graph")
    with pytest.raises(EngineError, match="cannot be read as an ONNX graph"):
        with_capacity(tmp_path / "g.onnx", 64)
    with pytest.raises(EngineError, match="cannot be read as an ONNX graph"):
        with_capacity(tmp_path / "none.onnx", 64)


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *rest: Any) -> Any:
        if name in PACKAGES:
            raise ImportError(name)
        return real(name, *rest)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(EngineError, match=r"no TensorRT can be imported.*bridge-stg\[rtx\]"):
        parse_in_tensorrt(tmp_path / "g.onnx")
