"""Patch embedding as one matmul over bytes in the order of the patches.

The traced form converts a frame to floats, normalizes it by two operations that broadcast over 3 channels, moves the
channels first, and permutes the features of a convolution. Here the bytes are permuted, a quarter of the memory, into
rows of one patch each, which are multiplied by the kernel; scale and shift are folded into kernel and bias. onnxruntime
computes both from the bundle's weights when it opens the graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import Edit, integers_of, only_reader, producer

CHANNELS_FIRST, MERGE_ORDER = [0, 4, 1, 2, 3], [0, 2, 4, 3, 5, 1]
_COLORS = 3


def embed_patches_by_matmul(model: ir.Model) -> bool:
    """Change a float vision encoder in place; return False if the graph has no such patch embedding."""
    conv = next((node for node in model.graph if node.op_type == "Conv"), None)
    normalized = _normalization(conv)
    embedded, merge = _embedded_patches(conv)
    weight = conv.inputs[1] if conv is not None else None
    if conv is None or normalized is None or embedded is None or weight is None or weight.shape is None:
        return False
    frames, scale, shift = normalized
    channels, planes, side, columns = (int(size) for size in weight.shape)
    if weight.dtype != ir.DataType.FLOAT or side != columns:
        return False
    period, size = planes // _COLORS, planes * side * side
    edit = Edit(model.graph)

    def then(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        name = f"{str(conv.name).rpartition('/')[0]}/{operator}_patches"
        return edit.insert(operator, inputs, attributes, before=conv, name=name)[0]

    def sizes(*values: int) -> ir.Value:
        return edit.constant("patch_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    # Kernel [C, 3·P, side, side] → [P, side, side, 3, C], the order of the bytes in a row.
    kernel = then(
        "Transpose", then("Reshape", weight, sizes(channels, _COLORS, period, side, side)), perm=[2, 3, 4, 1, 0]
    )
    column = sizes(_COLORS, 1)
    scaled = then("Reshape", then("Mul", kernel, then("Reshape", scale, column)), sizes(size, channels))
    bias = then("ReduceSum", then("Mul", kernel, then("Reshape", shift, column)), sizes(0, 1, 2, 3), keepdims=0)
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        bias = then("Add", bias, conv.inputs[2])
    # Frames [G, P, height, width, 3] → [G, height/m, width/m, m, m, P, side, side·3], with m patches per token's side.
    groups = then("Shape", frames, start=0, end=1)
    height, width = (then("Shape", frames, start=axis, end=axis + 1) for axis in (2, 3))
    rows, across = (then("Div", length, sizes(merge * side)) for length in (height, width))
    split = then(
        "Concat", groups, sizes(period), rows, sizes(merge, side), across, sizes(merge, side * _COLORS), axis=0
    )
    patches = then("Transpose", then("Reshape", frames, split), perm=[0, 2, 5, 3, 6, 1, 4, 7])
    patches = then("Reshape", patches, then("Concat", groups, sizes(-1, size), axis=0))
    data = then("Cast", patches, to=int(ir.DataType.FLOAT))
    edit.replace(embedded, then("Add", then("MatMul", data, scaled), bias))
    edit.drop_unused()
    return True


def _normalization(conv: ir.Node | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return the frames that a convolution reads after they are normalized, and scale and shift [3]."""
    reshape = producer(conv.inputs[0], "Reshape") if conv is not None else None
    transpose = producer(reshape.inputs[0], "Transpose", CHANNELS_FIRST) if reshape is not None else None
    add = producer(transpose.inputs[0], "Add") if transpose is not None else None
    multiply = producer(add.inputs[0], "Mul") if add is not None else None
    cast = producer(multiply.inputs[0], "Cast") if multiply is not None else None
    if add is None or multiply is None or cast is None:
        return None
    frames, scale, shift = cast.inputs[0], multiply.inputs[1], add.inputs[1]
    if frames is None or scale is None or shift is None:
        return None
    return frames, scale, shift


def _embedded_patches(conv: ir.Node | None) -> tuple[ir.Value | None, int]:
    """Return the features [G, N, C] of a convolution in merge order, and the merged patches per side."""
    split = only_reader(conv.outputs[0], "Reshape") if conv is not None else None
    transpose = only_reader(split.outputs[0], "Transpose") if split is not None else None
    joined = only_reader(transpose.outputs[0], "Reshape") if transpose is not None else None
    shape = producer(split.inputs[1], "Concat") if split is not None else None
    merge = integers_of(shape.inputs[-1]) if shape is not None else None
    if joined is None or merge is None or producer(joined.inputs[0], "Transpose", MERGE_ORDER) is None:
        return None, 0
    return joined.outputs[0], merge[0]
