"""Small graphs in the forms that the quantizer writes, and what engines make of them."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 128, 96, 32
FLOATS = {"fp32": ("float", np.float32), "fp16": ("float16", np.float16)}


def matmul_form(recipe: str, dtype: str, *, opset: int = 24) -> onnx.ModelProto:
    """Return x [L, K] times a weight: w8a8, w8 and fp8 with a scale a channel, w4 and nvfp4 with a scale a block.

    `nvfp4 alone`, `int8 blocks`, `mxfp8` and `int4 and fp8` are forms that no recipe has.
    """
    name, float_type = FLOATS[dtype]
    rng = np.random.default_rng(0)
    zero = "z8" if "fp8" in recipe else "z"
    activation = f"quantized = QuantizeLinear(x, s, {zero})\n a = DequantizeLinear(quantized, s, {zero})"
    if recipe.startswith("nvfp4"):
        blocked = "DequantizeLinear<axis = -1, block_size = 16>"
        weight = f"wide = DequantizeLinear(w8, g)\n rows = {blocked}(w, wide)\n b = Transpose<perm = [1, 0]>(rows)"
        activation = "q, q8 = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(x, g)\n"
        activation += f"xs = DequantizeLinear(q8, g)\n a = {blocked}(q, xs)"
        levels = rng.uniform(-6, 6, (N, K)).astype(ml_dtypes.float4_e2m1fn)
        constants = [_packed("w", TensorProto.FLOAT4E2M1, levels), _fp8("w8", rng.uniform(0.1, 1, (N, K // 16)))]
        scales = np.ones(N, float_type)
    elif recipe in ("fp8", "mxfp8"):
        fp8 = "DequantizeLinear<axis = 1>" if recipe == "fp8" else "DequantizeLinear<axis = 0, block_size = 32>"
        weight, constants = f"b = {fp8}(w, scales)", [_fp8("w", rng.uniform(-448, 448, (K, N)))]
        scales = np.full(N, 0.001, float_type)
        if recipe == "mxfp8":
            scales = np.full((K // BLOCK, N), 0.5, ml_dtypes.float8_e8m0fnu)
    elif recipe == "int8 blocks":
        weight = "b = DequantizeLinear<axis = 0, block_size = 32>(w, scales)"
        constants = [numpy_helper.from_array(rng.integers(-127, 128, (K, N), np.int8), "w")]
        scales = np.full((K // BLOCK, N), 0.001, float_type)
    elif recipe in ("w4", "int4 and fp8"):
        weight = "b = DequantizeLinear<axis = 0, block_size = 32>(w, scales)"
        values = rng.integers(-7, 8, (K, N)).ravel().tolist()
        constants = [helper.make_tensor("w", TensorProto.INT4, (K, N), values)]
        scales = np.full((K // BLOCK, N), 0.01, float_type)
    else:
        weight = "rows = DequantizeLinear<axis = 0>(w, scales)\n b = Transpose<perm = [1, 0]>(rows)"
        constants = [numpy_helper.from_array(rng.integers(-127, 128, (N, K), np.int8), "w")]
        scales = np.full(N, 0.001, float_type)
    both = recipe in ("w8a8", "fp8", "nvfp4", "int4 and fp8")
    left = "a" if both else "x"
    model = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["" : {opset}, "trt" : 1]>
        g ({name}[L, {K}] x) => ({name}[L, {N}] y) <int8 z = {{0}}> {{
            {activation if both else ""}
            {weight}
            y = MatMul({left}, b)
        }}"""
    )
    constants.append(_fp8("z8", np.zeros(())))
    return _with(model, *constants, scales=scales, s=np.array(0.02, float_type), g=np.array(0.001, float_type))


def cache_form(variant: str, dtype: str, stored: str = "int8") -> onnx.ModelProto:
    """Return attention over an int8 or fp8 cache that is updated in place (standard), or appended to (primitive)."""
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
    if stored == "fp8":
        text = text.replace("<int8 z = {0}> ", "").replace("int8", "float8e4m3fn").replace(", z)", ", z8)")
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}')
    return _with(model, _fp8("z8", np.zeros(())), s=np.array(0.05, float_type))


def form(recipe: str, variant: str, dtype: str) -> onnx.ModelProto:
    """Return the form of a line of the table."""
    if recipe in ("kv8", "fp8 cache"):
        return cache_form(variant, dtype, "fp8" if recipe == "fp8 cache" else "int8")
    return matmul_form(recipe, dtype, opset=(23 if recipe == "nvfp4" else 21) if variant == "primitive" else 24)


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
    """Return the inputs of each matmul of a compiled plan, and of each kernel into which one is fused."""
    found = re.findall(rb"runtime_fusion=\{ name=\w*Fc\w* input_args=\{([^}]*)\}", plan)
    found += re.findall(rb"\n *fully_connected=\{ [^\n]*? input=\{([^}]*)\}", plan)
    return [[name.strip('"').removesuffix('"^deref') for name in text.decode().split()] for text in found]


def _packed(name: str, kind: int, levels: np.ndarray) -> TensorProto:
    """Return an initializer of 4-bit values, two per byte."""
    nibbles = levels.view(np.uint8).ravel() & 0xF
    content = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    return helper.make_tensor(name, kind, levels.shape, content, raw=True)


def _fp8(name: str, values: np.ndarray) -> TensorProto:
    content = values.astype(ml_dtypes.float8_e4m3fn).tobytes()
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, values.shape, content, raw=True)


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
