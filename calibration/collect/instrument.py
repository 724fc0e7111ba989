"""A graph with extra outputs: of every activation that a product reads, its largest magnitudes and some of its rows.

All is reduced inside the graph, so that a call returns a few rows a tensor however large its activations are. Weights
stay where they are: no link may point at them, since loaders take files with several links for an attack.
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

from bridge_stg.export.graph.blocks import find_matmuls
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec, TensorSpec

PLACES = "calibration_places"
"""The extra input: float32 [R] in 0 … 1, strictly below 1, the places at which rows are taken."""

_TAKEN = "calibration_R"


@dataclass(frozen=True)
class Tap:
    """One tensor that is looked at, as rows [N, K] of all that lies before its last dim.

    Attributes:
        stem: its extra outputs are `stem`.absmax [K], `stem`.rows [R + 1, K] and `stem`.index [R + 1], of which the
            last entry is the row with the largest magnitude, and `stem`.count [1], which is N.
        names: the nodes of the products that read it, or past_key_0 … of keys and values.
        k: its channels.
    """

    stem: str
    names: tuple[str, ...]
    k: int


@dataclass(frozen=True)
class Instrumented:
    """A graph with taps.

    Attributes:
        path: its .onnx file.
        weights: the folder of its external data.
        graph: what goes in and out, taps included.
        taps: in the order of the graph.
    """

    path: Path
    weights: Path
    graph: GraphSpec
    taps: tuple[Tap, ...]

    def open(self, *, threads: int | None = None, lean: bool = False) -> OnnxRuntimeSession:
        """Open it in onnxruntime. Raises EngineError."""
        return OnnxRuntimeSession(self.path, self.graph, threads=threads, lean=lean, weights=self.weights)


def instrument(bundle: Bundle, name: str, variant: str, folder: Path) -> Instrumented:
    """Write a graph with taps into a folder, which is made; files in it are overwritten.

    Raises:
        BundleError: the bundle has no such graph.
        OSError: the folder cannot be written.
    """
    graph, source = bundle.graph(name, variant), bundle.graph_path(name, variant)
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx.load(os.fspath(source), load_external_data=False)
    readers: dict[str, list[str]] = {}
    channels: dict[str, int] = {}
    for product in find_matmuls(ir.load(source), name):
        readers.setdefault(product.activation, []).append(product.node)
        channels[product.activation] = product.k
    found = [
        (tensor, Tap(f"calibration_{i}", tuple(nodes), channels[tensor]), False)
        for i, (tensor, nodes) in enumerate(readers.items())
    ]
    if graph.cache is not None:
        k = graph.cache.kv_heads * graph.cache.head_dim
        for past, tensor in _new_keys_and_values(model.graph, graph.cache).items():
            found.append((tensor, Tap(f"calibration_{past}", (past,), k), True))
    _insert(model.graph, found)
    path = folder / "instrumented.onnx"
    onnx.save(model, os.fspath(path))
    taps = tuple(tap for _, tap, _ in found)
    outputs = tuple(tensor for tap in taps for tensor in _outputs(tap))
    extended = dataclasses.replace(
        graph,
        inputs=(*graph.inputs, TensorSpec(PLACES, "float32", (_TAKEN,))),
        outputs=(*graph.outputs, *outputs),
    )
    return Instrumented(path, source.parent, extended, taps)


def _outputs(tap: Tap) -> list[TensorSpec]:
    one_more = f"{_TAKEN} + 1"
    return [
        TensorSpec(f"{tap.stem}.absmax", "float32", (tap.k,)),
        TensorSpec(f"{tap.stem}.rows", "float32", (one_more, tap.k)),
        TensorSpec(f"{tap.stem}.index", "int64", (one_more,)),
        TensorSpec(f"{tap.stem}.count", "int64", (1,)),
    ]


def _new_keys_and_values(graph: onnx.GraphProto, cache: CacheSpec) -> dict[str, str]:
    """Return the tensors [B, kv_heads, L, head_dim] that a call adds to the cache, by past name."""
    if cache.update == "append":
        return dict(zip(cache.past_names, cache.written_names, strict=True))
    updates = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "TensorScatter"}
    return {past: updates[past] for past in cache.past_names if past in updates}


def _insert(graph: onnx.GraphProto, found: list[tuple[str, Tap, bool]]) -> None:
    """Add the taps, each behind the node that makes its tensor, so that no engine keeps it alive for longer."""
    taps: dict[str, list[tuple[Tap, bool]]] = {}
    for tensor, tap, by_head in found:
        taps.setdefault(tensor, []).append((tap, by_head))
    nodes = [helper.make_node("Cast", [PLACES], ["calibration_double"], to=TensorProto.DOUBLE)]
    made = [*(value.name for value in graph.input), *(value.name for value in graph.initializer)]
    nodes += [node for name in made for tap, by_head in taps.pop(name, []) for node in _tap_nodes(name, tap, by_head)]
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            nodes += [added for tap, by_head in taps.pop(name, []) for added in _tap_nodes(name, tap, by_head)]
    assert not taps, f"no node makes {sorted(taps)}"
    del graph.node[:]
    graph.node.extend(nodes)
    constants = {"calibration_first": [0], "calibration_second": [1]}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in constants.items())
    for k in {tap.k for _, tap, _ in found}:
        graph.initializer.append(numpy_helper.from_array(np.array([-1, k], np.int64), f"calibration_flat_{k}"))
    graph.input.append(helper.make_tensor_value_info(PLACES, TensorProto.FLOAT, [_TAKEN]))
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    for _, tap, _ in found:
        graph.output.extend(helper.make_tensor_value_info(t.name, types[t.dtype], t.dims) for t in _outputs(tap))


def _tap_nodes(tensor: str, tap: Tap, by_head: bool) -> list[onnx.NodeProto]:
    """Return the nodes of one tap; `by_head`: the tensor is [B, heads, L, head_dim], and a row is one position."""
    nodes = []

    def then(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        name = f"{tap.stem}.{output}"
        nodes.append(helper.make_node(operator, inputs, [name], name=f"{name}/{operator}", **attributes))
        return name

    value = then("Cast", [tensor], "float", to=TensorProto.FLOAT)
    if by_head:
        value = then("Transpose", [value], "positions", perm=[0, 2, 1, 3])
    flat = then("Reshape", [value, f"calibration_flat_{tap.k}"], "flat")
    size = then("Abs", [flat], "size")
    then("ReduceMax", [size, "calibration_first"], "absmax", keepdims=0)
    largest = then("ReduceMax", [size, "calibration_second"], "largest", keepdims=0)
    peak = then("ArgMax", [largest], "peak", axis=0, keepdims=1)
    count = then("Shape", [largest], "count")
    spread = then("Mul", ["calibration_double", then("Cast", [count], "double", to=TensorProto.DOUBLE)], "spread")
    index = then("Concat", [then("Cast", [spread], "places", to=TensorProto.INT64), peak], "index", axis=0)
    then("Gather", [flat, index], "rows", axis=0)
    return nodes
