"""Give the matmuls of the language model weights in the layouts that onnxruntime on CPU multiplies fastest.

- Few tokens: MatMulNBits, 4 or 8 bits with a scale per block. It reads weights at the speed of memory, which its int8
  matmuls do not, and rounds activations to int8 per block.
- Many tokens: int8 per channel by MatMulIntegerToFloat, three times as fast as MatMulNBits. int4 weights are rounded
  once more for it; activations get a scale per token in each call, as in MatMulNBits.

The weights of each form are in a data file of their own. The head always multiplies few rows; with int4 weights its own
are rounded to int4 too, and `standard` keeps them in int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.blocks import HEAD, INT4, INT8, Matmul, find_matmuls, stored_weight
from bridge_stg.export.graph.graph_edit import Edit, producer
from bridge_stg.export.graph.weight_file import WeightFile

DOMAIN = "com.microsoft"
BLOCKS = (128, 64, 32, 16)
"""Block sizes for int8 weights, fastest first; the integers and their scale per channel are the same in each."""

ROWS = 8192
"""Rows of a weight that are converted at a time."""

RoundInt4 = Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Rounds the weight float32 [K, N] of a node to levels int8 [K, N] in −8 … 7, with scales [K / block, N]."""

_INT8_LEVELS = 127
_LEAST_ROW = 1e-20


