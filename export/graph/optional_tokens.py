"""Make the visual tokens of a vision encoder optional: the fine pass only needs feature maps.

onnxruntime computes every output of a graph. So the mergers, which only `visual_tokens` needs, get the requested number
of groups. The number is an initializer that a call may override (in ONNX an input may have a default), so the contract
of the graph does not change.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import Edit
from bridge_stg.runtime.bundle.contracts import TOKEN_GROUPS

TOKENS, MAPS = "visual_tokens", "feature_map"
ALL = np.array([np.iinfo(np.int64).max], np.int64)


def make_tokens_optional(model: ir.Model) -> bool:
    """Change a vision encoder in place; return False if its mergers do not work group by group."""
    outputs = {value.name: value for value in model.graph.outputs}
    weights = {value.dtype for value in model.graph.initializers.values()}
    if not {TOKENS, MAPS} <= set(outputs) or weights & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}:
        return False
    shared = _ancestors(outputs[MAPS])
    alone = _ancestors(outputs[TOKENS]) - shared
    values = {
        value
        for node in alone
        for value in node.inputs
        if value is not None and not value.is_initializer() and value.producer() in {None, *shared}
    }
    # The residual stream [G, N, width] after a block; mergers after windows reorder their rows by an index.
    residual = all(
        (node := value.producer()) and node.op_type == "Add" and value.dtype == ir.DataType.FLOAT for value in values
    )
    if not values or not residual:
        return False
    edit = Edit(model.graph)
    groups = edit.constant(TOKEN_GROUPS, ALL)
    model.graph.inputs.append(groups)
    first, axis = (edit.constant(name, np.zeros(1, np.int64)) for name in ("first_group", "group_axis"))
    for value in sorted(values, key=lambda value: str(value.name)):
        inputs, node = [value, first, groups, axis], f"{value.name}/Slice_groups"
        requested = edit.insert_after("Slice", inputs, value, f"{value.name}_groups", node=node)
        for reader, index in tuple(value.uses()):
            if reader in alone:
                reader.replace_input_with(index, requested)
    return True


def _ancestors(output: ir.Value) -> set[ir.Node]:
    """Return all nodes that a value depends on."""
    found: set[ir.Node] = set()
    todo = [output]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += [value for value in node.inputs if value is not None]
    return found
