"""The table of recipes and engines: it is complete, and every row that this machine can check is true."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest

from benchmarks.gpu import engines
from bridge_stg.calibration.recipes import RECIPES as BUNDLE_RECIPES
from bridge_stg.export.engines.support import (
    BACKENDS,
    DTYPES,
    FALLS_BACK,
    NATIVE,
    NOT_OFFERED,
    RECIPES,
    TABLE,
    UNSUPPORTED,
    VARIANTS,
    require,
    support,
)
from bridge_stg.export.engines.targets import ahead_of_time, find_target
from bridge_stg.runtime.errors import EngineError
from tests.conftest import ROOT
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
    with raises("options.invalid", "'w2'", "w8a8, w8, w4, fp8, nvfp4, kv8", kind=EngineError):
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_and_nvfp4_in_onnxruntime(dtype: str, tmp_path: Path) -> None:
    assert support("onnxruntime-cpu", "fp8", dtype=dtype).verdict == FALLS_BACK
    assert "MatMul" in optimized(form("fp8", "standard", dtype), tmp_path)
    assert support("onnxruntime-cpu", "nvfp4", "primitive", dtype).verdict == UNSUPPORTED
    assert support("onnxruntime-cpu", "nvfp4", "ort-cpu", dtype).verdict == FALLS_BACK
    with pytest.raises(Exception, match="TRT_FP4DynamicQuantize"):
        optimized(form("nvfp4", "standard", dtype), tmp_path)


FIRST_SM = {"fp8": (89, 86), "nvfp4": (120, 89)}
"""A compute capability that has the type, and one that has not."""


@pytest.mark.parametrize(("variant", "dtype"), CHECKED)
@pytest.mark.parametrize("recipe", list(FIRST_SM))
def test_floating_forms_in_tensorrt_rtx(recipe: str, variant: str, dtype: str, tmp_path: Path) -> None:
    rtx()
    onnx.save(form(recipe, variant, dtype), tmp_path / "g.onnx")
    sm, older = FIRST_SM[recipe]
    plan = compile_for(tmp_path / "g.onnx", SIZES, sms=(sm,))
    tensors, stored = plan_tensors(plan), {"fp8": "fp8_e4m3", "nvfp4": "fp4_e2m1"}[recipe]
    row = support("tensorrt-rtx", recipe, variant, dtype)
    assert row.verdict == NATIVE and row.checked == "compiled"
    both = [[tensors[name][1] for name in inputs if name in tensors].count(stored) for inputs in fused_inputs(plan)]
    assert both == [2]  # activations and weights of the one matmul
    with raises("engine.build_failed", stored, kind=EngineError):
        compile_for(tmp_path / "g.onnx", SIZES, sms=(older,))


@pytest.mark.parametrize(
    ("recipe", "refused", "weights"),
    [
        ("nvfp4 alone", "nvfp4 weights with float activations", "fp4_e2m1"),
        ("int8 blocks", "int8 weights with scales of blocks", "int8"),
    ],
)
def test_forms_whose_weights_are_not_read_by_the_matmul(
    recipe: str, refused: str, weights: str, tmp_path: Path
) -> None:
    rtx()
    onnx.save(form(recipe, "standard", "fp16"), tmp_path / "g.onnx")
    plan = compile_for(tmp_path / "g.onnx", SIZES, sms=(120,))
    tensors = plan_tensors(plan)
    assert refused in NOT_OFFERED and weights in {kind for _, kind in tensors.values()}
    read = {tensors[name][1] for inputs in fused_inputs(plan) for name in inputs if name in tensors}
    assert read == {"half"} or weights not in read


@pytest.mark.parametrize(
    ("recipe", "refused", "code"),
    [
        ("mxfp8", "mxfp8", "engine.rejected_graph"),
        ("fp8 cache", "an fp8 cache", "engine.rejected_graph"),
        ("int4 and fp8", "int4 weights with fp8 activations", "engine.build_failed"),
    ],
)
def test_forms_that_do_not_compile(recipe: str, refused: str, code: str, tmp_path: Path) -> None:
    rtx()
    onnx.save(form(recipe, "standard", "fp16"), tmp_path / "g.onnx")
    assert refused in NOT_OFFERED
    with raises(code, kind=EngineError):
        compile_for(tmp_path / "g.onnx", SIZES, capacity=128, sms=(89,))


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
    text = Path(ROOT, "docs/calibration.md").read_text(encoding="utf-8")
    assert "\n".join(["<!-- support: begin -->", *rows, "<!-- support: end -->"]) in text
    refused = ["| form | why |", "|---|---|", *(f"| {form} | {why} |" for form, why in NOT_OFFERED.items())]
    assert "\n".join(["<!-- refused: begin -->", *refused, "<!-- refused: end -->"]) in text


NATIVE_WORDS = {"w8a8": "int8", "w8": "{} × int8", "w4": "{} × int4", "fp8": "fp8", "nvfp4": "nvfp4"}


def test_benchmarks_results_agree_with_the_table_on_every_target() -> None:
    """Each precision was compiled, to the kernels of the verdict, or refused for what the table says."""
    found = engines.read_engines(engines.RESULTS)
    text = Path(ROOT, "docs/engines.md").read_text(encoding="utf-8")
    assert f"<!-- engines: begin -->\n{engines.table(found)}\n<!-- engines: end -->" in text
    bundles = {row[:2] for row in found}
    assert bundles == set(itertools.product(engines.MODELS, engines.PRECISIONS))
    for (model, precision), variant, target in itertools.product(bundles, engines.VARIANTS, ahead_of_time()):
        name, _, dtype = precision.partition(" of ")
        for graph in ("vision_encoder", "language_model"):
            engine = found[model, precision, graph, variant, target]
            form = BUNDLE_RECIPES[name.removesuffix("-kv8")].of(graph).name if dtype else "float"
            parts = [form] * (form != "float") + ["kv8"] * (name.endswith("-kv8") and graph == "language_model")
            rows = [support("tensorrt-rtx", part, variant, dtype) for part in parts]
            if form in ("fp8", "nvfp4") and form not in find_target(target).precisions:
                assert engine["refused"] == "engine.unsupported_precision"
            elif UNSUPPORTED in {row.verdict for row in rows}:
                assert engine["refused"] == "engine.unsupported_recipe"
            else:
                word = NATIVE_WORDS[form].format(dtype) if dtype else precision
                assert max(engine["products"], key=engine["products"].get) == word
