"""Attention of few queries over many patches: multiply the queries by the key projection instead of every patch.

The spatial decoder's queries attend to every patch of a frame, in every layer with keys and values of the layer's own.
With keys X·Wk + bk the scores are (q·Wkᵀ)·Xᵀ + q·bk, and softmax drops the last term, which is the same for all
patches; with values X·Wv + bv the result is (weights·X)·Wv + bv, since the weights of a query add up to 1. So X is used
as it is, and all heads of all queries of a frame are one attention over it. This is faster while heads · queries is far
below head_dim · width, the cost of projecting a patch: up to about 30 queries, and a call has at most 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import HEADS_FIRST, Edit, integers_of, only_reader, producer

DOMAIN = "com.microsoft"
OVER_PATCHES, HEAT = ".space/Attention", "spatial_decoder.heat_key/MatMul"
"""End of the name, or name, of the nodes whose keys are the patches of a frame."""

_SWAPPED = [1, 0, 2, 3]


@dataclass(frozen=True)
class Linear:
    """data · weightᵀ + bias, with weight [out, in] and bias [out]."""

    data: ir.Value
    weight: ir.Value
    bias: ir.Value

    @property
    def sizes(self) -> tuple[int, int]:
        """Output and input channels."""
        assert self.weight.shape is not None
        return int(self.weight.shape[0]), int(self.weight.shape[1])


def fold_key_projection(model: ir.Model) -> bool:
    """Change the attentions over patches of a float graph in place; return whether one was changed."""
    found = [node for node in model.graph if node.op_type == "Attention" and str(node.name).endswith(OVER_PATCHES)]
    heat = next((node for node in model.graph if node.name == HEAT), None)
    edit = Edit(model.graph)
    changed = [_fold(_Writer(edit, node), node) for node in found]
    if any(changed):
        if heat is not None:
            _fold_heat(edit, heat)
        edit.drop_unused()
        model.graph.opset_imports[DOMAIN] = 1
    return any(changed)


class _Writer:
    """Inserts nodes before a given one, named after its module."""

    def __init__(self, edit: Edit, before: ir.Node) -> None:
        self.edit, self._before = edit, before
        self._module = str(before.name).rpartition("/")[0]

    def __call__(self, operator: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        name = f"{self._module}/{operator}_queries"
        return self.edit.insert(operator, inputs, attributes, before=self._before, name=name, domain=domain)[0]

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Insert a Reshape; 0 keeps a dim, and −1 follows from the rest."""
        name = "sizes_" + "_".join(map(str, sizes)).replace("-", "m")
        return self("Reshape", value, self.edit.constant(name, np.array(sizes, np.int64)))


def _fold(write: _Writer, node: ir.Node) -> bool:
    """Replace one attention [F, heads, B, head_dim] over [F, heads, P, head_dim]; return False if it does not fit."""
    transposes = [producer(value, "Transpose", HEADS_FIRST) for value in node.inputs[:3]]
    reshapes = [producer(transpose.inputs[0], "Reshape") for transpose in transposes if transpose is not None]
    if len(node.inputs) != 3 or len(reshapes) != 3 or reshapes[0] is None:
        return False
    query, key, value = (reshape.inputs[0] if reshape is not None else None for reshape in reshapes)
    keys, values = _linear(key), _linear(value)
    heads = (integers_of(reshapes[0].inputs[1]) or [])[-2:-1]
    output = only_reader(node.outputs[0], "Transpose")
    if query is None or keys is None or values is None or not heads or output is None:
        return False
    count, (width, channels) = heads[0], keys.sizes
    size = width // count
    # Each head's query, times the part of the weight that made its keys: [F, B, width] → [F, heads · B, in].
    queries = write("Transpose", write.reshape(query, 0, 0, count, size), perm=[2, 0, 1, 3])
    batch = write("Shape", query, start=0, end=2)
    keys_weight = write.reshape(keys.weight, count, size, -1)
    projected = write("MatMul", write.reshape(queries, count, -1, size), keys_weight)
    projected = _unfolded(write, projected, batch, count)
    projected = write.reshape(write("Transpose", projected, perm=_SWAPPED), 0, -1, channels)
    scale = node.attributes["scale"].as_float()
    attended = write("MultiHeadAttention", projected, keys.data, values.data, domain=DOMAIN, num_heads=1, scale=scale)
    # [F, heads · B, in] → each head's part of the values' weight → [F, B, width].
    attended = write("Transpose", write.reshape(attended, 0, count, -1, values.sizes[1]), perm=_SWAPPED)
    values_weight = write("Transpose", write.reshape(values.weight, count, size, -1), perm=[0, 2, 1])
    out = write("MatMul", write.reshape(attended, count, -1, values.sizes[1]), values_weight)
    out = write("Transpose", _unfolded(write, out, batch, count), perm=[1, 2, 0, 3])
    out = write("Add", out, write.reshape(values.bias, count, size))
    write.edit.replace(output.outputs[0], out)
    return True


def _unfolded(write: _Writer, value: ir.Value, batch: ir.Value, count: int) -> ir.Value:
    """Return [heads, F · B, n] as [heads, F, B, n]."""
    first, last = (write.edit.constant(f"sizes_{number}", np.array([number], np.int64)) for number in (count, -1))
    return write("Reshape", value, write("Concat", first, batch, last, axis=0))


def _fold_heat(edit: Edit, matmul: ir.Node) -> None:
    """Replace the scores of queries by projected patches, [F, B, width] · [F, P, width]ᵀ; here the bias counts."""
    add = only_reader(matmul.outputs[0], "Add")
    projected = add.outputs[0] if add is not None else None
    keys, transpose = _linear(projected), only_reader(projected, "Transpose")
    node = only_reader(transpose.outputs[0], "MatMul") if transpose is not None else None
    query = node.inputs[0] if node is not None else None
    if keys is None or node is None or query is None:
        return
    write = _Writer(edit, node)
    patches = write("Transpose", keys.data, perm=[0, 2, 1])
    projected = write("MatMul", write("MatMul", query, keys.weight), patches)
    out = write("Add", projected, write("MatMul", query, write.reshape(keys.bias, -1, 1)))
    edit.replace(node.outputs[0], out)


def _linear(value: ir.Value | None) -> Linear | None:
    """Return the linear layer with float weight and bias that computes a value."""
    add = producer(value, "Add")
    if add is None:
        return None
    matmul = next((node for term in add.inputs if (node := producer(term, "MatMul")) is not None), None)
    biases = [term for term in add.inputs if term is not None and term.is_initializer()]
    transpose = producer(matmul.inputs[1], "Transpose") if matmul is not None else None
    weight = transpose.inputs[0] if transpose is not None else None
    data = matmul.inputs[0] if matmul is not None else None
    if weight is None or data is None or not weight.is_initializer() or len(biases) != 1:
        return None
    floats = weight.dtype == ir.DataType.FLOAT and biases[0].dtype == ir.DataType.FLOAT
    return Linear(data, weight, biases[0]) if floats else None
