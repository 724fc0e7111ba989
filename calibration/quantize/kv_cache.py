"""Store keys and values in int8, with one fixed scale per buffer.

New rows are quantized before they are written, so that a row does not depend on how many tokens one call has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from bridge_stg.calibration.quantize.graph import HALF_SCALES_SINCE
from bridge_stg.calibration.quantize.ranges import TensorRange
from bridge_stg.export.graph.graph_edit import Edit
from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec
from bridge_stg.runtime.errors import BridgeError


def quantize_cache(model: ir.Model, spec: GraphSpec, ranges: Mapping[str, TensorRange]) -> GraphSpec:
    """Quantize the cache of one variant in place, and return its spec with int8 buffers."""
    cache, graph = spec.cache, model.graph
    assert cache is not None
    edit = Edit(graph)
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): index for index, value in enumerate(graph.outputs)}
    for past, written in zip(cache.past_names, cache.written_names, strict=True):
        if past not in ranges:
            what = f"{past} of {spec} has no range; collect statistics with the same bundle first."
            raise BridgeError("calibration.missing_range", what)
        scale, old, index = float(ranges[past].scale), inputs[past], outputs[written]
        new, dtype = graph.outputs[index], old.dtype
        assert dtype is not None
        if cache.update == "in_place":
            _in_place(edit, new, scale, dtype)
        else:
            _as_floats(edit, list(old.uses()), old, old, scale)
            _append(edit, new, index, scale, dtype)
        old.dtype = ir.DataType.INT8
    if cache.dtype == "float16":
        graph.opset_imports[""] = max(graph.opset_imports[""], HALF_SCALES_SINCE)
    names = {*cache.past_names, *cache.written_names}
    return dataclasses.replace(
        spec,
        inputs=_as_int8(spec.inputs, names),
        outputs=_as_int8(spec.outputs, names),
        cache=dataclasses.replace(cache, dtype="int8"),
    )


def _in_place(edit: Edit, present: ir.Value, scale: float, dtype: ir.DataType) -> None:
    """Insert Q and DQ: past int8, rows → Q → TensorScatter → present int8 → DQ → attention."""
    scatter = present.producer()
    assert scatter is not None
    rows = scatter.inputs[1]
    assert rows is not None
    readers = list(present.uses())
    scatter.replace_input_with(1, edit.quantize(rows, scale, dtype))
    present.dtype = ir.DataType.INT8
    _as_floats(edit, readers, present, rows, scale)


def _append(edit: Edit, rows: ir.Value, index: int, scale: float, dtype: ir.DataType) -> None:
    """Insert Q and DQ: rows → Q → new int8 → DQ → attention."""
    name, shape, readers = rows.name, rows.shape, list(rows.uses())
    rows.name = edit.free_name(f"{name}_rows")
    integers = edit.quantize(rows, scale, dtype)
    integers.name, integers.shape = name, shape
    edit.graph.outputs[index] = integers
    _as_floats(edit, readers, integers, rows, scale)


def _as_floats(edit: Edit, readers: list[ir.Usage], integers: ir.Value, source: ir.Value, scale: float) -> None:
    """Dequantize for each reader; after its Transpose, if it has one: onnxruntime fails on the other order."""
    dtype = source.dtype
    assert dtype is not None
    floats: ir.Value | None = None
    for node, index in readers:
        if node.op_type == "Transpose":
            out = node.outputs[0]
            after = list(out.uses())
            node.replace_input_with(index, integers)
            out.dtype = ir.DataType.INT8
            transposed = edit.dequantize(out, source, scale, dtype)
            for reader, place in after:
                reader.replace_input_with(place, transposed)
            continue
        if floats is None:
            floats = edit.dequantize(integers, source, scale, dtype)
        node.replace_input_with(index, floats)


def _as_int8(tensors: tuple[TensorSpec, ...], names: set[str]) -> tuple[TensorSpec, ...]:
    return tuple(dataclasses.replace(t, dtype="int8") if t.name in names else t for t in tensors)
