"""The table of what each engine makes of each recipe: complete, and every line that this machine can check is true."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from bridge_stg.export.engines.compile import PACKAGES, compile_in_tensorrt
from bridge_stg.export.engines.support import (
    DTYPES,
    FALLS_BACK,
    NATIVE,
    REFUSED,
    TABLE,
    combinations,
    markdown,
    require,
    support,
)
from bridge_stg.runtime.errors import EngineError
from tests.export.engines.quantized_forms import K, form, fused_inputs, optimized, plan_tensors

SIZES = {"B": (1, 1, 1), "L": (1, 16, 64), "S": (128, 128, 128)}
CHECKED = [(v, d) for v in ("standard", "primitive") for d in DTYPES]


def test_exactly_one_line_speaks_of_every_combination() -> None:
    for combination in combinations():
        assert sum(line.speaks_of(*combination) for line in TABLE) == 1, combination
    assert all(line.evidence and line.checked in ("run", "compiled", "documentation") for line in TABLE)


def test_asking_the_table() -> None:
    assert require("onnxruntime-cpu", "w8a8") == ""
    assert "falls back" in require("onnxruntime-cpu", "w8a8", dtype="fp16")
    with pytest.raises(EngineError, match="tensorrt-rtx refuses kv8 in the variant 'standard'.*Use the variant primit"):
        require("tensorrt-rtx", "kv8")
    with pytest.raises(EngineError, match="recipe 'w2' is not in the table.*w8a8, w8, w4, kv8"):
        support("tensorrt-10", "w2")


def test_the_table_for_people_has_every_line() -> None:
    assert len(markdown().splitlines()) == 2 + len(TABLE)


@pytest.mark.parametrize(("variant", "dtype"), CHECKED)
@pytest.mark.parametrize(
    ("recipe", "fused"), [("w8a8", "MatMulIntegerToFloat"), ("w8", "MatMulNBits"), ("w4", "MatMulNBits")]
)
def test_products_in_onnxruntime(recipe: str, fused: str, variant: str, dtype: str, tmp_path: Path) -> None:
    line = support("onnxruntime-cpu", recipe, variant, dtype)
    operators = optimized(form(recipe, variant, dtype), tmp_path)
    assert line.checked == "run"
    assert (fused in operators) is (line.verdict == NATIVE)
    assert ("MatMul" in operators) is (line.verdict == FALLS_BACK)


@pytest.mark.parametrize(("variant", "dtype"), CHECKED)
def test_the_cache_in_onnxruntime(variant: str, dtype: str, tmp_path: Path) -> None:
    operators = optimized(form("kv8", variant, dtype), tmp_path)
    assert support("onnxruntime-cpu", "kv8", variant, dtype).verdict == FALLS_BACK
    assert "DequantizeLinear" in operators and {"Attention", "MatMul"} & set(operators)


@pytest.mark.parametrize(("variant", "dtype"), CHECKED)
@pytest.mark.parametrize("recipe", ["w8a8", "w8", "w4", "kv8"])
def test_tensorrt_rtx(recipe: str, variant: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[-1], reason='no TensorRT-RTX here: pip install "bridge-stg[rtx]" to run this test')
    line = support("tensorrt-rtx", recipe, variant, dtype)
    onnx.save(form(recipe, variant, dtype), tmp_path / "g.onnx")
    assert line.checked == "compiled"
    if line.verdict == REFUSED:
        with pytest.raises(EngineError, match="Int8 but must have type Float"):
            compile_in_tensorrt(tmp_path / "g.onnx", SIZES, capacity=128)
        return
    plan = compile_in_tensorrt(tmp_path / "g.onnx", SIZES, capacity=128)
    tensors = plan_tensors(plan)
    if recipe == "kv8":
        assert line.verdict == FALLS_BACK and tensors["past.1"][1] == "int8"
    elif recipe == "w8a8":
        activations = [name for name, (dims, kind) in tensors.items() if kind == "int8" and dims[1:] == [str(K)]]
        assert line.verdict == NATIVE and activations
    else:
        weights = {tensors[name][1] for inputs in fused_inputs(plan) for name in inputs if name in tensors}
        assert line.verdict == NATIVE and {"w8": "int8", "w4": "int4"}[recipe] in weights


def test_the_table_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "calibration.md").read_text(encoding="utf-8")
    assert f"<!-- support: begin -->\n{markdown()}\n<!-- support: end -->" in text
