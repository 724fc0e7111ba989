"""Small graphs in the forms that the quantizer writes, and what engines make of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 128, 96, 32
FLOATS = {"fp32": ("float", np.float32), "fp16": ("float16", np.float16)}


def matmul_form(recipe: str, dtype: str, *, opset: int = 24) -> onnx.ModelProto:
    """Return x [L, K] times a weight: w8a8 and w8 with a scale a channel, w4 with a scale a block."""
    name, float_type = FLOATS[dtype]
    rng = np.random.default_rng(0)
    activation = "quantized = QuantizeLinear(x, s, z)\n a = DequantizeLinear(quantized, s, z)"
    if recipe == "w4":
        weight = "b = DequantizeLinear<axis = 0, block_size = 32>(w, scales)"
        values = rng.integers(-7, 8, (K, N)).ravel().tolist()
        constants = [helper.make_tensor("w", TensorProto.INT4, (K, N), values)]
        scales = np.full((K // BLOCK, N), 0.01, float_type)
    else:
        weight = "rows = DequantizeLinear<axis = 0>(w, scales)\n b = Transpose<perm = [1, 0]>(rows)"
        constants = [numpy_helper.from_array(rng.integers(-127, 128, (N, K), np.int8), "w")]
        scales = np.full(N, 0.001, float_type)
    left = "a" if recipe == "w8a8" else "x"
    model = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["" : {opset}]>
        g ({name}[L, {K}] x) => ({name}[L, {N}] y) <int8 z = {{0}}> {{
            {activation if recipe == "w8a8" else ""}
            {weight}
            y = MatMul({left}, b)
        }}"""
    )
    return _with(model, *constants, scales=scales, s=np.array(0.02, float_type))


def cache_form(variant: str, dtype: str) -> onnx.ModelProto:
    """Return attention over an int8 cache that is updated in place (standard), or appended to (primitive)."""
    name, float_type = FLOATS[dtype]
    if variant == "standard":
        text = f"""g ({name}[B, 2, L, 16] q, {name}[B, 2, L, 16] k, int8[B, 2, S, 16] past, int64[B] at,
            bool[B, 1, L, S] mask) => ({name}[B, 2, L, 16] y, int8[B, 2, S, 16] present) <int8 z = {{0}}> {{
            new = QuantizeLinear(k, s, z)
            present = TensorScatter<axis = 2>(past, new, at)
            keys = DequantizeLinear(present, s, z)
            y = Attention(q, keys, keys, mask)
        }}"""
    else:
        text = f"""g ({name}[B, 2, L, 16] q, {name}[B, 2, L, 16] k, int8[B, 2, S, 16] past)
            => ({name}[B, 2, L, 16] y, int8[B, 2, L, 16] new) <int8 z = {{0}}> {{
            new = QuantizeLinear(k, s, z)
            turned = Transpose<perm = [0, 1, 3, 2]>(past)
            columns = DequantizeLinear(turned, s, z)
            keys = DequantizeLinear(past, s, z)
            scores = MatMul(q, columns)
            shares = Softmax<axis = -1>(scores)
            y = MatMul(shares, keys)
        }}"""
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}')
    return _with(model, s=np.array(0.05, float_type))


def form(recipe: str, variant: str, dtype: str) -> onnx.ModelProto:
    """Return the form of a line of the table."""
    if recipe == "kv8":
        return cache_form(variant, dtype)
    return matmul_form(recipe, dtype, opset=21 if variant == "primitive" else 24)


def optimized(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Return the operators of a graph as onnxruntime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def plan_tensors(plan: bytes) -> dict[str, tuple[list[str], str]]:
    """Return the tensors that a compiled plan of TensorRT-RTX describes: name → dims and type."""
    found = re.findall(rb'tensor=\{[^\n]*?dims=\{([^}]*)\}[^\n]*?name="([^"]+)"[^\n]*?type=(\w+) \}', plan)
    return {name.decode(): (dims.decode().split(), kind.decode()) for dims, name, kind in found}


def fused_inputs(plan: bytes) -> list[list[str]]:
    """Return the inputs of each kernel into which a compiled plan fuses a matmul."""
    found = re.findall(rb"runtime_fusion=\{ name=\w*Fc\w* input_args=\{([^}]*)\}", plan)
    return [[name.strip('"') for name in text.decode().split()] for text in found]


def _with(model: onnx.ModelProto, *constants: TensorProto, **arrays: np.ndarray) -> onnx.ModelProto:
    model.graph.initializer.extend(constants)
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used
    )
    kept = [value for value in model.graph.initializer if value.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.checker.check_model(model)
    return model
