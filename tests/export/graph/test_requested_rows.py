"""The last decoder layer of `ort-cpu` computes the requested positions alone, and a call may request none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.export.graph.fuse_attention import fuse_attention
from bridge_stg.export.graph.requested_rows import compute_requested_rows
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises
from tests.export.graph.test_fuse_attention import feeds_of

NAME = "language_model"


def test_the_rows_are_gathered_before_the_matmuls(exported: Bundle) -> None:
    nodes = list(ir.load(exported.graph_path(NAME, "ort-cpu")).graph)
    gathers = [place for place, node in enumerate(nodes) if node.op_type == "GatherND"]
    last = max(place for place, node in enumerate(nodes) if node.op_type == "GroupQueryAttention")
    first_matmul = next(place for place in range(last, len(nodes)) if nodes[place].op_type == "MatMul")
    assert len(gathers) == 2 and last < gathers[0] < first_matmul


@pytest.mark.parametrize("starts", [[0], [9, 2]])
def test_a_prefill_that_requests_nothing_writes_the_same_cache(exported: Bundle, starts: list[int]) -> None:
    feeds, found = feeds_of(exported, starts, 7, seed=3), []
    nothing = feeds | {"output_index": np.zeros((len(starts), 0), np.int64)}
    graph = exported.graph(NAME, "ort-cpu")
    with OnnxRuntimeSession(exported.graph_path(NAME, "ort-cpu"), graph, threads=1) as session:
        for inputs in (feeds, nothing):
            cache = session.allocate_cache(batch=len(starts), capacity=64)
            outputs = session.infer(inputs, cache=cache)
            found.append(cache.read())
    assert outputs["logits"].shape[:2] == (len(starts), 0) and outputs["taps"].shape[1:3] == (len(starts), 0)
    for name, values in found[0].items():
        np.testing.assert_array_equal(found[1][name], values, err_msg=name)
        assert np.abs(values).max() > 0
    graph = exported.graph(NAME, "standard")
    with OnnxRuntimeSession(exported.graph_path(NAME, "standard"), graph, threads=1) as session:
        cache = session.allocate_cache(batch=len(starts), capacity=64)
        with raises("engine.out_of_range", "K", kind=EngineError):
            session.infer(nothing, cache=cache)


def test_rows_that_are_read_stay(exported: Bundle) -> None:
    """Whatever reads the last layer's whole residual stream keeps it; so does attention that is not fused."""
    model = ir.load(exported.graph_path(NAME, "standard"))
    assert not compute_requested_rows(model)
    assert fuse_attention(model)
    gather = [node for node in model.graph if node.op_type == "GatherElements"][-1]
    stream = gather.inputs[0]
    assert stream is not None
    model.graph.outputs.append(stream)
    before = [node.op_type for node in model.graph]
    assert not compute_requested_rows(model) and [node.op_type for node in model.graph] == before
