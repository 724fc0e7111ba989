"""Attention in the form that onnxruntime on CPU runs fastest: its own fused operators, fed without transposes.

- Behind a cache, GroupQueryAttention: tile by tile, and only over the keys that a token sees, where `Attention` works
  over all of the cache. It writes the new rows into the cache itself.
- Without a cache or a mask, MultiHeadAttention, which keeps its scores in the L2 cache of a core.
- Rotary embeddings as one operator on [B, L, heads · head_dim], where they are written out in six.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import Edit

DOMAIN = "com.microsoft"
ROTARY_SINCE = 23
"""First opset with RotaryEmbedding."""

Attributes: TypeAlias = "Mapping[str, Any]"

_HEADS_FIRST = [0, 2, 1, 3]
_SPLIT_QKV = [2, 0, 3, 1, 4]


@dataclass(frozen=True)
class Heads:
    """A value [B, heads, L, head_dim] and what it was made of.

    Attributes:
        rows: the same numbers as [B, L, heads, head_dim], or [B, L, 3, heads, head_dim] with q, k and v side by side.
        count: its heads.
        cos: [.., head_dim] that it was rotated by; None: it was not.
        sin: as cos.
        part: 0, 1 or 2 where `rows` holds q, k and v.
    """

    rows: ir.Value
    count: int
    cos: ir.Value | None = None
    sin: ir.Value | None = None
    part: int | None = None


def fuse_attention(model: ir.Model) -> bool:
    """Replace every attention that fits one of the two operators; tell whether there was any. fp32 alone."""
    if model.graph.opset_imports[""] < ROTARY_SINCE:
        return False
    fuser = _Fuser(model.graph)
    fused = [fuser.fuse(node) for node in list(model.graph) if node.op_type == "Attention" and node.domain == ""]
    if any(fused):
        fuser.edit.drop_unused()
        model.graph.opset_imports[DOMAIN] = 1
    return any(fused)


class _Fuser:
    """The changes to one graph; what all layers share is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.edit = graph, Edit(graph)
        self._halves: dict[ir.Value, ir.Value] = {}
        self._parts: dict[ir.Value, Sequence[ir.Value]] = {}
        self._counts: tuple[ir.Value, ir.Value, ir.Value] | None = None
        self._anchor: ir.Node = graph[0]

    def fuse(self, node: ir.Node) -> bool:
        """Replace one Attention; tell whether it fits."""
        self._anchor = node
        out = _with_heads_last(node.outputs[0])
        if out is None or set(node.attributes) - {"scale"}:
            return False
        if len([v for v in node.inputs if v is not None]) == 3:
            return self._plain(node, out)
        return self._cached(node, out)

    def _cached(self, node: ir.Node, out: ir.Value) -> bool:
        """TensorScatter → Attention over all of the cache, as GroupQueryAttention."""
        scatters = [_producer(value, "TensorScatter") for value in node.inputs[1:3]]
        query = _heads(node.inputs[0])
        if query is None or scatters[0] is None or scatters[1] is None:
            return False
        key, value = _heads(scatters[0].inputs[1]), _heads(scatters[1].inputs[1])
        past = scatters[0].inputs[0]
        if key is None or value is None or value.cos is not None or past is None or past.dtype != ir.DataType.FLOAT:
            return False
        rows = [self._rotated(query), self._rotated(key), self._flat(value)]
        lengths, new, capacity = self._of_cache(scatters[0].inputs[2], past)
        inputs = [*rows, past, scatters[1].inputs[0], lengths, capacity, *[None] * 9, new]
        attributes = {"num_heads": query.count, "kv_num_heads": key.count, "scale": node.attributes["scale"].as_float()}
        fused = ir.node(
            "GroupQueryAttention", inputs, attributes, num_outputs=3, domain=DOMAIN, name=f"{node.name}_grouped"
        )
        self.graph.insert_before(node, fused)
        self.edit.replace(out, fused.outputs[0])
        for scatter, present in zip(scatters, fused.outputs[1:], strict=True):
            assert scatter is not None
            self.edit.replace(scatter.outputs[0], present)
        return True

    def _plain(self, node: ir.Node, out: ir.Value) -> bool:
        """Attention without a mask, as MultiHeadAttention."""
        found = [_heads(value) for value in node.inputs[:3]]
        query, key, value = found
        if query is None or key is None or value is None or value.cos is not None:
            return False
        if len({heads.count for heads in (query, key, value)}) > 1 or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        rows = [self._rotated(heads) for heads in (query, key, value)]
        attributes = {"num_heads": query.count, "scale": node.attributes["scale"].as_float()}
        fused = ir.node("MultiHeadAttention", rows, attributes, domain=DOMAIN, name=f"{node.name}_fused")
        self.graph.insert_before(node, fused)
        self.edit.replace(out, fused.outputs[0])
        return True

    def _rotated(self, heads: Heads) -> ir.Value:
        """Return [B, L, heads · head_dim], rotated where it was."""
        rows = self._flat(heads)
        if heads.cos is None or heads.sin is None:
            return rows
        inputs = [rows, self._half(heads.cos, rows), self._half(heads.sin, rows)]
        return self._add("RotaryEmbedding", inputs, {"num_heads": heads.count})[0]

    def _flat(self, heads: Heads) -> ir.Value:
        """Return [B, L, heads · head_dim], which may be where the rows come from."""
        reshape = _producer(heads.rows, "Reshape")
        if reshape is None:
            assert heads.part is None
            flat = self.edit.constant("flat_heads", np.array([0, 0, -1], np.int64))
            return self._add("Reshape", [heads.rows, flat])[0]
        rows = reshape.inputs[0]
        assert rows is not None
        if heads.part is None:
            return rows
        if rows not in self._parts:
            self._parts[rows] = self._add("Split", [rows], {"axis": 2, "num_outputs": 3}, outputs=3)
        return self._parts[rows][heads.part]

    def _half(self, table: ir.Value, rows: ir.Value) -> ir.Value:
        """Return [B, L, head_dim / 2] of a table [B, 1, L, head_dim] or [L, head_dim], whose halves are equal."""
        if table not in self._halves:
            half = self._add("Split", [table], {"axis": -1, "num_outputs": 2}, outputs=2)[0]
            if table.is_graph_input():
                half = self._repeated(half, rows)
            else:
                half = self._add("Squeeze", [half, self.edit.constant("second_axis", np.array([1], np.int64))])[0]
            self._halves[table] = half
        return self._halves[table]

    def _repeated(self, half: ir.Value, rows: ir.Value) -> ir.Value:
        """Return a table [L, head_dim / 2] once a row of `rows`."""
        batch = self._add("Shape", [rows], {"start": 0, "end": 1})[0]
        shape = self._add("Shape", [half])[0]
        return self._add("Expand", [half, self._add("Concat", [batch, shape], {"axis": 0})[0]])[0]

    def _of_cache(self, position: ir.Value | None, past: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return int32: the last position of each row [B], its new tokens [B], and the capacity []."""
        if self._counts is None:
            ids = next(value for value in self.graph.inputs if value.name == "input_ids")
            one = self.edit.constant("one_token", np.array([1], np.int64))
            zero = self.edit.constant("first_axis", np.array([0], np.int64))
            length = self._add("Shape", [ids], {"start": 1, "end": 2})[0]
            rows = self._add("Shape", [ids], {"start": 0, "end": 1})[0]
            last = self._add("Sub", [self._add("Add", [position, length])[0], one])[0]
            capacity = self._add("Squeeze", [self._add("Shape", [past], {"start": 2, "end": 3})[0], zero])[0]
            counts = last, self._add("Expand", [length, rows])[0], capacity
            casts = [self._add("Cast", [value], {"to": ir.DataType.INT32.value})[0] for value in counts]
            self._counts = casts[0], casts[1], casts[2]
        return self._counts

    def _add(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: Attributes | None = None, outputs: int = 1
    ) -> Sequence[ir.Value]:
        """Insert a node before the attention at hand, and return its outputs."""
        stem = str(self._anchor.name).rpartition("/")[0]
        name = self.edit.free_node(f"{stem}/{operator}" if stem else operator)
        node = ir.node(operator, inputs, attributes or {}, num_outputs=outputs, name=name)
        self.graph.insert_before(self._anchor, node)
        self.edit.nodes[name] = node
        for value in node.outputs:
            value.name = self.edit.free_name(f"{name}_out")
        return node.outputs


def _with_heads_last(out: ir.Value) -> ir.Value | None:
    """Return [B, L, heads, head_dim] as [B, L, heads · head_dim]: what an attention's output is turned into."""
    for operator in ("Transpose", "Reshape"):
        readers = [reader for reader, _ in out.uses()]
        if len(readers) != 1 or readers[0].op_type != operator or out.is_graph_output():
            return None
        if operator == "Transpose" and list(readers[0].attributes["perm"].as_ints()) != _HEADS_FIRST:
            return None
        out = readers[0].outputs[0]
    sizes = _constant(out.producer().inputs[1])  # type: ignore[union-attr]
    return out if sizes is not None and len(sizes) == 3 and _keeps(sizes) else None


def _heads(value: ir.Value | None) -> Heads | None:
    """Return what a value [B, heads, L, head_dim] was made of; None where it was made in another way."""
    rotation = _rotation(value)
    plain, cos, sin = rotation if rotation is not None else (value, None, None)
    turned, part = _producer(plain, "Transpose"), None
    squeeze = _producer(plain, "Squeeze")
    if squeeze is not None:
        cut = _producer(squeeze.inputs[0], "Slice")
        start = _constant(cut.inputs[1]) if cut is not None else None
        if cut is None or start is None or start[0] not in (0, 1, 2):
            return None
        turned, part = _producer(cut.inputs[0], "Transpose"), start[0]
    rows = turned.inputs[0] if turned is not None else None
    if turned is None or rows is None:
        return None
    perm = list(turned.attributes["perm"].as_ints())
    if perm != (_HEADS_FIRST if part is None else _SPLIT_QKV):
        return None
    count = _heads_of(rows)
    return None if count is None else Heads(rows, count, cos, sin, part)


def _heads_of(rows: ir.Value) -> int | None:
    """Return the heads of [.., heads, head_dim], which a Reshape made, perhaps with a norm behind it."""
    node = rows.producer()
    if node is not None and node.op_type == "RMSNormalization":
        node = _producer(node.inputs[0], "Reshape")
    if node is None or node.op_type != "Reshape":
        return None
    sizes = _constant(node.inputs[1])
    return None if sizes is None or len(sizes) < 4 or not _keeps(sizes) or sizes[-2] < 1 else sizes[-2]


def _rotation(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return x, cos and sin of x · cos + [−x₂, x₁] · sin."""
    total = _producer(value, "Add")
    products = [_producer(term, "Mul") for term in total.inputs] if total is not None else []
    if len(products) != 2 or products[0] is None or products[1] is None:
        return None
    (x, cos), (turned, sin) = products[0].inputs, products[1].inputs
    halves = _producer(turned, "Concat")
    negated = _producer(halves.inputs[0], "Neg") if halves is not None else None
    if x is None or cos is None or sin is None or halves is None or negated is None or len(halves.inputs) != 2:
        return None
    second, first = (_cut(half) for half in (negated.inputs[0], halves.inputs[1]))
    return (x, cos, sin) if first == (x, 0) and second == (x, 1) else None


def _cut(half: ir.Value | None) -> tuple[ir.Value | None, int] | None:
    """Return what a half of the last axis was cut from, and which half it is."""
    node = half.producer() if half is not None else None
    if half is not None and node is not None and node.op_type == "Split" and len(node.outputs) == 2:
        return node.inputs[0], int(half.index() or 0)
    if node is None or node.op_type != "Slice":
        return None
    start = _constant(node.inputs[1])
    return None if start is None else (node.inputs[0], int(start[0] > 0))


def _keeps(sizes: list[int]) -> bool:
    """Whether a Reshape to these sizes leaves the first two dims as they are; the second may follow from the rest."""
    return sizes[0] == 0 and sizes[1] in (0, -1) and -1 not in sizes[2:]


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = value.const_value if value is not None else None
    return None if tensor is None else [int(size) for size in np.atleast_1d(tensor.numpy())]


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None
