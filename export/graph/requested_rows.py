"""Let the last decoder layer compute only the requested positions: a prefill reads one of its 256.

Of the last layer's tokens the others need keys and values, which later tokens attend to, but no output. So the rows at
`output_index` are gathered after its attention, and not after its MLP.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import Edit

INDEX = "output_index"
ROW_BY_ROW = frozenset({
    "Add", "Cast", "DequantizeLinear", "Div", "MatMul", "MatMulIntegerToFloat", "MatMulNBits", "Mul", "QuantizeLinear",
    "RMSNormalization", "Sigmoid",
})  # fmt: skip
"""Operators that compute each row [width] of [B, L, width] from the same row of their inputs."""

_SOURCES = ("Add", "GroupQueryAttention")


def compute_requested_rows(model: ir.Model) -> bool:
    """Change a language model in place; return False if no layer has rows that nothing reads."""
    index = next((value for value in model.graph.inputs if value.name == INDEX), None)
    nodes = list(model.graph)
    gathers = {node for node in nodes if index is not None and _gathers(node, index)}
    constants = _constants(model.graph)
    inside: set[ir.Node] = set()
    for node in reversed(nodes):
        readers = {reader for value in node.outputs for reader, _ in value.uses()}
        if (
            node.op_type in ROW_BY_ROW
            and len(node.outputs) == 1
            and readers
            and readers <= inside | gathers
            and not {*node.outputs} & {*model.graph.outputs, *constants}
        ):
            inside.add(node)
    first = {
        value: node
        for node in reversed(nodes)
        for value in node.inputs
        if node in inside and value is not None and value not in constants and value.producer() not in inside
    }
    if not first or any((source := value.producer()) is None or source.op_type not in _SOURCES for value in first):
        return False
    edit = Edit(model.graph)
    last_axis = edit.constant("last_axis", np.array([-1], np.int64))
    inputs = [index, last_axis]
    (rows,) = edit.insert("Unsqueeze", inputs, before=nodes[0], name=f"{INDEX}/Unsqueeze")
    for value, node in first.items():
        (found,) = edit.insert("GatherND", [value, rows], {"batch_dims": 1}, before=node, name=f"{value.name}/GatherND")
        found.dtype = value.dtype
        for reader, place in tuple(value.uses()):
            if reader in inside:
                reader.replace_input_with(place, found)
    for node in inside:
        node.outputs[0].shape = None
    for node in gathers:
        source = node.inputs[0]
        if source is not None and source.producer() in inside:
            node.outputs[0].replace_all_uses_with(source)
    edit.drop_unused()
    return True


def _gathers(node: ir.Node, index: ir.Value) -> bool:
    """Return whether a node gathers rows [B, K, width] at the requested positions."""
    if node.op_type != "GatherElements" or node.attributes.get_int("axis", 0) != 1:
        return False
    expand = node.inputs[1].producer() if node.inputs[1] is not None else None
    column = expand.inputs[0].producer() if expand is not None and expand.inputs[0] is not None else None
    return column is not None and column.inputs[0] is index and not node.outputs[0].is_graph_output()


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Return all values that no input changes."""
    found = set(graph.initializers.values())
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in found for value in inputs):
            found.update(node.outputs)
    return found
