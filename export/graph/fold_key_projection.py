"""Attention of a few queries over many patches, without a product a patch: its weights multiply the queries instead.

The spatial decoder's queries look at every patch of a frame, in every layer by keys and values of the layer's own. With
keys X·Wk + bk the scores are (q·Wkᵀ)·Xᵀ + q·bk, and the last term is the same for all patches, so that softmax drops
it; with values X·Wv + bv the result is (weights·X)·Wv + bv, since the weights of a query add up to 1. So X stays as it
is, and all heads of all queries of a frame are one attention over it. It pays while heads · queries stay far below
head_dim · width, the cost of projecting a patch: up to some 30 queries, and a call has 16 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import Edit

DOMAIN = "com.microsoft"
OVER_PATCHES, HEAT = ".space/Attention", "spatial_decoder.heat_key/MatMul"
"""How the nodes end, or are named, whose keys are the patches of a frame."""

_HEADS_FIRST = [0, 2, 1, 3]
_SWAPPED = [1, 0, 2, 3]


@dataclass(frozen=True)
class Linear:
    """data · weightᵀ + bias, with weight [out, in] and bias [out]."""

    data: ir.Value
    weight: ir.Value
    bias: ir.Value


def absorb_projections(model: ir.Model) -> bool:
    """Change the attentions over patches of a float graph in place; tell whether there was any."""
    found = [node for node in model.graph if node.op_type == "Attention" and str(node.name).endswith(OVER_PATCHES)]
    heat = next((node for node in model.graph if node.name == HEAT), None)
    edit = Edit(model.graph)
    changed = [_attention(_Writer(edit, node), node) for node in found]
    if any(changed):
        if heat is not None:
            _heat(edit, heat)
        edit.drop_unused()
        model.graph.opset_imports[DOMAIN] = 1
    return any(changed)


class _Writer:
    """Writes nodes in front of one, named after its module."""

    def __init__(self, edit: Edit, before: ir.Node) -> None:
        self.edit, self._before = edit, before
        self._module = str(before.name).rpartition("/")[0]

    def __call__(self, operator: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        name = self.edit.free_node(f"{self._module}/{operator}_queries")
        node = ir.node(operator, inputs, attributes, domain=domain, name=name)
        self.edit.graph.insert_before(self._before, node)
        self.edit.nodes[name] = node
        node.outputs[0].name = self.edit.free_name(f"{name}_out")
        return node.outputs[0]

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Return a value with other dims; 0 keeps one, −1 follows from the rest."""
        name = "sizes_" + "_".join(map(str, sizes)).replace("-", "m")
        return self("Reshape", value, self.edit.constant(name, np.array(sizes, np.int64)))


def _attention(write: _Writer, node: ir.Node) -> bool:
    """Replace one attention [F, heads, B, head_dim] over [F, heads, P, head_dim]; tell whether it fits."""
    split = [_before(value, "Transpose", _HEADS_FIRST) for value in node.inputs[:3]]
    if len(node.inputs) != 3 or None in split:
        return False
    query, key, value = (_before(rows, "Reshape") for rows in split)
    keys, values = _linear(key), _linear(value)
    heads = _sizes(split[0])[-2:-1]
    turned = _reader(node.outputs[0], "Transpose")
    if query is None or keys is None or values is None or not heads or turned is None:
        return False
    count, width = heads[0], _out(keys)
    size = width // count
    # Each head's query, times the part of the weight that made its keys: [F, B, width] → [F, heads · B, in].
    queries = write("Transpose", write.reshape(query, 0, 0, count, size), perm=[2, 0, 1, 3])
    batch = write("Shape", query, start=0, end=2)
    keys_weight = write.reshape(keys.weight, count, size, -1)
    asked = write("MatMul", write.reshape(queries, count, -1, size), keys_weight)
    asked = _unfolded(write, asked, batch, count)
    asked = write.reshape(write("Transpose", asked, perm=_SWAPPED), 0, -1, _in(keys))
    scale = node.attributes["scale"].as_float()
    seen = write("MultiHeadAttention", asked, keys.data, values.data, domain=DOMAIN, num_heads=1, scale=scale)
    # [F, heads · B, in] → each head's part of the values' weight → [F, B, width].
    seen = write("Transpose", write.reshape(seen, 0, count, -1, _in(values)), perm=_SWAPPED)
    values_weight = write("Transpose", write.reshape(values.weight, count, size, -1), perm=[0, 2, 1])
    out = write("MatMul", write.reshape(seen, count, -1, _in(values)), values_weight)
    out = write("Transpose", _unfolded(write, out, batch, count), perm=[1, 2, 0, 3])
    out = write("Add", out, write.reshape(values.bias, count, size))
    write.edit.replace(turned, out)
    return True


