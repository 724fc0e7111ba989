"""Derive the variant `ort-cpu`: the same function in the form that onnxruntime on CPU runs fastest.

- W8A8 matmuls become its operator MatMulIntegerToFloat, bias included. Its own fusion needs an int8 input with one
  reader, so it leaves out q, k and v, gate and up, matmuls of two dims and the mergers.
- Activations become uint8 with zero point 128, the same numbers: its fast x64 kernels multiply uint8 by int8.
- Rows of an int8 table are looked up first and converted to float afterwards; otherwise the whole table is dequantized
  in every call. TensorRT takes int8 constants only as input of DequantizeLinear, so it cannot run that form.
- Float graphs too get fused attention (`fuse_attention`), folded key projections in the spatial decoder
  (`fold_key_projection`) and optional visual tokens in the vision encoder (`optional_tokens`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.blocks import INT8, find_matmuls, find_tables, stored_weight
from bridge_stg.export.graph.fold_key_projection import fold_key_projection
from bridge_stg.export.graph.fuse_attention import fuse_attention
from bridge_stg.export.graph.graph_edit import Edit, producer, rank
from bridge_stg.export.graph.optional_tokens import make_tokens_optional
from bridge_stg.runtime.bundle.manifest import GraphSpec

VARIANT, DERIVED_FROM = "ort-cpu", "standard"
DOMAIN = "com.microsoft"

_LAST_AXIS = np.array([-1], np.int64)
_MIDDLE = np.array(128, np.uint8)


def derive_ort_cpu(written: Iterable[GraphSpec], folder: Path) -> list[GraphSpec]:
    """Derive the variant of one graph from `standard.onnx` in its folder, with the same weights.

    Returns the contract of the new variant, or an empty list if no pass changes the graph.
    """
    spec = next((spec for spec in written if spec.variant == DERIVED_FROM), None)
    if spec is None or not for_ort_cpu(model := ir.load(folder / f"{DERIVED_FROM}.onnx"), spec.name):
        return []
    ir.save(model, folder / f"{VARIANT}.onnx")
    return [dataclasses.replace(spec, variant=VARIANT, derived_from=DERIVED_FROM)]


def for_ort_cpu(model: ir.Model, graph: str) -> bool:
    """Apply all passes to a graph in place; return whether one changed it."""
    changed = [fold_key_projection(model), make_tokens_optional(model), fuse_attention(model)]
    edit = Edit(model.graph)
    fused = [_fuse(edit, edit.nodes[m.node]) for m in find_matmuls(model, graph) if m.form == INT8]
    tables = [table for table in find_tables(model, graph) if table.form == INT8]
    for table in tables:
        _look_up_integers(edit, edit.nodes[table.node])
    edit.drop_unused()
    if any(fused):
        model.graph.opset_imports[DOMAIN] = 1
    return any(changed) or any(fused) or bool(tables)


def _fuse(edit: Edit, node: ir.Node) -> bool:
    """Replace Q → DQ → MatMul ← DQ, and the Add of a bias, by one operator; return False if it is not such a matmul."""
    data_floats, transpose = producer(node.inputs[0], "DequantizeLinear"), producer(node.inputs[1], "Transpose")
    weight_floats = producer(node.inputs[1] if transpose is None else transpose.inputs[0], "DequantizeLinear")
    if data_floats is None or weight_floats is None:
        return False
    if any(floats.outputs[0].dtype != ir.DataType.FLOAT for floats in (data_floats, weight_floats)):
        return False
    integers = weight_floats.inputs[0]
    assert integers is not None
    if transpose is not None:
        flipped = ir.node("Transpose", [integers], {"perm": [1, 0]}, name=f"{integers.name}/Transpose")
        edit.graph.insert_before(node, flipped)
        flipped.outputs[0].name, flipped.outputs[0].dtype = edit.free_name(f"{integers.name}_turned"), ir.DataType.INT8
        integers = flipped.outputs[0]
    data, zero = _shift_to_uint8(edit, data_floats)
    out, bias = node.outputs[0], None
    adds = [reader for reader, _ in out.uses()]
    if len(adds) == 1 and adds[0].op_type == "Add" and not out.is_graph_output():
        bias = next((v for v in adds[0].inputs if v is not None and v.is_initializer() and rank(v) == 1), None)
    last = adds[0] if bias is not None else node
    inputs = [data, integers, data_floats.inputs[1], weight_floats.inputs[1], zero, None, bias]
    fused = ir.node("MatMulIntegerToFloat", inputs if bias is not None else inputs[:5], name=node.name, domain=DOMAIN)
    edit.graph.insert_before(last, fused)
    edit.replace(last.outputs[0], fused.outputs[0])
    edit.graph.remove(last, safe=True)
    if last is not node:
        edit.graph.remove(node, safe=True)
    edit.nodes[str(node.name)] = fused
    return True


def _shift_to_uint8(edit: Edit, floats: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the input of a DequantizeLinear as uint8, and its zero point: −128 … 127 become 0 … 255."""
    data, zero = floats.inputs[0], floats.inputs[2]
    quantize = producer(data, "QuantizeLinear")
    if data is None or quantize is None:
        return data, zero
    middle, name = edit.constant("uint8_zero_point", _MIDDLE), f"{data.name}_shifted"
    if name not in edit.nodes:  # matmuls may share it
        node = ir.node("QuantizeLinear", [*quantize.inputs[:2], middle], name=name)
        edit.graph.insert_after(quantize, node)
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.UINT8, data.shape
        edit.nodes[name] = node
    return edit.nodes[name].outputs[0], middle


def _look_up_integers(edit: Edit, gather: ir.Node) -> None:
    """Replace a Gather of dequantized rows by Gather(int8) → Cast → Mul by each row's scale."""
    rows, ids = gather.inputs
    assert rows is not None and ids is not None
    dequantize, integers = rows.producer(), stored_weight(rows)[0]
    assert dequantize is not None and integers is not None
    shared = dequantize.inputs[1]
    assert shared is not None and shared.dtype is not None and shared.const_value is not None
    # The same bytes under another name: the head's matmul is fused only if nothing else reads its scales.
    scale = edit.alias(shared, f"{integers.name}_row_scale")
    out, stem, dtype = gather.outputs[0], str(gather.name), shared.dtype
    gather.replace_input_with(0, integers)
    readers, name = list(out.uses()), str(out.name)
    cast = ir.node("Cast", [out], {"to": dtype.value}, name=f"{stem}/Cast")
    scales = ir.node("Gather", [scale, ids], name=f"{stem}/Gather_scale")
    axis = edit.constant("last_axis", _LAST_AXIS)
    columns = ir.node("Unsqueeze", [scales.outputs[0], axis], name=f"{stem}/Unsqueeze")
    scaled = ir.node("Mul", [cast.outputs[0], columns.outputs[0]], name=f"{stem}/Mul")
    edit.graph.insert_after(gather, [cast, scales, columns, scaled])
    out.name, out.dtype = edit.free_name(f"{name}_int8"), ir.DataType.INT8
    for node, suffix in ((cast, "cast"), (scales, "scale"), (columns, "scales")):
        node.outputs[0].name, node.outputs[0].dtype = edit.free_name(f"{name}_{suffix}"), dtype
    scaled.outputs[0].name, scaled.outputs[0].dtype = name, dtype
    for reader, index in readers:
        reader.replace_input_with(index, scaled.outputs[0])