def to_decode_form(
    model: ir.Model, graph: str, weights: WeightFile, *, only: str | None = None, round_head: RoundInt4 | None = None
) -> bool:
    """Let MatMulNBits multiply int8 and int4 weights, in place, or those of the block `only`; return if there are any.

    The graph is one of `ort_cpu.for_ort_cpu`. Matmuls in fp16 are left as they are. `round_head` makes the head int4.
    """
    edit, changed = Edit(model.graph), False
    for matmul, node, data, *weight in _weights(edit, find_matmuls(model, graph), INT8, INT4, only=only):
        (levels, scales), bits = weight, 4 if matmul.form == INT4 else 8
        if round_head is not None and matmul.block == HEAD and matmul.k % BLOCKS[-1] == 0:
            (levels, scales), bits = _rounded(levels, scales, partial(round_head, matmul.node)), 4
        block = matmul.k // scales.shape[1] if bits == 4 else next((b for b in BLOCKS if matmul.k % b == 0), 0)
        if not block:
            continue
        scales = np.broadcast_to(scales, (matmul.n, matmul.k // block))
        shape = matmul.n, matmul.k // block, block * bits // 8
        stem = f"{matmul.weight}_blocks"
        packed = weights.write(stem, ir.DataType.UINT8, shape, _packed(levels, bits))
        spread = weights.write(f"{stem}_scale", ir.DataType.FLOAT, scales.shape, [scales.tobytes()])
        inputs = [data, edit.initializer(stem, packed), edit.initializer(f"{stem}_scale", spread)]
        if len(node.inputs) > 6:
            inputs += [None, None, node.inputs[6]]
        attributes = {"K": matmul.k, "N": matmul.n, "bits": bits, "block_size": block, "accuracy_level": 4}
        (out,) = edit.insert("MatMulNBits", inputs, attributes, before=node, name=f"{matmul.node}NBits", domain=DOMAIN)
        edit.replace(node.outputs[0], out)
        edit.graph.remove(node, safe=True)
        changed = True
    if changed:
        edit.drop_unused()
        model.graph.opset_imports[DOMAIN] = 1
    return changed


def to_prefill_form(model: ir.Model, graph: str, weights: WeightFile) -> bool:
    """Multiply int4 weights in int8, in place, with activations rounded to int8 per token; return if there are any."""
    edit, rounded = Edit(model.graph), dict[ir.Value, tuple[ir.Value, ir.Value]]()
    step, middle = _rounding(edit)
    for matmul, node, data, levels, scales in _weights(edit, find_matmuls(model, graph), INT4):
        wide = levels * np.repeat(scales, matmul.k // scales.shape[1], axis=1)
        channels = np.maximum(np.abs(wide).max(1) / _INT8_LEVELS, np.finfo(np.float32).tiny)
        integers = np.ascontiguousarray(np.rint(wide / channels[:, None]).astype(np.int8).T)
        stem = f"{matmul.weight}_int8"
        stored = weights.write(stem, ir.DataType.INT8, integers.shape, [integers.tobytes()])
        channel_scale = weights.write(f"{stem}_scale", ir.DataType.FLOAT, channels.shape, [channels.tobytes()])
        if data not in rounded:
            rounded[data] = _round_rows(edit, node, data)
        rows, largest = rounded[data]
        inputs = [rows, edit.initializer(stem, stored), step, edit.initializer(f"{stem}_scale", channel_scale), middle]
        (out,) = edit.insert(
            "MatMulIntegerToFloat", inputs, before=node, name=f"{matmul.node}IntegerToFloat", domain=DOMAIN
        )
        (out,) = edit.insert("Mul", [out, largest], before=node, name=f"{matmul.node.rpartition('/')[0]}/Mul_rows")
        edit.replace(node.outputs[0], out)
        edit.graph.remove(node, safe=True)
    if rounded:
        edit.drop_unused()
        model.graph.opset_imports[DOMAIN] = 1
    return bool(rounded)


def _weights(
    edit: Edit, matmuls: Iterable[Matmul], *forms: str, only: str | None = None
) -> Iterator[tuple[Matmul, ir.Node, ir.Value, np.ndarray, np.ndarray]]:
    """Yield the matmuls in fp32 whose weights have one of the forms, those of the block `only` unless it is None.

    With each come its node, its float activation, and the levels [N, K] and scales of its weight.
    """
    for matmul in matmuls:
        node = edit.nodes[matmul.node]
        data, scale = _operands(node)
        if data is not None and scale is not None and matmul.form in forms and only in (None, matmul.block):
            yield matmul, node, data, _levels(edit, node, matmul), _scales(scale)


def _operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the float activation of a matmul, and the scales of its weight; None: it has none, or none in fp32."""
    data, source = node.inputs[0], node.inputs[1]
    if node.op_type == "MatMulIntegerToFloat":
        quantize, scale = producer(data, "QuantizeLinear"), node.inputs[3]
        data = None if quantize is None else quantize.inputs[0]
    else:
        turn = producer(source, "Transpose")
        dequantize = producer(source if turn is None else turn.inputs[0], "DequantizeLinear")
        scale = None if dequantize is None else dequantize.inputs[1]
    return data, scale if scale is not None and scale.dtype == ir.DataType.FLOAT else None


def _levels(edit: Edit, node: ir.Node, matmul: Matmul) -> np.ndarray:
    """Return the int8 levels [N, K] of a weight."""
    source, tensor = node.inputs[1], edit.graph.initializers[matmul.weight].const_value
    assert source is not None and tensor is not None
    levels: np.ndarray = tensor.numpy().astype(np.int8)
    return levels if stored_weight(source)[2] else levels.T


def _scales(scale: ir.Value) -> np.ndarray:
    """Return the scales of a weight, [N, 1] or [N, K / block]."""
    assert scale.const_value is not None
    values = np.asarray(scale.const_value.numpy(), np.float32)
    return values.reshape(-1, 1) if values.ndim == 1 else values.T


def _rounded(
    levels: np.ndarray, scales: np.ndarray, rounding: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Round an int8 weight with scales [N, 1] to int4; return levels [N, K] and scales [N, K / block]."""
    starts = range(0, len(levels), ROWS)
    parts = [rounding((levels[i : i + ROWS] * scales[i : i + ROWS]).T) for i in starts]
    four, found = zip(*((rows.T, factors.T) for rows, factors in parts), strict=True)
    return np.concatenate(four), np.ascontiguousarray(np.concatenate(found))


def _packed(levels: np.ndarray, bits: int) -> Iterator[bytes]:
    """Yield levels [N, K] as MatMulNBits reads them: unsigned, in 4 bits the first of two in the low half."""
    for first in range(0, len(levels), ROWS):
        part = levels[first : first + ROWS]
        if bits == 4:
            unsigned = (part + 8).astype(np.uint8)
            yield (unsigned[:, 0::2] | unsigned[:, 1::2] << 4).tobytes()
        else:
            yield (np.ascontiguousarray(part).view(np.uint8) ^ 128).tobytes()


def _round_rows(edit: Edit, before: ir.Node, data: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Insert nodes that round an activation [.., K] to uint8 per row; return it, and the largest size in each row."""

    def then(operator: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        name = f"{data.name}/rows/{operator}"
        (out,) = edit.insert(operator, inputs, attributes, before=before, name=name)
        return out

    axis, least = np.array([-1], np.int64), np.array(_LEAST_ROW, np.float32)
    largest = then("ReduceMax", [then("Abs", [data]), edit.constant("last_axis", axis)], keepdims=1)
    largest = then("Max", [largest, edit.constant("least_row", least)])
    step, middle = _rounding(edit)
    rows = then("QuantizeLinear", [then("Div", [data, largest]), step, middle])
    rows.dtype = ir.DataType.UINT8
    return rows, largest


def _rounding(edit: Edit) -> tuple[ir.Value, ir.Value]:
    """Return the scale and zero point of activations between −1 and 1 in uint8."""
    step = edit.constant("int8_step", np.array(1 / _INT8_LEVELS, np.float32))
    return step, edit.constant("uint8_middle", np.array(128, np.uint8))
