"""Find groups of matmuls whose activation can be divided per channel by the node that produces it.

SmoothQuant (Xiao et al., arXiv 2211.10438), section 4: X·W = (X / s)·(s · W), and X / s costs nothing where a norm, or
a linear layer followed by an element-wise multiplication, produces X. In float, the graph's outputs do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bridge_stg.export.graph.blocks import FLOAT, Matmul, find_matmuls, find_tables, shared_activations, stored_weight


@dataclass(frozen=True)
class SmoothingGroup:
    """All readers of one activation, which are matmuls.

    Attributes:
        matmuls: the readers; their weights' columns are multiplied by s [K].
        producer: node that produces the activation: a norm, or the matmul whose rows are divided.
        divided: initializers that are divided by s: a norm's scale and bias, or a weight's rows and its bias.
    """

    matmuls: tuple[Matmul, ...]
    producer: str
    divided: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The matmuls' nodes."""
        return tuple(matmul.node for matmul in self.matmuls)


def smoothing_groups(model: ir.Model, graph: str) -> list[SmoothingGroup]:
    """Return the groups of a float graph that can be smoothed, in graph order; they are equal in every variant."""
    matmuls = find_matmuls(model, graph)
    tables = {table.weight for table in find_tables(model, graph)}
    readers: dict[str, set[str]] = {}
    for matmul in matmuls:
        readers.setdefault(matmul.weight, set()).add(matmul.activation)
    own = {m.weight for m in matmuls if len(readers[m.weight]) == 1 and m.weight not in tables and m.form == FLOAT}
    nodes = {str(node.name): node for node in model.graph}
    found = []
    for group in shared_activations(matmuls):
        value = nodes[group[0].node].inputs[0]
        assert value is not None
        produced = _producer(value, {matmul.node for matmul in group})
        if produced is None or any(matmul.weight not in own for matmul in group):
            continue
        producer, divided = produced
        lone = all(len(model.graph.initializers[name].uses()) == 1 for name in divided)
        if lone and not tables & set(divided):
            found.append(SmoothingGroup(tuple(group), producer, divided))
    return found


def _producer(value: ir.Value, readers: set[str]) -> tuple[str, tuple[str, ...]] | None:
    """Return the node and initializers that scale a value; None if it has other readers, or cannot be divided."""
    if not all(str(node.name) in readers for node in value.consumers()) or value.is_graph_output():
        return None
    node = value.producer()
    while node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        assert source is not None
        node = source.producer() if _read_once(source) else None
    if node is None or node.op_type not in ("RMSNormalization", "LayerNormalization", "Mul"):
        return None
    if node.op_type != "Mul":
        parts = [part for part in node.inputs[1:] if part is not None]
        return (str(node.name), _names(parts)) if all(part.is_initializer() for part in parts) else None
    factors = [factor for factor in node.inputs if factor is not None]
    # The scale of a norm that is written as primitive operators, not a scalar or the product of two activations.
    vectors = [
        f for f in factors if f.is_initializer() and f.shape is not None and len(f.shape) == 1 and f.shape[0] != 1
    ]
    if vectors:
        return str(node.name), _names(vectors[:1])
    return next((found for found in map(_linear, factors) if found is not None), None)


def _linear(value: ir.Value) -> tuple[str, tuple[str, ...]] | None:
    """Return the matmul that produces a value, with its weight and bias, if the value has no other readers."""
    bias: list[ir.Value] = []
    while _read_once(value):
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "MatMul" and node.inputs[1] is not None:
            weight, _, transposed = stored_weight(node.inputs[1])
            return (str(node.name), _names([weight, *bias])) if weight is not None and transposed else None
        if node.op_type == "Add" and not bias:
            bias = [part for part in node.inputs if part is not None and part.is_initializer()]
            rest = [part for part in node.inputs if part is not None and not part.is_initializer()]
            if len(bias) != 1 or len(rest) != 1:
                return None
            value = rest[0]
        elif node.op_type == "Cast" and node.inputs[0] is not None:
            value = node.inputs[0]
        else:
            return None
    return None


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _names(values: list[ir.Value]) -> tuple[str, ...]:
    return tuple(str(value.name) for value in values)
