"""Fuse attention and rotary embeddings into the operators of onnxruntime on CPU, which need no transposes.

- With a KV cache, GroupQueryAttention: it works in tiles, and only over the keys that a token sees, while `Attention`
  works over the whole cache. It also writes the new rows into the cache.
- Without a cache or a mask, MultiHeadAttention, which keeps its scores in the L2 cache of a core.
- RotaryEmbedding on [B, L, heads · head_dim] replaces six operators.
- For few tokens, `Attention` whose rows are the tokens' query heads that share a key head (`group_heads`):
  GroupQueryAttention reads the keys and values once per query head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import HEADS_FIRST, Edit, integers_of, only_reader, producer

DOMAIN = "com.microsoft"
ROTARY_SINCE = 23
"""First opset with RotaryEmbedding."""

LEAST_GROUP = 5
"""Query heads per key head from which `group_heads` pays: with 2 it is 1.4 times slower, with 7 a quarter faster."""

_SPLIT_QKV = [2, 0, 3, 1, 4]


@dataclass(frozen=True)
class Heads:
    """The source of a value [B, heads, L, head_dim].

    Attributes:
        rows: same values as [B, L, heads, head_dim], or with q, k and v side by side as [B, L, 3, heads, head_dim].
        count: number of heads.
        cos: rotary table [.., head_dim]; None if the value is not rotated.
        sin: rotary table like `cos`.
        part: 0, 1 or 2 for q, k or v of `rows`; None if `rows` has one of them only.
    """

    rows: ir.Value
    count: int
    cos: ir.Value | None = None
    sin: ir.Value | None = None
    part: int | None = None


def fuse_attention(model: ir.Model) -> bool:
    """Replace every fp32 attention that fits one of the two operators; return whether one was replaced."""
    if model.graph.opset_imports[""] < ROTARY_SINCE:
        return False
    fuser = _Fuser(model.graph)
    fused = [fuser.fuse(node) for node in list(model.graph) if node.op_type == "Attention" and node.domain == ""]
    if any(fused):
        fuser.edit.drop_unused()
        model.graph.opset_imports[DOMAIN] = 1
    return any(fused)


def group_heads(model: ir.Model) -> bool:
    """Replace each GroupQueryAttention whose groups are large, in place; return whether one was replaced."""
    fuser = _Fuser(model.graph)
    grouped = [fuser.group(node) for node in list(model.graph) if node.op_type == "GroupQueryAttention"]
    if any(grouped):
        fuser.edit.drop_unused()
    return any(grouped)


class _Fuser:
    """Fuses the attentions of one graph; nodes that all layers share are inserted once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.edit = graph, Edit(graph)
        self._halves: dict[ir.Value, ir.Value] = {}
        self._parts: dict[ir.Value, Sequence[ir.Value]] = {}
        self._counts: tuple[ir.Value, ir.Value, ir.Value] | None = None
        self._mask: ir.Value | None = None
        self._anchor: ir.Node = graph[0]

    def fuse(self, node: ir.Node) -> bool:
        """Replace one Attention; return False if it does not fit."""
        self._anchor = node
        out = _heads_last(node.outputs[0])
        if out is None or set(node.attributes) - {"scale"}:
            return False
        if len([v for v in node.inputs if v is not None]) == 3:
            return self._fuse_plain(node, out)
        return self._fuse_cached(node, out)

    def group(self, node: ir.Node) -> bool:
        """Replace one GroupQueryAttention by TensorScatter and Attention; return False if its groups are small."""
        self._anchor = node
        heads, key_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        if heads < LEAST_GROUP * key_heads:
            return False
        query, key, value, *past = node.inputs[:5]
        position = self._input("cache_position")
        present = [
            self._add("TensorScatter", [cache, self._heads_first(new, key_heads), position], {"axis": 2})[0]
            for cache, new in zip(past, (key, value), strict=True)
        ]
        rows = self._add("Reshape", [self._heads_first(query, heads), self._integers(0, key_heads, -1, 0)])[0]
        inputs = [rows, *present, self._seen(past[0], heads // key_heads)]
        out = self._add("Attention", inputs, {"scale": node.attributes["scale"].as_float()})[0]
        out = self._add("Reshape", [out, self._integers(0, heads, -1, 0)])[0]
        out = self._add("Transpose", [out], {"perm": HEADS_FIRST})[0]
        out = self._add("Reshape", [out, self._integers(0, 0, -1)])[0]
        for old, new in zip(node.outputs, (out, *present), strict=True):
            self.edit.replace(old, new)
        self.graph.remove(node, safe=True)
        return True

    def _heads_first(self, value: ir.Value | None, count: int) -> ir.Value:
        """Return [B, L, count · head_dim] as [B, count, L, head_dim]."""
        rotary = producer(value, "RotaryEmbedding")
        flat = value if rotary is None else rotary.inputs[0]
        merge = producer(flat, "Reshape")
        if merge is not None and integers_of(merge.inputs[1]) == [0, 0, -1]:
            split = merge.inputs[0]
        else:
            split = self._add("Reshape", [flat, self._integers(0, 0, count, -1)])[0]
        turned = self._add("Transpose", [split], {"perm": HEADS_FIRST})[0]
        return turned if rotary is None else self._add("RotaryEmbedding", [turned, *rotary.inputs[1:]])[0]

    def _seen(self, past: ir.Value | None, group: int) -> ir.Value:
        """Return the mask [B, 1, group · L, S]: 0 for positions up to that of each token, −∞ after it."""
        if self._mask is None:
            first = self._add("Unsqueeze", [self._input("cache_position"), self._integers(1, 2, 3)])[0]
            token = self._add("Unsqueeze", [self._places(self._input("input_ids"), 1), self._integers(1)])[0]
            last = self._add("Add", [first, token])[0]
            later = self._add("Greater", [self._places(past, 2), last])[0]
            shown, hidden = (self.edit.constant(f"mask_{n}", np.array(n, np.float32)) for n in (0, -np.inf))
            mask = self._add("Where", [later, hidden, shown])[0]
            mask = self._add("Expand", [mask, self._integers(1, group, 1, 1)])[0]
            self._mask = self._add("Reshape", [mask, self._integers(0, 1, -1, 0)])[0]
        return self._mask

    def _places(self, value: ir.Value | None, axis: int) -> ir.Value:
        """Return 0, 1 … up to the size of an axis, without it."""
        size = self._add("Squeeze", [self._add("Shape", [value], {"start": axis, "end": axis + 1})[0]])[0]
        zero, one = (self.edit.constant(f"integer_{n}", np.array(n, np.int64)) for n in (0, 1))
        return self._add("Range", [zero, size, one])[0]

    def _integers(self, *numbers: int) -> ir.Value:
        """Return a constant int64 vector."""
        return self.edit.constant("integers_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def _input(self, name: str) -> ir.Value:
        """Return an input of the graph."""
        return next(value for value in self.graph.inputs if value.name == name)

    def _fuse_cached(self, node: ir.Node, out: ir.Value) -> bool:
        """Replace TensorScatter and Attention over the whole cache by GroupQueryAttention."""
        scatters = [producer(value, "TensorScatter") for value in node.inputs[1:3]]
        query = _heads(node.inputs[0])
        if query is None or scatters[0] is None or scatters[1] is None:
            return False
        key, value = _heads(scatters[0].inputs[1]), _heads(scatters[1].inputs[1])
        past = scatters[0].inputs[0]
        if key is None or value is None or value.cos is not None or past is None or past.dtype != ir.DataType.FLOAT:
            return False
        rows = [self._rotated(query), self._rotated(key), self._flat(value)]
        lengths, new, capacity = self._cache_counts(scatters[0].inputs[2], past)
        inputs = [*rows, past, scatters[1].inputs[0], lengths, capacity, *[None] * 9, new]
        attributes = {"num_heads": query.count, "kv_num_heads": key.count, "scale": node.attributes["scale"].as_float()}
        name, operator = f"{node.name}_grouped", "GroupQueryAttention"
        fused = self.edit.insert(operator, inputs, attributes, before=node, name=name, domain=DOMAIN, outputs=3)
        self.edit.replace(out, fused[0])
        for scatter, present in zip(scatters, fused[1:], strict=True):
            assert scatter is not None
            self.edit.replace(scatter.outputs[0], present)
        return True

    def _fuse_plain(self, node: ir.Node, out: ir.Value) -> bool:
        """Replace Attention without a mask by MultiHeadAttention."""
        query, key, value = (_heads(value) for value in node.inputs[:3])
        if query is None or key is None or value is None or value.cos is not None:
            return False
        if len({heads.count for heads in (query, key, value)}) > 1 or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        rows = [self._rotated(heads) for heads in (query, key, value)]
        attributes = {"num_heads": query.count, "scale": node.attributes["scale"].as_float()}
        name = f"{node.name}_fused"
        fused = self.edit.insert("MultiHeadAttention", rows, attributes, before=node, name=name, domain=DOMAIN)
        self.edit.replace(out, fused[0])
        return True

    def _rotated(self, heads: Heads) -> ir.Value:
        """Return [B, L, heads · head_dim] after the rotary embedding, if there is one."""
        rows = self._flat(heads)
        if heads.cos is None or heads.sin is None:
            return rows
        inputs = [rows, self._half(heads.cos, rows), self._half(heads.sin, rows)]
        return self._add("RotaryEmbedding", inputs, {"num_heads": heads.count})[0]

    def _flat(self, heads: Heads) -> ir.Value:
        """Return [B, L, heads · head_dim], from before the Reshape where possible."""
        reshape = producer(heads.rows, "Reshape")
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
        """Return half [B, L, head_dim / 2] of a table [B, 1, L, head_dim] or [L, head_dim] with equal halves."""
        if table not in self._halves:
            half = self._add("Split", [table], {"axis": -1, "num_outputs": 2}, outputs=2)[0]
            if table.is_graph_input():  # [L, head_dim / 2]: the same for every row
                batch = self._add("Shape", [rows], {"start": 0, "end": 1})[0]
                shape = self._add("Shape", [half])[0]
                half = self._add("Expand", [half, self._add("Concat", [batch, shape], {"axis": 0})[0]])[0]
            else:
                half = self._add("Squeeze", [half, self.edit.constant("second_axis", np.array([1], np.int64))])[0]
            self._halves[table] = half
        return self._halves[table]

    def _cache_counts(self, position: ir.Value | None, past: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return as int32 the last position of each row [B], its number of new tokens [B], and the capacity []."""
        if self._counts is None:
            ids = self._input("input_ids")
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
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Insert a node before the current attention, named after its module, and return the outputs."""
        module = str(self._anchor.name).rpartition("/")[0]
        name = f"{module}/{operator}" if module else operator
        return self.edit.insert(operator, inputs, attributes, before=self._anchor, name=name, outputs=outputs)


def _heads_last(out: ir.Value) -> ir.Value | None:
    """Follow an attention's output [B, heads, L, head_dim] to the only Reshape of it to [B, L, heads · head_dim]."""
    for operator in ("Transpose", "Reshape"):
        reader = only_reader(out, operator)
        if reader is None or out.is_graph_output():
            return None
        if operator == "Transpose" and list(reader.attributes["perm"].as_ints()) != HEADS_FIRST:
            return None
        out = reader.outputs[0]
    sizes = integers_of(reader.inputs[1]) if reader is not None else None
    return out if sizes is not None and len(sizes) == 3 and _keeps_rows(sizes) else None


def _heads(value: ir.Value | None) -> Heads | None:
    """Return the source of a value [B, heads, L, head_dim]; None if it has another form."""
    rotation = _rotation(value)
    plain, cos, sin = rotation if rotation is not None else (value, None, None)
    part, perm = None, HEADS_FIRST
    squeeze = producer(plain, "Squeeze")
    if squeeze is not None:
        cut = producer(squeeze.inputs[0], "Slice")
        start = integers_of(cut.inputs[1]) if cut is not None else None
        if cut is None or start is None or start[0] not in (0, 1, 2):
            return None
        plain, part, perm = cut.inputs[0], start[0], _SPLIT_QKV
    transpose = producer(plain, "Transpose", perm)
    rows = transpose.inputs[0] if transpose is not None else None
    count = _heads_of(rows) if rows is not None else None
    return None if rows is None or count is None else Heads(rows, count, cos, sin, part)


def _heads_of(rows: ir.Value) -> int | None:
    """Return the number of heads of [.., heads, head_dim], the result of a Reshape or of a norm after it."""
    node = rows.producer()
    if node is not None and node.op_type == "RMSNormalization":
        node = producer(node.inputs[0], "Reshape")
    if node is None or node.op_type != "Reshape":
        return None
    sizes = integers_of(node.inputs[1])
    return None if sizes is None or len(sizes) < 4 or not _keeps_rows(sizes) or sizes[-2] < 1 else sizes[-2]


def _rotation(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return x, cos and sin of the rotation x · cos + [−x₂, x₁] · sin."""
    total = producer(value, "Add")
    terms = [producer(term, "Mul") for term in total.inputs] if total is not None else []
    if len(terms) != 2 or terms[0] is None or terms[1] is None:
        return None
    (x, cos), (swapped, sin) = terms[0].inputs, terms[1].inputs
    halves = producer(swapped, "Concat")
    negated = producer(halves.inputs[0], "Neg") if halves is not None else None
    if x is None or cos is None or sin is None or halves is None or negated is None or len(halves.inputs) != 2:
        return None
    second, first = (_cut(half) for half in (negated.inputs[0], halves.inputs[1]))
    return (x, cos, sin) if first == (x, 0) and second == (x, 1) else None


def _cut(half: ir.Value | None) -> tuple[ir.Value | None, int] | None:
    """Return the value that a half of the last axis was cut from, and the index of the half."""
    node = half.producer() if half is not None else None
    if half is not None and node is not None and node.op_type == "Split" and len(node.outputs) == 2:
        return node.inputs[0], int(half.index() or 0)
    if node is None or node.op_type != "Slice":
        return None
    start = integers_of(node.inputs[1])
    return None if start is None else (node.inputs[0], int(start[0] > 0))


def _keeps_rows(sizes: list[int]) -> bool:
    """Return whether a Reshape to these sizes keeps the first two dims."""
    return sizes[0] == 0 and sizes[1] in (0, -1) and -1 not in sizes[2:]
