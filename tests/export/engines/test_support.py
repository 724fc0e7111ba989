"""The table of recipes and engines: it is complete, and every row that this machine can check is true."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest

from bridge_stg.export.engines.support import (
    BACKENDS,
    DTYPES,
    FALLS_BACK,
    NATIVE,
    RECIPES,
    TABLE,
    UNSUPPORTED,
    VARIANTS,
    require,
    support,
)
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises
from tests.export.engines.quantized_forms import K, form, fused_inputs, optimized, plan_tensors
from tests.export.engines.real_tensorrt import compile_for, rtx

SIZES = {"B": (1, 1, 1), "L": (1, 16, 64), "S": (128, 128, 128)}
CHECKED = [(v, d) for v in ("standard", "primitive") for d in DTYPES]


def test_exactly_one_row_applies_to_every_combination() -> None:
    for combination in itertools.product(BACKENDS, RECIPES, VARIANTS, DTYPES):
        assert sum(row.applies_to(*combination) for row in TABLE) == 1, combination
    assert all(row.evidence and row.checked in ("run", "compiled", "documentation") for row in TABLE)


def test_verdicts() -> None:
    assert require("onnxruntime-cpu", "w8a8") == ""
    assert "falls back" in require("onnxruntime-cpu", "w8a8", dtype="fp16")
    with raises("engine.unsupported_recipe", "tensorrt-rtx", "kv8", "standard", "primitive", kind=EngineError):
        require("tensorrt-rtx", "kv8")
    with raises("options.invalid", "'w2'", "w8a8, w8, w4, kv8", kind=EngineError):
        support("tensorrt-10", "w2")


@pytest.mark.parametrize(("variant", "dtype"), CHECKED)
@pytest.mark.parametrize(
    ("recipe", "fused"), [("w8a8", "MatMulIntegerToFloat"), ("w8", "MatMulNBits"), ("w4", "MatMulNBits")]
)
def test_matmuls_in_onnxruntime(recipe: str, fused: str, variant: str, dtype: str, tmp_path: Path) -> None:
    row = support("onnxruntime-cpu", recipe, variant, dtype)
    operators = optimized(form(recipe, variant, dtype), tmp_path)
    assert row.checked == "run"
    assert (fused in operators) is (row.verdict == NATIVE)
    assert ("MatMul" in operators) is (row.verdict == FALLS_BACK)


@pytest.mark.parametrize(("variant", "dtype"), CHECKED)
def test_the_cache_in_onnxruntime(variant: str, dtype: str, tmp_path: Path) -> None:
    operators = optimized(form("kv8", variant, dtype), tmp_path)
    assert support("onnxruntime-cpu", "kv8", variant, dtype).verdict == FALLS_BACK
    assert "DequantizeLinear" in operators and {"Attention", "MatMul"} & set(operators)


@pytest.mark.parametrize(("variant", "dtype"), CHECKED)
@pytest.mark.parametrize("recipe", ["w8a8", "w8", "w4", "kv8"])
def test_tensorrt_rtx(recipe: str, variant: str, dtype: str, tmp_path: Path) -> None:
    rtx()
    row = support("tensorrt-rtx", recipe, variant, dtype)
    onnx.save(form(recipe, variant, dtype), tmp_path / "g.onnx")
    assert row.checked == "compiled"
    if row.verdict == UNSUPPORTED:
        with raises("engine.rejected_graph", "Int8", "Float", kind=EngineError):
            compile_for(tmp_path / "g.onnx", SIZES, capacity=128)
        return
    plan = compile_for(tmp_path / "g.onnx", SIZES, capacity=128)
    tensors = plan_tensors(plan)
    if recipe == "kv8":
        assert row.verdict == FALLS_BACK and tensors["past.1"][1] == "int8"
    elif recipe == "w8a8":
        activations = [name for name, (dims, kind) in tensors.items() if kind == "int8" and dims[1:] == [str(K)]]
        assert row.verdict == NATIVE and activations
    else:
        weights = {tensors[name][1] for inputs in fused_inputs(plan) for name in inputs if name in tensors}
        assert row.verdict == NATIVE and {"w8": "int8", "w4": "int4"}[recipe] in weights


def test_the_documentation_has_the_table() -> None:
    rows = ["| target | recipe | variant | floats | verdict | evidence | checked |", f"|{'---|' * 7}"]
    for row in TABLE:
        cells = [", ".join(cell) for cell in (row.targets, row.recipes, row.variants, row.dtypes)]
        rows.append(f"| {' | '.join([*cells, row.verdict, row.evidence, row.checked])} |")
    text = (Path(__file__).parents[3] / "docs" / "calibration.md").read_text(encoding="utf-8")
    assert "\n".join(["<!-- support: begin -->", *rows, "<!-- support: end -->"]) in text
