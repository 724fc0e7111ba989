"""Where outliers of an activation may move into weights: what makes the activation can be divided, channel by channel.

SmoothQuant (Xiao et al., arXiv 2211.10438), section 4: X·W = (X / s)·(s · W), and X / s costs nothing where a norm, or
a linear layer that an element-wise product follows, makes X. In float the graph computes what it computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bridge_stg.export.graph.blocks import FLOAT, Matmul, find_matmuls, find_tables, stored_weight


@dataclass(frozen=True)
class SmoothingGroup:
    """Products that read one activation, all of whose readers they are.

    Attributes:
        products: their weights' columns are multiplied by s [K].
        producer: the node that makes the activation: a norm, or the product whose rows are divided.
        divided: initializers that are divided by s: a norm's scale and bias, or a weight's rows and its bias.
    """

    products: tuple[Matmul, ...]
    producer: str
    divided: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The products' nodes."""
        return tuple(product.node for product in self.products)


def smoothing_groups(model: ir.Model, graph: str) -> list[SmoothingGroup]:
    """Return the groups of a float graph that can be smoothed, in its order; the same in every variant."""
    products = find_matmuls(model, graph)
    tables = {table.weight for table in find_tables(model, graph)}
    readers: dict[str, set[str]] = {}
    for product in products:
        readers.setdefault(product.weight, set()).add(product.activation)
    own = {p.weight for p in products if len(readers[p.weight]) == 1 and p.weight not in tables and p.form == FLOAT}
    by_activation: dict[str, list[Matmul]] = {}
    for product in products:
        by_activation.setdefault(product.activation, []).append(product)
    nodes = {str(node.name): node for node in model.graph}
    found = []
    for group in by_activation.values():
        value = nodes[group[0].node].inputs[0]
        assert value is not None
        names = {product.node for product in group}
        made = _made_by(value, names, model.graph)
        if made is None or any(product.weight not in own for product in group):
            continue
        producer, divided = made
        lone = all(len(model.graph.initializers[name].uses()) == 1 for name in divided)
        if lone and not tables & set(divided):
            found.append(SmoothingGroup(tuple(group), producer, divided))
    return found


def _made_by(value: ir.Value, readers: set[str], graph: ir.Graph) -> tuple[str, tuple[str, ...]] | None:
    """Return (node, initializers) that scale a value which nothing but `readers` sees; None if there is none."""
    if not all(str(node.name) in readers for node in value.consumers()) or value.is_graph_output():
        return None
    node = value.producer()
    while node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        assert source is not None
        if len(source.uses()) != 1 or source.is_graph_output():
            return None
        node = source.producer()
    if node is None:
        return None
    if node.op_type in ("RMSNormalization", "LayerNormalization"):
        parts = [part for part in node.inputs[1:] if part is not None]
        return (str(node.name), _names(parts)) if all(part.is_initializer() for part in parts) else None
    if node.op_type != "Mul":
        return None
    for factor, other in (node.inputs, node.inputs[::-1]):
        if factor is None or other is None:
            continue
        # The scale of a norm that is spelled out, as opposed to one number or a product of two activations.
        if factor.is_initializer() and factor.shape is not None and len(factor.shape) == 1 and factor.shape[0] != 1:
            return str(node.name), _names([factor])
    for factor in node.inputs:
        assert factor is not None
        linear = _linear(factor)
        if linear is not None:
            return linear
    return None


def _linear(value: ir.Value) -> tuple[str, tuple[str, ...]] | None:
    """Return the product behind a value, with its weight and bias, if nothing else sees what it makes."""
    bias: list[ir.Value] = []
    while len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "MatMul" and node.inputs[1] is not None:
            weight, form, turned = stored_weight(node.inputs[1])
            return (str(node.name), _names([weight, *bias])) if weight is not None and turned else None
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


def _names(values: list[ir.Value]) -> tuple[str, ...]:
    return tuple(str(value.name) for value in values)
