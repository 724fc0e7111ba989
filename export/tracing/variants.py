"""Make one variant of a traced graph that has several: take its side of every choice, and operators of its opset."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from bridge_stg.export.tracing.lowering import CHOICE, DOMAIN, LOWERINGS, SAME, Lowering

GELU_SINCE = 20
CUBE, SLOPE = 0.044715, float(np.sqrt(2 / np.pi))
"""Constants of the approximation of GELU by tanh (arXiv 1606.08415)."""


def share_dims(graph: ir.Graph) -> None:
    """Remove the nodes `Same` of a traced graph; its inputs get the dims that they return."""
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type == SAME]:
        value, shared = node.inputs[0], node.outputs[0]
        assert value is not None
        value.shape = shared.shape
        shared.replace_all_uses_with(value)
        graph.remove(node, safe=True)


def variant_of(traced: ir.Model, lowering: Lowering) -> ir.Model:
    """Return a copy of a traced graph that has one of its variants only."""
    model = traced.clone()
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.type = copy.copy(value.type)  # the clone shares types, and a type's dtype changes in place
    side = list(LOWERINGS).index(lowering.name)
    for node in [node for node in model.graph if node.domain == DOMAIN and node.op_type == CHOICE]:
        chosen, other = node.inputs[side], node.outputs[0]
        assert chosen is not None
        if other.is_graph_output():
            chosen.name, other.name = other.name, f"{other.name}_choice"
        other.replace_all_uses_with(chosen, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    passes.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[""] = lowering.opset
    for node in list(model.graph):
        if node.op_type == "Gelu" and lowering.opset < GELU_SINCE:
            _expand_gelu(model.graph, node)
        elif node.domain == "":
            node.version = lowering.opset
    return model


def _expand_gelu(graph: ir.Graph, gelu: ir.Node) -> None:
    """Replace a Gelu by operators of older opsets."""
    x = gelu.inputs[0]

    made: list[ir.Node] = []

    def then(operator: str, *inputs: ir.Value | float | None, **attributes: Any) -> Any:
        values = [constant(value) if isinstance(value, float) else value for value in inputs]
        node = ir.node(operator, values, attributes, metadata_props=dict(gelu.metadata_props))
        graph.insert_before(gelu, node)
        out = node.outputs[0]
        out.name, out.dtype = f"{gelu.outputs[0].name}_{len(made)}", ir.DataType.FLOAT
        out.shape = gelu.outputs[0].shape if values else ir.Shape([])
        made.append(node)
        return out

    def constant(value: float) -> Any:
        return then("Constant", value=ir.tensor(np.array(value, np.float32)))

    if gelu.attributes.get_string("approximate", "none") == "tanh":
        cubic = then("Add", x, then("Mul", CUBE, then("Pow", x, 3.0)))
        share = then("Add", then("Tanh", then("Mul", SLOPE, cubic)), 1.0)
    else:
        share = then("Add", then("Erf", then("Div", x, float(np.sqrt(2)))), 1.0)
    gelu.outputs[0].replace_all_uses_with(then("Mul", x, then("Mul", 0.5, share)))
    graph.remove(gelu, safe=True)
