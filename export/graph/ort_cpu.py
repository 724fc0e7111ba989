"""Derive the variant `ort-cpu`: the same function in the form that onnxruntime on CPU runs fastest.

- W8A8 matmuls become its operator MatMulIntegerToFloat, bias included. Its own fusion needs an int8 input with one
  reader, so it leaves out q, k and v, gate and up, matmuls of two dims and the mergers.
- Activations become uint8 with zero point 128, the same numbers: its fast x64 kernels multiply uint8 by int8.
- Rows of an int8 table are looked up first and converted to float afterwards; otherwise the whole table is dequantized
  in every call. TensorRT takes int8 constants only as input of DequantizeLinear, so it cannot run that form.
- Nvfp4, for which onnxruntime has no operator, is computed by standard ones with the same numbers.
- Float graphs too get fused attention (`fuse_attention`), folded key projections in the spatial decoder
  (`fold_key_projection`), optional visual tokens in the vision encoder (`optional_tokens`), a patch embedding that is
  one matmul (`patch_embedding`), and a last decoder layer that computes the requested positions alone
  (`requested_rows`). A prefill requests none, so K may be 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.blocks import HEAD, INT8, find_matmuls, find_tables, stored_weight
from bridge_stg.export.graph.decode_form import DOMAIN, RoundInt4, to_decode_form, to_prefill_form
from bridge_stg.export.graph.fold_key_projection import fold_key_projection
from bridge_stg.export.graph.fuse_attention import fuse_attention, group_heads
from bridge_stg.export.graph.graph_edit import NVFP4_BLOCK, TENSORRT_DOMAIN, Edit, producer, rank
from bridge_stg.export.graph.optional_tokens import make_tokens_optional
from bridge_stg.export.graph.patch_embedding import embed_patches_by_matmul
from bridge_stg.export.graph.requested_rows import compute_requested_rows
from bridge_stg.export.graph.weight_file import WeightFile
from bridge_stg.runtime.bundle.contracts import DECODE
from bridge_stg.runtime.bundle.manifest import GraphSpec

VARIANT, DERIVED_FROM = "ort-cpu", "standard"
DECODE_WEIGHTS, PREFILL_WEIGHTS = "decode.data", "prefill.data"
DECODE_LEAST = 64 * 2**20
"""Bytes of weights above which decoding is bound by memory; smaller ones fit a CPU's caches."""

_FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_LAST_AXIS = np.array([-1], np.int64)
_MIDDLE = np.array(128, np.uint8)


def derive_ort_cpu(
    written: Iterable[GraphSpec], folder: Path, *, decode: bool | None = False, round_head: RoundInt4 | None = None
) -> list[GraphSpec]:
    """Derive the variants of one graph from `standard.onnx` in its folder.

    Args:
        written: contracts of the variants in the folder.
        folder: folder of the graph's files.
        decode: whether to write the weights of a language model in the layouts of `decode_form` too; None: if those of
            `standard` exceed `DECODE_LEAST`.
        round_head: makes the head of these layouts int4.

    Returns:
        The contracts of the new variants, `ort-cpu` and, with these layouts, `ort-cpu-decode`; an empty list if no pass
        changes the graph.
    """
    spec = next((spec for spec in written if spec.variant == DERIVED_FROM), None)
    if spec is None or not for_ort_cpu(model := ir.load(folder / f"{DERIVED_FROM}.onnx"), spec.name):
        return []
    variants = [VARIANT]
    if decode is None:
        decode = sum(file.stat().st_size for file in folder.glob("*.data")) > DECODE_LEAST
    if decode and spec.cache is not None:
        variants += [DECODE] * _add_layouts(model, spec.name, folder, round_head)
    ir.save(model, folder / f"{VARIANT}.onnx")
    ranges = {symbol: (0 if symbol == "K" else least, most) for symbol, (least, most) in spec.ranges.items()}
    made = dataclasses.replace(spec, variant=VARIANT, derived_from=DERIVED_FROM, ranges=ranges)
    return [dataclasses.replace(made, variant=variant) for variant in variants]


def _add_layouts(model: ir.Model, graph: str, folder: Path, round_head: RoundInt4 | None) -> bool:
    """Give a graph of `for_ort_cpu` the layouts of many tokens in place, and write `ort-cpu-decode` beside it.

    Returns False if no weight has another layout for few tokens; then there is no such variant.
    """
    file = folder / f"{DECODE}.onnx"
    with WeightFile(folder / DECODE_WEIGHTS) as weights:
        to_decode_form(model, graph, weights, only=HEAD, round_head=round_head)
        ir.save(model, file)
        few = ir.load(file)
        changed = to_decode_form(few, graph, weights)
    with WeightFile(folder / PREFILL_WEIGHTS) as weights:
        to_prefill_form(model, graph, weights)
    for name in (DECODE_WEIGHTS, PREFILL_WEIGHTS):
        if not (folder / name).stat().st_size:
            (folder / name).unlink()
    if changed:
        group_heads(few)
        ir.save(few, file)
    else:
        file.unlink()
    return changed


def for_ort_cpu(model: ir.Model, graph: str) -> bool:
    """Apply all passes to a graph in place; return whether one changed it."""
    changed = [fold_key_projection(model), make_tokens_optional(model), fuse_attention(model)]
    changed.append(compute_requested_rows(model))
    edit = Edit(model.graph)
    fused = [_fuse(edit, edit.nodes[m.node]) for m in find_matmuls(model, graph) if m.form == INT8]
    tables = [table for table in find_tables(model, graph) if table.form == INT8]
    for table in tables:
        _look_up_integers(edit, edit.nodes[table.node])
    emulated = _emulate_nvfp4(edit)
    edit.drop_unused()
    changed.append(embed_patches_by_matmul(model))
    if any(fused):
        model.graph.opset_imports[DOMAIN] = 1
    return any(changed) or any(fused) or bool(tables) or emulated


