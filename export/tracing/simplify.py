"""Simplify a traced graph: fold constants, fuse norms, drop shape arithmetic, name nodes by module.

Weights keep the checkpoint's layout: their transposes stay in the graph, and engines fold them when they load it. Knows
nothing of what the graph computes.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules import common

from bridge_stg.export.tracing.repeated_blocks import SCOPES
from bridge_stg.export.tracing.weights import StoredWeight

RMS_NORMALIZATION_SINCE = 23


def simplify(model: ir.Model, *, modules: Callable[[str], str], expand: Callable[[], None]) -> None:
    """Simplify a graph in place. All of its initializers are weights, and keep names and layout.

    `modules` returns the prefix of node names for the path of a torch module; `expand` adds the nodes of blocks that
    were not traced, to a graph of which only equal nodes are still to be merged.
    """
    weights = set(model.graph.initializers)
    passes.InlinePass()(model)
    _view_weights(model.graph)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=_should_fold)
    rewriter.rewrite(model, _REDUNDANT)
    fused = model.opset_imports[""] >= RMS_NORMALIZATION_SINCE
    rewriter.rewrite(model, pattern.RewriteRuleSet([_FUSE_NORM if fused else _DIVIDE], commute=True))
    _constant_reshapes(model.graph)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=_should_fold)
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model.graph, weights)
    expand()
    passes.CommonSubexpressionEliminationPass()(model)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.OutputFixPass()(model)
    _cast_pixels_first(model.graph)
    _name_nodes(model.graph, modules)
    passes.ClearMetadataAndDocStringPass()(model)
    # Inner shapes have symbols of the trace, and can be inferred from the contract's.
    ends = {*model.graph.inputs, *model.graph.outputs}
    for value in (value for node in model.graph for value in node.outputs):
        value.metadata_props.clear()
        if value not in ends:
            value.shape = None


def _should_fold(node: ir.Node) -> bool | None:
    """Keep transposes of weights: folded they would be copies, and a tied head shares its tensor."""
    source = node.inputs[0] if node.inputs else None
    return False if node.op_type == "Transpose" and source is not None and source.is_initializer() else None


def _view_weights(graph: ir.Graph) -> None:
    """Give a weight whose only reader is a Reshape the new shape, so that engines see a plain weight."""
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Reshape":
            continue
        view = uses[0].node.outputs[0]
        if view.shape is None or not view.shape.is_static() or value.const_value is None:
            continue
        sizes = [int(size) for size in view.shape]
        if isinstance(value.const_value, StoredWeight):
            value.const_value = value.const_value.reshaped(sizes)
        else:
            value.const_value = ir.tensor(value.const_value.numpy().reshape(sizes), name=value.name)
        value.shape = view.shape
        view.replace_all_uses_with(value)


def _norm(op: Any, x: Any, scale: Any, epsilon: Any) -> Any:
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
    return op.Mul(scale, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))))


def _is_norm(context: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any) -> bool:
    value = ir.convenience.get_const_tensor(epsilon)
    rank = None if scale.shape is None else len(scale.shape)
    return scale.is_initializer() and rank == 1 and value is not None and value.size == 1


def _fused_norm(op: Any, x: Any, scale: Any, epsilon: ir.Value, **_: Any) -> Any:
    value = ir.convenience.get_const_tensor(epsilon)
    assert value is not None
    return op.RMSNormalization(x, scale, axis=-1, epsilon=float(value.numpy().item()))


_REDUNDANT = pattern.RewriteRuleSet([
    common.add_0_rule, common.sub_0_rule, common.mul_by_1_rule, common.div_by_1_rule,
    common.cast_cast_rule, common.no_op_cast_rule, common.no_op_expand_rule, common.no_op_transpose_rule,
    common.cast_constant_of_shape_rule, common.cast_constant_of_shape_without_value_rule,
    common.collapse_slice_rule, common.collapse_slice2_rule, common.materialize_reshape_shape_rule,
    common.reshape_reshape_rule, common.squeeze_reshape_1d_rule, common.transpose_transpose_rule,
    common.unsqueeze_unsqueeze_rule, common.remove_optional_bias_from_conv_rule,
    common.one_reshape_matmul_reshape_rule, common.two_reshapes_matmul_reshape_rule,
])  # fmt: skip
"""The default rules of onnxscript that apply to these graphs. One more, for pairs of Slice, takes quadratic time."""

_FUSE_NORM = pattern.RewriteRule(_norm, _fused_norm, _is_norm, name="RMSNormalization")
"""Norms are one operator from opset 23 on, computed in fp32 (`stash_type` 1)."""

_DIVIDE = pattern.RewriteRule(
    lambda op, x, y: op.Mul(x, op.Reciprocal(y)), lambda op, x, y, **_: op.Div(x, y), name="Divide"
)
"""Form of norms before opset 23 that onnxruntime's fusion recognizes."""


def _constant_reshapes(graph: ir.Graph) -> None:
    """Make the target shapes of Reshape constant: 0 for a dim that is kept, −1 for at most one that is not static."""
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or target.shape is None:
            continue
        sizes: list[int] = []
        for axis, size in enumerate(target.shape):
            kept = axis < len(source.shape) and str(size) == str(source.shape[axis]) and str(size) != "None"
            sizes.append(size if isinstance(size, int) else 0 if kept else -1)
        if sizes.count(-1) > 1:
            continue
        shape = ir.Value(name=f"{target.name}_sizes", const_value=ir.tensor(np.array(sizes, np.int64)))
        shape.shape, shape.dtype = ir.Shape([len(sizes)]), ir.DataType.INT64
        graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)


def _cast_pixels_first(graph: ir.Graph) -> None:
    """Read the sizes of a uint8 input from its Cast: TensorRT takes such an input only for a Cast."""
    for value in graph.inputs:
        uses = list(value.uses()) if value.dtype == ir.DataType.UINT8 else []
        cast = next((use.node for use in uses if use.node.op_type == "Cast"), None)
        if cast is None:
            continue
        graph.remove(cast)
        graph.insert_before(graph[0], cast)
        for node in (use.node for use in uses if use.node.op_type == "Shape"):
            node.replace_input_with(0, cast.outputs[0])


def _merge_constants(graph: ir.Graph, weights: set[str]) -> None:
    """Merge equal constants, so that equal nodes can be found; weights stay separate, but share bytes on disk."""
    kept: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in sorted(graph.initializers.items()):
        if name in weights or value.const_value is None:
            continue
        array = value.const_value.numpy()
        first = kept.setdefault((value.dtype, array.shape, array.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[name]


def _name_nodes(graph: ir.Graph, modules: Callable[[str], str]) -> None:
    """Name nodes `module/Operator`, with a number where a module has several."""
    counts: Counter[str] = Counter()
    module = ""
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        if len(scopes) > 1:  # nodes of a rewrite have none, and take that of the node before
            module = modules(scopes[-2])
        name = f"{module}/{node.op_type}" if module else node.op_type
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
