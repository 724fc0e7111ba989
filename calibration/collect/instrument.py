"""Add outputs to a graph: statistics of every activation that a matmul reads, and some of its rows.

Everything is reduced inside the graph, so that a call returns a few rows per tensor however large its activations are.
Weights are not copied, and not hard-linked either: loaders reject files with several links.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from bridge_stg.export.graph.blocks import find_matmuls, shared_activations
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec, TensorSpec

PLACES = "calibration_places"
"""The extra input: float32 [R] in [0, 1), the relative positions of the rows to return."""

_TAKEN = "calibration_R"


@dataclass(frozen=True)
class Activation:
    """One observed tensor, as rows [N, K]: K is its last dim, N the product of all others.

    Attributes:
        stem: prefix of its outputs: `stem`.absmax [K], `stem`.rows [R + 1, K] and `stem`.index [R + 1], where the
            last one is the row with the largest magnitude, and `stem`.count [1], which is N.
        names: nodes of the matmuls that read it, or past_key_0 … of keys and values.
        k: number of channels.
    """

    stem: str
    names: tuple[str, ...]
    k: int


@dataclass(frozen=True)
class Instrumented:
    """A graph with statistics outputs: its .onnx file, the folder of its external data, and all inputs and outputs."""

    path: Path
    weights: Path
    graph: GraphSpec
    activations: tuple[Activation, ...]

    def open(self, *, threads: int | None = None, low_memory: bool = False) -> OnnxRuntimeSession:
        """Open it in onnxruntime. Raises EngineError."""
        return OnnxRuntimeSession(self.path, self.graph, threads=threads, low_memory=low_memory, weights=self.weights)


def instrument(bundle: Bundle, name: str, variant: str, folder: Path) -> Instrumented:
    """Write a graph with statistics outputs into a folder; existing files are overwritten."""
    graph, source = bundle.graph(name, variant), bundle.graph_path(name, variant)
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx.load(os.fspath(source), load_external_data=False)
    found = [
        (group[0].activation, Activation(f"calibration_{i}", tuple(m.node for m in group), group[0].k), False)
        for i, group in enumerate(shared_activations(find_matmuls(ir.load(source), name)))
    ]
    if graph.cache is not None:
        k = graph.cache.kv_heads * graph.cache.head_dim
        for past, tensor in _new_keys_and_values(model.graph, graph.cache).items():
            found.append((tensor, Activation(f"calibration_{past}", (past,), k), True))
    _insert(model.graph, found)
    path = folder / "instrumented.onnx"
    onnx.save(model, os.fspath(path))
    activations = tuple(activation for _, activation, _ in found)
    outputs = tuple(tensor for activation in activations for tensor in _outputs(activation))
    extended = dataclasses.replace(
        graph,
        inputs=(*graph.inputs, TensorSpec(PLACES, "float32", (_TAKEN,))),
        outputs=(*graph.outputs, *outputs),
    )
    return Instrumented(path, source.parent, extended, activations)


def _outputs(activation: Activation) -> list[TensorSpec]:
    one_more = f"{_TAKEN} + 1"
    return [
        TensorSpec(f"{activation.stem}.absmax", "float32", (activation.k,)),
        TensorSpec(f"{activation.stem}.rows", "float32", (one_more, activation.k)),
        TensorSpec(f"{activation.stem}.index", "int64", (one_more,)),
        TensorSpec(f"{activation.stem}.count", "int64", (1,)),
    ]


def _new_keys_and_values(graph: onnx.GraphProto, cache: CacheSpec) -> dict[str, str]:
    """Return the tensors [B, kv_heads, L, head_dim] that a call adds to the cache, by past name."""
    if cache.update == "append":
        return dict(zip(cache.past_names, cache.written_names, strict=True))
    updates = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "TensorScatter"}
    return {past: updates[past] for past in cache.past_names if past in updates}


def _insert(graph: onnx.GraphProto, found: list[tuple[str, Activation, bool]]) -> None:
    """Add the statistics of each tensor right after the node that produces it, so that it is freed early."""
    added: dict[str, list[onnx.NodeProto]] = {}
    for tensor, activation, by_head in found:
        added.setdefault(tensor, []).extend(_statistics_nodes(tensor, activation, by_head))
    nodes = [helper.make_node("Cast", [PLACES], ["calibration_double"], to=TensorProto.DOUBLE)]
    for value in (*graph.input, *graph.initializer):
        nodes += added.pop(value.name, [])
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            nodes += added.pop(name, [])
    assert not added, f"no node produces {sorted(added)}"
    del graph.node[:]
    graph.node.extend(nodes)
    constants = {"calibration_first": [0], "calibration_second": [1]}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in constants.items())
    for k in {activation.k for _, activation, _ in found}:
        graph.initializer.append(numpy_helper.from_array(np.array([-1, k], np.int64), f"calibration_flat_{k}"))
    graph.input.append(helper.make_tensor_value_info(PLACES, TensorProto.FLOAT, [_TAKEN]))
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    for _, activation, _ in found:
        graph.output.extend(helper.make_tensor_value_info(t.name, types[t.dtype], t.dims) for t in _outputs(activation))


def _statistics_nodes(tensor: str, activation: Activation, by_head: bool) -> list[onnx.NodeProto]:
    """Return the nodes for one tensor; `by_head`: it is [B, heads, L, head_dim], and a row is one position."""
    nodes = []

    def then(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        name = f"{activation.stem}.{output}"
        nodes.append(helper.make_node(operator, inputs, [name], name=f"{name}/{operator}", **attributes))
        return name

    value = then("Cast", [tensor], "float", to=TensorProto.FLOAT)
    if by_head:
        value = then("Transpose", [value], "positions", perm=[0, 2, 1, 3])
    flat = then("Reshape", [value, f"calibration_flat_{activation.k}"], "flat")
    size = then("Abs", [flat], "size")
    then("ReduceMax", [size, "calibration_first"], "absmax", keepdims=0)
    largest = then("ReduceMax", [size, "calibration_second"], "largest", keepdims=0)
    peak = then("ArgMax", [largest], "peak", axis=0, keepdims=1)
    count = then("Shape", [largest], "count")
    spread = then("Mul", ["calibration_double", then("Cast", [count], "double", to=TensorProto.DOUBLE)], "spread")
    index = then("Concat", [then("Cast", [spread], "places", to=TensorProto.INT64), peak], "index", axis=0)
    then("Gather", [flat, index], "rows", axis=0)
    return nodes
