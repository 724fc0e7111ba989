"""Settings of OpenVINO on CPU, and of its KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino as ov

AUTO = "auto"
"""fp32 weights, computed as OpenVINO chooses: in bf16 if the CPU supports it, with an 8-bit cache."""


def settings(precision: str, threads: int) -> dict[str, Any]:
    """Return the properties of a compiled model.

    fp32 is forced to fp32; for other precisions OpenVINO chooses: floats in bf16 if the CPU supports it, and an 8-bit
    KV cache.
    """
    chosen: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if precision == "fp32":
        chosen |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return chosen


def compile_file(path: Path, precision: str, threads: int) -> ov.CompiledModel:
    """Read a model and compile it for the CPU."""
    core = ov.Core()
    return core.compile_model(core.read_model(path), "CPU", settings(precision, threads))


def words(compiled: ov.CompiledModel) -> str:
    """Describe a compiled model's precision by its properties."""
    names = {"INFERENCE_PRECISION_HINT": "computes in", "KV_CACHE_PRECISION": "KV cache"}
    return ", ".join(f"{word} {compiled.get_property(name).get_type_name()}" for name, word in names.items())
