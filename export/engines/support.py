"""The table of how each engine runs each recipe, with the evidence of every row; `calibrate` and `build` follow it.

Verdicts: `native`, the engine multiplies the quantized values (w8a8, fp8, nvfp4) or reads them inside the matmul (w8,
w4, kv8); `falls back`, it converts them to floats first, which saves memory but no time; `unsupported`, it does not
run. Imports no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bridge_stg.runtime.bundle.contracts import DECODE
from bridge_stg.runtime.errors import EngineError

BACKENDS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-10", "tensorrt-11", "tensorrt-rtx")
RECIPES = ("w8a8", "w8", "w4", "fp8", "nvfp4", "kv8")
ONE_FORM = ("standard", "primitive", "ort-cpu")
VARIANTS = (*ONE_FORM, DECODE)
DTYPES = ("fp32", "fp16")
NATIVE, FALLS_BACK, UNSUPPORTED = "native", "falls back", "unsupported"
ONNXRUNTIME_ONLY = ("ort-cpu", DECODE)
"""Variants with operators of onnxruntime on CPU; other targets never get them."""


@dataclass(frozen=True)
class Support:
    """One row of the table.

    Attributes:
        targets: engines that the row applies to.
        recipes: quantization recipes: `w8a8`, `w8`, `w4`, `fp8`, `nvfp4`, or `kv8` for the KV cache.
        verdict: `native`, `falls back` or `unsupported`.
        checked: `run` or `compiled` if a test of this repository reproduces it, `documentation` if it was not run here.
        evidence: observation and its source.
        variants: variants of the graphs.
        dtypes: float types of the graphs.
    """

    targets: tuple[str, ...]
    recipes: tuple[str, ...]
    verdict: str
    checked: str
    evidence: str
    variants: tuple[str, ...] = ("standard", "primitive")
    dtypes: tuple[str, ...] = DTYPES

    def applies_to(self, target: str, recipe: str, variant: str, dtype: str) -> bool:
        """Return whether the row applies to this combination."""
        return target in self.targets and recipe in self.recipes and variant in self.variants and dtype in self.dtypes


CPU, CUDA, TENSORRT, RTX = (
    ("onnxruntime-cpu",),
    ("onnxruntime-cuda",),
    ("tensorrt-10", "tensorrt-11"),
    ("tensorrt-rtx",),
)
NO_DECODE = "the variant is made only of int8 and int4 weights of fp32 graphs"
TABLE: tuple[Support, ...] = (
    Support(CPU, ("w8a8",), NATIVE, "run", "the variant has onnxruntime's MatMulIntegerToFloat for every matmul",
            ("ort-cpu",), ("fp32",)),
    Support(CPU, ("w8a8",), NATIVE, "run", "onnxruntime 1.32 fuses QuantizeLinear, DequantizeLinear and MatMul into "
            "MatMulIntegerToFloat, but only matmuls whose int8 input has no other reader; `ort-cpu`, which is "
            "preferred, has it everywhere", ("standard", "primitive"), ("fp32",)),
    Support(CPU, ("w8a8",), FALLS_BACK, "run", "with fp16 activations nothing is fused: weights are dequantized and "
            "multiplied as floats in every call", ONE_FORM, ("fp16",)),
    Support(CPU, ("w8", "w4"), NATIVE, "run", "onnxruntime 1.32 fuses DequantizeLinear and MatMul into MatMulNBits; "
            "fp16 activations are cast around it", ONE_FORM),
    Support(CPU, ("fp8",), FALLS_BACK, "run", "onnxruntime 1.32 rounds to fp8 and back, and multiplies floats",
            ONE_FORM),
    Support(CPU, ("nvfp4",), FALLS_BACK, "run", "the variant computes the numbers of nvfp4 with standard operators, "
            "and multiplies floats", ("ort-cpu",)),
    Support(CPU, ("nvfp4",), UNSUPPORTED, "run", "onnxruntime 1.32 has no operator for E2M1"),
    Support(CPU, ("kv8",), FALLS_BACK, "run", "the cache is int8 in memory, and attention dequantizes all of it in "
            "every call", ONE_FORM),
    Support(CPU, ("w8a8", "w8", "w4"), NATIVE, "run", "the variant, for calls of few tokens beside `ort-cpu`, has "
            "onnxruntime's MatMulNBits for every matmul, which rounds activations to int8 per block", (DECODE,),
            ("fp32",)),
    Support(CPU, ("kv8",), FALLS_BACK, "run", "as in `ort-cpu`", (DECODE,), ("fp32",)),
    Support(CPU, ("w8a8", "w8", "w4", "kv8"), UNSUPPORTED, "run", NO_DECODE, (DECODE,), ("fp16",)),
    Support(CPU, ("fp8", "nvfp4"), UNSUPPORTED, "run", NO_DECODE, (DECODE,)),
    Support(CUDA, ("w8a8",), FALLS_BACK, "documentation", "onnxruntime's source registers the fusion of Q/DQ around "
            "MatMul for its CPU and DirectML providers only (qdq_selector_action_transformer.cc)"),
    Support(CUDA, ("w8", "w4"), NATIVE, "documentation", "onnxruntime's source registers DequantizeLinear + MatMul → "
            "MatMulNBits for the CUDA provider too (qdq_selector_action_transformer.cc)"),
    Support(CUDA, ("fp8",), FALLS_BACK, "documentation", "onnxruntime's source has QuantizeLinear and DequantizeLinear "
            "of fp8 for the CUDA provider, and fuses them with no matmul"),
    Support(CUDA, ("nvfp4",), UNSUPPORTED, "documentation", "onnxruntime has no operator for E2M1"),
    Support(CUDA, ("kv8",), FALLS_BACK, "documentation", "as on CPU, attention follows a DequantizeLinear"),
    Support(TENSORRT, ("w8a8",), NATIVE, "documentation", "TensorRT's guide, explicit quantization: Q/DQ are fused "
            "into the matmul, int8 × int8; TensorRT-RTX, which has the same parser, takes the same graphs"),
    Support(TENSORRT, ("w8",), FALLS_BACK, "documentation", "TensorRT's guide, quantized types: weight-only "
            "quantization is supported for INT4; int8 weights without quantized activations are dequantized"),
    Support(TENSORRT, ("w4",), NATIVE, "documentation", "TensorRT's guide, quantized types: weight-only INT4, in "
            "blocks, packed two per byte"),
    Support(TENSORRT, ("fp8",), NATIVE, "documentation", "TensorRT's guide, quantized types: fp8 × fp8 from SM 89 on"),
    Support(TENSORRT, ("nvfp4",), NATIVE, "documentation", "TensorRT's guide, quantized types: fp4 × fp4 with scales "
            "of blocks of 16, from SM 100 on"),
    Support(RTX, ("w8a8",), NATIVE, "compiled", "TensorRT-RTX 1.7.1: in the compiled plan the matmul reads int8 "
            "activations and int8 weights"),
    Support(RTX, ("w8",), NATIVE, "compiled", "TensorRT-RTX 1.7.1: in the compiled plan one kernel reads int8 weights "
            "with one scale per channel and multiplies (with block scales it dequantizes the whole weight first)"),
    Support(RTX, ("w4",), NATIVE, "compiled", "TensorRT-RTX 1.7.1: in the compiled plan one kernel reads int4 weights "
            "with block scales and multiplies"),
    Support(RTX, ("fp8",), NATIVE, "compiled", "TensorRT-RTX 1.7.1, from SM 89 on: in the compiled plan the matmul "
            "reads fp8 activations and fp8 weights"),
    Support(RTX, ("nvfp4",), NATIVE, "compiled", "TensorRT-RTX 1.7.1, from SM 120 on: in the compiled plan the matmul "
            "reads fp4 activations and fp4 weights"),
    Support(RTX, ("kv8",), UNSUPPORTED, "compiled", "TensorRT-RTX 1.7.1 updates only float caches in place "
            "(TensorScatter)", ("standard",)),
    Support(TENSORRT, ("kv8",), UNSUPPORTED, "documentation", "the in-place cache update is the layer of TensorRT-RTX, "
            "which does not take int8", ("standard",)),
    Support(RTX, ("kv8",), FALLS_BACK, "compiled", "TensorRT-RTX 1.7.1 compiles the appended int8 cache; it is "
            "dequantized before the matmuls of attention", ("primitive",)),
    Support(TENSORRT, ("kv8",), FALLS_BACK, "documentation", "TensorRT-RTX compiles the same graph", ("primitive",)),
    Support((*CUDA, *TENSORRT, *RTX), RECIPES, UNSUPPORTED, "documentation", "the variant is made for onnxruntime on "
            "CPU from `standard`; TensorRT's parser takes int8 constants only before DequantizeLinear",
            ONNXRUNTIME_ONLY),
)  # fmt: skip
"""Rows in the order of the documentation; exactly one applies to every combination."""


NOT_OFFERED: Mapping[str, str] = {
    "nvfp4 weights with float activations": "TensorRT-RTX 1.7.1 compiles a kernel that writes the whole weight as "
    "floats in every call, before a float matmul",
    "int8 weights with scales of blocks": "TensorRT-RTX 1.7.1 writes the whole weight as floats first; with one scale "
    "per channel (w8) it does not",
    "mxfp8": "TensorRT-RTX 1.7.1 does not parse E8M0 constants",
    "an fp8 cache": "TensorRT-RTX 1.7.1 updates only float caches in place (TensorScatter); an appended one it "
    "dequantizes as a whole in every call",
    "int4 weights with fp8 activations": "TensorRT-RTX 1.7.1 multiplies only operands of one type",
}
"""Forms that no recipe offers, with what TensorRT-RTX makes of them; the tests compile or parse each."""


def support(target: str, recipe: str, variant: str = "standard", dtype: str = "fp32") -> Support:
    """Return the row for a target, recipe, variant and float dtype; raise EngineError if a name is unknown."""
    names = {"target": (target, BACKENDS), "recipe": (recipe, RECIPES), "variant": (variant, VARIANTS),
             "dtype": (dtype, DTYPES)}  # fmt: skip
    for name, (value, known) in names.items():
        if value not in known:
            raise EngineError("options.invalid", f"{name} {value!r} is unknown; known: {', '.join(known)}.")
    return next(row for row in TABLE if row.applies_to(target, recipe, variant, dtype))


def require(target: str, recipe: str, variant: str = "standard", dtype: str = "fp32") -> str:
    """Return a sentence for the user if a combination falls back, and an empty string if it is native.

    Raises EngineError if the target does not support the combination, or a name is unknown.
    """
    row = support(target, recipe, variant, dtype)
    if row.verdict == UNSUPPORTED:
        others = [name for name in VARIANTS if support(target, recipe, name, dtype).verdict != UNSUPPORTED]
        advice = f"Use the variant {' or '.join(others)}" if others else "Leave this recipe out for this target"
        message = f"{target} does not support {recipe} in the variant {variant!r} ({dtype}): {row.evidence}. {advice}."
        raise EngineError("engine.unsupported_recipe", message)
    if row.verdict == FALLS_BACK:
        return f"{target} runs {recipe} of the variant {variant!r} ({dtype}), but falls back: {row.evidence}."
    return ""