def _unfolded(write: _Writer, value: ir.Value, batch: ir.Value, count: int) -> ir.Value:
    """Return [heads, F · B, n] as [heads, F, B, n]."""
    ends = (write.edit.constant(f"sizes_{number}", np.array([number], np.int64)) for number in (count, -1))
    first, last = ends
    return write("Reshape", value, write("Concat", first, batch, last, axis=0))


def _heat(edit: Edit, product: ir.Node) -> bool:
    """Scores of queries by projected patches, [F, B, width] · [F, P, width]ᵀ; here the bias counts."""
    add = _reader(product.outputs[0], "Add")
    keys = _linear(add)
    turned = _reader(add, "Transpose")
    scores = None if turned is None else [reader for reader, _ in turned.uses()]
    if keys is None or scores is None or len(scores) != 1 or scores[0].op_type != "MatMul":
        return False
    node = scores[0]
    query = node.inputs[0]
    assert query is not None
    write = _Writer(edit, node)
    patches = write("Transpose", keys.data, perm=[0, 2, 1])
    asked = write("MatMul", write("MatMul", query, keys.weight), patches)
    out = write("Add", asked, write("MatMul", query, write.reshape(keys.bias, -1, 1)))
    edit.replace(node.outputs[0], out)
    return True


def _linear(value: ir.Value | None) -> Linear | None:
    """Return the parts of a linear layer whose weight and bias are stored as floats."""
    add = value.producer() if value is not None else None
    if add is None or add.op_type != "Add":
        return None
    products = [_producer(term, "MatMul") for term in add.inputs]
    biases = [term for term in add.inputs if term is not None and term.is_initializer()]
    product = next((node for node in products if node is not None), None)
    turned = _producer(product.inputs[1], "Transpose") if product is not None else None
    weight = turned.inputs[0] if turned is not None else None
    data = product.inputs[0] if product is not None else None
    if weight is None or data is None or not weight.is_initializer() or len(biases) != 1:
        return None
    floats = weight.dtype == ir.DataType.FLOAT and biases[0].dtype == ir.DataType.FLOAT
    return Linear(data, weight, biases[0]) if floats else None


def _out(linear: Linear) -> int:
    assert linear.weight.shape is not None
    return int(linear.weight.shape[0])


def _in(linear: Linear) -> int:
    assert linear.weight.shape is not None
    return int(linear.weight.shape[1])


def _before(value: ir.Value | None, operator: str, perm: Sequence[int] | None = None) -> ir.Value | None:
    """Return what an operator made a value of; None where another one made it."""
    node = _producer(value, operator)
    if node is None or (perm is not None and list(node.attributes["perm"].as_ints()) != list(perm)):
        return None
    return node.inputs[0]


def _reader(value: ir.Value | None, operator: str) -> ir.Value | None:
    """Return what the only reader of a value makes of it; None where that is another operator."""
    readers = [reader for reader, _ in value.uses()] if value is not None else []
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == operator else None


def _sizes(value: ir.Value | None) -> list[int]:
    """Return the sizes that a Reshape gave a value; empty where they are not stored."""
    node = _producer(value, "Reshape")
    sizes = node.inputs[1].const_value if node is not None and node.inputs[1] is not None else None
    return [] if sizes is None else [int(size) for size in sizes.numpy()]


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None
