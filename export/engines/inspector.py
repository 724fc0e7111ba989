"""Read the layers of an engine with TensorRT's inspector, as kernels of `layers`.

Native TensorRT writes no program as text into an engine (see `layers`), but it compiles on the device only, where the
engine can be opened. The inspector names the inputs of a layer, not its weights: a matmul counts by its inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from bridge_stg.export.engines.layers import FUSED_ATTENTION, Kernel
from bridge_stg.runtime.backends.tensorrt.library import TensorRT
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.memory import available_bytes, gigabytes

TYPES = (
    (r"bfloat16|bf16", "bf16"), (r"float8|fp8", "fp8"), (r"half|float16|fp16", "fp16"), (r"float|fp32", "fp32"),
    (r"int8", "int8"), (r"int4", "int4"),
)  # fmt: skip
"""Patterns of `Half`, `Row major linear FP16 format` and the like, and the type of each; the first match counts."""
MATMUL = re.compile(r"gemm|matrixmultiply|fullyconnected|conv|_Fc|_Mm|_Bmm")
"""Pattern of a matmul's layer type, tactic or name."""
ROOM = 1.5
"""Memory needed to open an engine, as a multiple of its size."""

_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def inspected_kernels(library: TensorRT, plan: Any) -> list[Kernel]:
    """Return the kernels of all profiles of a serialized engine.

    Raises EngineError if the engine cannot be opened here, or its layers name no node of the graph.
    """
    size, left = memoryview(plan).nbytes, available_bytes()
    if left is not None and left < ROOM * size:
        message = f"cannot report its layers: opening an engine of {gigabytes(size)} exceeds the available memory"
        raise EngineError("engine.out_of_memory", message)
    engine = library.runtime.deserialize_cuda_engine(plan)
    if engine is None:
        message = f"cannot report its layers: TensorRT {library.version} cannot open it: {library.reason()}"
        raise EngineError("engine.no_layers", message)
    text = engine.create_engine_inspector().get_engine_information(library.module.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    kernels = [_kernel(layer) for layer in layers if isinstance(layer, dict)]
    if not any(kernel.nodes for kernel in kernels):
        message = f"cannot report its layers: TensorRT {library.version} names no node of the graph in them"
        raise EngineError("engine.no_layers", message)
    return kernels


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    name, metadata = str(layer.get("Name", "")), str(layer.get("Metadata", ""))
    known = [kind for tensor in layer.get("Inputs", []) if (kind := _type_of(tensor))]
    activations = "int8" if "int8" in known else next(iter(known), "")  # a residual may come first
    weights = layer.get("Weights")
    stored = _type_of({"Datatype": weights.get("Type", "")}) if isinstance(weights, dict) else ""
    return Kernel(
        _kind(layer, name), tuple(dict.fromkeys(_NODE.findall(metadata or name))), activations, stored or activations
    )


def _type_of(tensor: Any) -> str:
    """Return the project's name of a tensor's type; empty if it is not a type of numbers."""
    if not isinstance(tensor, dict):
        return ""
    found = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "").lower()
    return next((kind for pattern, kind in TYPES if re.search(pattern, found)), "")


def _kind(layer: Mapping[str, Any], name: str) -> str:
    called = f"{name} {layer.get('TacticName', '')}"
    if any(word in called.lower() for word in FUSED_ATTENTION):
        return "attention"
    kind = str(layer.get("LayerType", ""))
    return "matmul" if MATMUL.search(kind.lower()) or MATMUL.search(called) else "other"