def _emulate_nvfp4(edit: Edit) -> bool:
    """Replace TensorRT's quantizers and all nvfp4 constants by standard operators; return whether there were any."""
    quantizers = [node for node in edit.graph if node.domain == TENSORRT_DOMAIN]
    for node in quantizers:
        levels, scales = node.outputs
        (to_floats,) = (reader for reader, index in levels.uses() if index == 0)
        (to_scales,) = (reader for reader, _ in scales.uses())
        value = node.inputs[0]
        assert value is not None and value.dtype is not None
        rebuilt = _nvfp4_floats(edit, value, to_scales, to_floats)
        to_floats.outputs[0].replace_all_uses_with(rebuilt)
    for value in list(edit.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT4E2M1:
            (to_floats,) = (reader for reader, _ in value.uses())
            to_floats.outputs[0].replace_all_uses_with(_unpacked(edit, value, to_floats))
    if quantizers:
        edit.drop_unused()
        edit.graph.opset_imports.pop(TENSORRT_DOMAIN, None)
    return bool(quantizers)


def _nvfp4_floats(edit: Edit, value: ir.Value, to_scales: ir.Node, to_floats: ir.Node) -> ir.Value:
    """Insert operators that round a value [.., K] to nvfp4 in blocks along K, and return the floats."""
    shared, dtype, stem = to_scales.inputs[1], value.dtype, f"{value.name}/nvfp4"
    assert shared is not None and shared.const_value is not None and dtype is not None

    def then(operator: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        (out,) = edit.insert(operator, inputs, attributes, before=to_floats, name=f"{stem}/{operator}")
        return out

    def number(name: str, array: object) -> ir.Value:
        return edit.constant(f"nvfp4_{name}", np.array(array, np.float32))

    wide = then("Cast", [value], to=int(ir.DataType.FLOAT))
    global_scale = then("Cast", [shared], to=int(ir.DataType.FLOAT))
    shape = edit.constant("nvfp4_blocks", np.array([-1, NVFP4_BLOCK], np.int64))
    blocks = then("Reshape", [wide, shape])
    largest = then("ReduceMax", [then("Abs", [blocks]), edit.constant("nvfp4_axis", _LAST_AXIS)], keepdims=1)
    ratio = then("Div", [largest, then("Mul", [global_scale, number("six", 6)])])
    eight = then("Cast", [then("Max", [ratio, number("least", 2.0**-9)])], to=int(ir.DataType.FLOAT8E4M3FN))
    scales = then("Mul", [then("Cast", [eight], to=int(ir.DataType.FLOAT)), global_scale])
    levels = then("Div", [blocks, scales])
    size = then("Abs", [levels])
    # E2M1 has steps of 0.5 below 2, of 1 below 4, and of 2 up to 6; ties are even in each.
    upper = then("Where", [then("Less", [size, number("four", 4)]), number("one", 1), number("two", 2)])
    step = then("Where", [then("Less", [size, number("two", 2)]), number("half", 0.5), upper])
    rounded = then("Mul", [then("Round", [then("Div", [levels, step])]), step])
    rounded = then("Min", [then("Max", [rounded, number("minus_six", -6)]), number("six", 6)])
    floats = then("Reshape", [then("Mul", [rounded, scales]), then("Shape", [value])], allowzero=1)
    floats = then("Cast", [floats], to=int(dtype))
    floats.dtype, floats.shape = dtype, value.shape
    return floats


def _unpacked(edit: Edit, value: ir.Value, to_floats: ir.Node) -> ir.Value:
    """Return the floats [N, K] of nvfp4 values, from their bytes read as uint8; engines compute them at load time."""
    tensor, scales, stem = value.const_value, to_floats.inputs[1], f"{value.name}/unpacked"
    assert isinstance(tensor, ir.ExternalTensor) and scales is not None and scales.dtype is not None
    n, k = (int(size) for size in tensor.shape)
    place = tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8
    name = f"{value.name}_bytes"
    stored = ir.ExternalTensor(*place, shape=ir.Shape([n, k // 2]), name=name, base_dir=tensor.base_dir)

    def then(operator: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        (out,) = edit.insert(operator, inputs, attributes, before=to_floats, name=f"{stem}/{operator}")
        return out

    both = edit.initializer(name, stored)
    low = then("BitwiseAnd", [both, edit.constant("nvfp4_low", np.array(15, np.uint8))])
    high = then("BitShift", [both, edit.constant("nvfp4_shift", np.array(4, np.uint8))], direction="RIGHT")
    last = edit.constant("nvfp4_axis", _LAST_AXIS)
    pairs = then("Concat", [then("Unsqueeze", [low, last]), then("Unsqueeze", [high, last])], axis=-1)
    shape = edit.constant(f"nvfp4_shape_{k}", np.array([-1, k // NVFP4_BLOCK, NVFP4_BLOCK], np.int64))
    codes = then("Reshape", [then("Cast", [pairs], to=int(ir.DataType.INT32)), shape])
    values = np.concatenate([_FP4_VALUES, -_FP4_VALUES]).astype(scales.dtype.numpy())
    table = edit.constant(f"nvfp4_values_{scales.dtype.name}", values)
    blocks = then("Mul", [then("Gather", [table, codes]), then("Unsqueeze", [scales, last])])
    floats = then("Reshape", [blocks, edit.constant(f"nvfp4_rows_{k}", np.array([-1, k], np.int64))])
    floats.dtype, floats.shape = scales.dtype, ir.Shape([n, k])
    return floats


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
