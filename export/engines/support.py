"""The table of how each engine runs each recipe, with the evidence of every row; `calibrate` and `build` obey it.

Verdicts: `native`, the engine multiplies integers (w8a8) or reads them inside the matmul (w8, w4, kv8); `falls back`,
it converts integers to floats first, which saves memory but no time; `refused`, it does not run. Imports no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridge_stg.runtime.errors import EngineError

TARGETS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-10", "tensorrt-11", "tensorrt-rtx")
RECIPES = ("w8a8", "w8", "w4", "kv8")
VARIANTS = ("standard", "primitive", "ort-cpu")
DTYPES = ("fp32", "fp16")
NATIVE, FALLS_BACK, REFUSED = "native", "falls back", "refused"
OF_ONNXRUNTIME = ("ort-cpu",)
"""Variants with operators of onnxruntime on CPU; other targets never get them."""


@dataclass(frozen=True)
class Support:
    """One row of the table.

    Attributes:
        targets: engines that the row applies to.
        recipes: quantization recipes: `w8a8`, `w8`, `w4`, or `kv8` for the KV cache.
        verdict: `native`, `falls back` or `refused`.
        evidence: observation and its source.
        checked: `run` or `compiled` if a test of this repository repeats it, `documentation` if nobody ran it here.
        variants: variants of the graphs.
        dtypes: float types of the graphs.
    """

    targets: tuple[str, ...]
    recipes: tuple[str, ...]
    verdict: str
    evidence: str
    checked: str
    variants: tuple[str, ...] = ("standard", "primitive")
    dtypes: tuple[str, ...] = DTYPES

    def applies_to(self, target: str, recipe: str, variant: str, dtype: str) -> bool:
        """Return whether the row is about this combination."""
        return target in self.targets and recipe in self.recipes and variant in self.variants and dtype in self.dtypes


TENSORRT = ("tensorrt-10", "tensorrt-11")
TABLE: tuple[Support, ...] = (
    Support(
        ("onnxruntime-cpu",), ("w8a8",), NATIVE,
        "the variant holds onnxruntime's MatMulIntegerToFloat itself, for every product",
        "run", ("ort-cpu",), ("fp32",),
    ),
    Support(
        ("onnxruntime-cpu",), ("w8a8",), NATIVE,
        "onnxruntime 1.32 fuses QuantizeLinear, DequantizeLinear and MatMul into MatMulIntegerToFloat, but only "
        "products whose int8 input no other reads; `ort-cpu`, which is preferred, has all of them",
        "run", ("standard", "primitive"), ("fp32",),
    ),
    Support(
        ("onnxruntime-cpu",), ("w8a8",), FALLS_BACK,
        "with fp16 activations nothing is fused: weights are dequantized and multiplied as floats at every call",
        "run", VARIANTS, ("fp16",),
    ),
    Support(
        ("onnxruntime-cpu",), ("w8", "w4"), NATIVE,
        "onnxruntime 1.32 fuses DequantizeLinear and MatMul into MatMulNBits; fp16 activations are cast around it",
        "run", VARIANTS,
    ),
    Support(
        ("onnxruntime-cpu",), ("kv8",), FALLS_BACK,
        "the cache is int8 in memory, and attention dequantizes all of it at every call",
        "run", VARIANTS,
    ),
    Support(
        ("onnxruntime-cuda",), ("w8a8",), FALLS_BACK,
        "onnxruntime's source registers the fusion of Q/DQ around MatMul for its CPU and DirectML providers only "
        "(qdq_selector_action_transformer.cc)",
        "documentation",
    ),
    Support(
        ("onnxruntime-cuda",), ("w8", "w4"), NATIVE,
        "onnxruntime's source registers DequantizeLinear + MatMul → MatMulNBits for the CUDA provider too "
        "(qdq_selector_action_transformer.cc)",
        "documentation",
    ),
    Support(
        ("onnxruntime-cuda",), ("kv8",), FALLS_BACK,
        "the same graph as on CPU: a DequantizeLinear stands before attention",
        "documentation",
    ),
    Support(
        TENSORRT, ("w8a8",), NATIVE,
        "TensorRT's guide, explicit quantization: Q/DQ are fused into the product, int8 × int8; its parser is the one "
        "of TensorRT-RTX, which takes the same graphs",
        "documentation",
    ),
    Support(
        TENSORRT, ("w8",), FALLS_BACK,
        "TensorRT's guide, quantized types: weight-only quantization is supported for INT4; int8 weights without "
        "quantized activations are dequantized",
        "documentation",
    ),
    Support(
        TENSORRT, ("w4",), NATIVE,
        "TensorRT's guide, quantized types: weight-only INT4, in blocks, packed two to a byte",
        "documentation",
    ),
    Support(
        ("tensorrt-rtx",), ("w8a8",), NATIVE,
        "TensorRT-RTX 1.7.1: in the compiled plan the product reads int8 activations and int8 weights",
        "compiled",
    ),
    Support(
        ("tensorrt-rtx",), ("w8",), NATIVE,
        "TensorRT-RTX 1.7.1: in the compiled plan one kernel reads int8 weights with a scale a channel and multiplies "
        "(with a scale a block it dequantizes the whole weight first)",
        "compiled",
    ),
    Support(
        ("tensorrt-rtx",), ("w4",), NATIVE,
        "TensorRT-RTX 1.7.1: in the compiled plan one kernel reads int4 weights with a scale a block and multiplies",
        "compiled",
    ),
    Support(
        ("tensorrt-rtx",), ("kv8",), REFUSED,
        "TensorRT-RTX 1.7.1 refuses to update an int8 cache in place (TensorScatter): its type must be a float's",
        "compiled", ("standard",),
    ),
    Support(
        TENSORRT, ("kv8",), REFUSED,
        "the cache update in place is the layer of TensorRT-RTX, which refuses int8",
        "documentation", ("standard",),
    ),
    Support(
        ("tensorrt-rtx",), ("kv8",), FALLS_BACK,
        "TensorRT-RTX 1.7.1 compiles the appended int8 cache; it is dequantized before the products of attention",
        "compiled", ("primitive",),
    ),
    Support(
        TENSORRT, ("kv8",), FALLS_BACK,
        "the same graph as for TensorRT-RTX, which compiles it",
        "documentation", ("primitive",),
    ),
    Support(
        ("onnxruntime-cuda", *TENSORRT, "tensorrt-rtx"), RECIPES, REFUSED,
        "the variant is a pass for onnxruntime on CPU, derived from `standard`; TensorRT's parser takes an int8 "
        "constant only before a DequantizeLinear",
        "documentation", OF_ONNXRUNTIME,
    ),
)  # fmt: skip
"""Rows in the order of the documentation; exactly one applies to every combination."""


def support(target: str, recipe: str, variant: str = "standard", dtype: str = "fp32") -> Support:
    """Return the row of a target, recipe, variant and dtype of floats; raise EngineError if a name is unknown."""
    names = {"target": (target, TARGETS), "recipe": (recipe, RECIPES), "variant": (variant, VARIANTS),
             "dtype": (dtype, DTYPES)}  # fmt: skip
    for name, (value, known) in names.items():
        if value not in known:
            raise EngineError("options.invalid", f"{name} {value!r} is unknown; known: {', '.join(known)}.")
    return next(row for row in TABLE if row.applies_to(target, recipe, variant, dtype))


def require(target: str, recipe: str, variant: str = "standard", dtype: str = "fp32") -> str:
    """Return a sentence for the user if a combination falls back, and an empty string if it is native.

    Raises:
        EngineError: the target does not support the combination, or a name is unknown.
    """
    row = support(target, recipe, variant, dtype)
    if row.verdict == REFUSED:
        others = [name for name in VARIANTS if support(target, recipe, name, dtype).verdict != REFUSED]
        advice = f"Use the variant {' or '.join(others)}" if others else "Leave this recipe out for this target"
        raise EngineError(
            "engine.unsupported_recipe",
            f"{target} does not support {recipe} in the variant {variant!r} ({dtype}): {row.evidence}. {advice}.",
        )
    if row.verdict == FALLS_BACK:
        return f"{target} runs {recipe} of the variant {variant!r} ({dtype}), but falls back: {row.evidence}."
    return ""
