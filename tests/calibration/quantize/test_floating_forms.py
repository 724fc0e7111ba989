"""fp8 and nvfp4: stored as their formats, computed on the CPU with the numbers of numpy, compiled to their matmuls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.quantize.graph import GraphQuantizer
from bridge_stg.calibration.quantize.packing import ChannelPieces, Nvfp4Pieces, StoredSource, unpack_nibbles
from bridge_stg.calibration.quantize.ranges import TensorRange, range_of
from bridge_stg.calibration.quantize.rounding import rounded_rows, rounded_weight
from bridge_stg.calibration.recipes import GRAPH_RECIPES, RECIPES, Recipe
from bridge_stg.export.engines.layers import read_plan_report
from bridge_stg.export.graph.blocks import find_matmuls
from bridge_stg.export.graph.ort_cpu import for_ort_cpu
from bridge_stg.export.graph.weight_file import WeightFile
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.parity.verify import verify_bundle
from tests.calibration.golden_ranges import golden_ranges
from tests.export.engines.real_tensorrt import compile_for, rtx, small_sizes

N, K = 24, 64
NODE = "model.language_model.layers.0.mlp.up_proj/MatMul"
SM = {"fp8": 89, "nvfp4": 120}


@pytest.fixture(params=["float32", "float16"])
def weight(request: pytest.FixtureRequest) -> np.ndarray:
    """[N, K], channels of very different sizes, one of them zero."""
    values = np.random.default_rng(0).standard_normal((N, K)) * np.geomspace(1e-2, 10, N)[:, None]
    values[5] = 0
    return values.astype(request.param)


@pytest.mark.parametrize("transposed", [False, True])
def test_fp8_weights(weight: np.ndarray, transposed: bool) -> None:
    pieces = ChannelPieces(StoredSource(ir.tensor(weight)), form="fp8", transposed=transposed)
    levels = np.frombuffer(b"".join(pieces), ml_dtypes.float8_e4m3fn).astype(np.float32)
    levels = levels.reshape(K, N).T if transposed else levels.reshape(N, K)
    assert pieces.scales.dtype == weight.dtype and np.abs(levels).max() == 448
    found, exact = levels * pieces.scales.astype(np.float32)[:, None], weight.astype(np.float32)
    least = pieces.scales.astype(np.float32)[:, None] * 2.0**-9  # the step below the smallest normal numbers
    assert (np.abs(found - exact) <= np.maximum(np.abs(exact) / 15, least)).all()  # three bits of mantissa


def test_nvfp4_weights(weight: np.ndarray) -> None:
    pieces = Nvfp4Pieces(StoredSource(ir.tensor(weight)))
    codes = unpack_nibbles(np.frombuffer(b"".join(pieces), np.uint8), (N, K)).view(np.uint8) & 0xF
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    levels = np.concatenate([values, -values])[codes]
    assert pieces.scales.shape == (N, K // 16) and pieces.scales.dtype == ml_dtypes.float8_e4m3fn
    wide = np.repeat(pieces.scales.astype(np.float32) * np.float32(pieces.scale), 16, axis=1)
    exact = weight.astype(np.float32)
    np.testing.assert_allclose(levels * wide, rounded_weight(exact, "nvfp4", GRAPH_RECIPES["nvfp4"]), rtol=2e-3)
    large = np.abs(exact).max(1) > 0.1  # others are below the smallest scale of a block
    assert np.linalg.norm((levels * wide - exact)[large]) < 0.12 * np.linalg.norm(exact[large])
    assert not levels[5].any()


def test_the_range_of_a_floating_form_is_its_largest_value() -> None:
    rows = np.random.default_rng(0).standard_normal((64, K)).astype(np.float32)
    errors = []
    for form, limit in (("int8", 127), ("fp8", 448), ("nvfp4", 2688)):
        found = range_of(rows, np.abs(rows).max(0), form=form, method="minmax")
        assert found.scale == pytest.approx(np.abs(rows).max() / limit)
        errors.append(found.error)
    assert 0 < errors[0] < errors[1] < errors[2] < 0.12
    assert range_of(100 * rows, 100 * np.abs(rows).max(0), form="fp8").method == "minmax"


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_onnxruntime_computes_the_numbers_of_numpy(recipe: str, dtype: str, tmp_path: Path) -> None:
    rng, kind = np.random.default_rng(0), {"float": np.float32, "float16": np.float16}[dtype]
    weight = rng.standard_normal((N, K)).astype(kind)
    rows = (rng.standard_normal((2, 5, K)) * np.geomspace(0.1, 10, K)).astype(kind)
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g ({dtype}[B, L, {K}] x) => ({dtype}[B, L, {N}] y) {{
            b = Transpose<perm = [1, 0]>(w)
            y = MatMul(x, b)
        }}"""
    )
    model.graph[1].name = NODE
    value = model.graph[0].inputs[0]
    assert value is not None
    value.const_value = ir.tensor(weight, name="w")
    value.shape, value.dtype = ir.Shape(weight.shape), ir.DataType.from_numpy(np.dtype(kind))
    model.graph.register_initializer(value)
    limit = {"fp8": 448, "nvfp4": 2688}[recipe]
    scale = float(kind(np.abs(rows).max() / limit))
    with WeightFile(tmp_path / "weights.data") as weights:
        ranges = {NODE: TensorRange(scale, "minmax", 1.0, 0.0)}
        quantizer = GraphQuantizer(
            "language_model", GRAPH_RECIPES[recipe], ranges=ranges, smoothing={}, weights=weights
        )
        quantizer.quantize(model)
    ir.save(model, tmp_path / "standard.onnx")
    onnx.checker.check_model(str(tmp_path / "standard.onnx"), full_check=True)
    (matmul,) = find_matmuls(ir.load(tmp_path / "standard.onnx"), "language_model")
    assert (matmul.form, matmul.activation, matmul.n, matmul.k) == (recipe, "x", N, K)
    assert for_ort_cpu(model, "language_model") is (recipe == "nvfp4")
    ir.save(model, tmp_path / "g.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": rows})
    exact = weight.astype(np.float32)
    expected = rounded_rows(rows.reshape(-1, K).astype(np.float32), scale, recipe)
    expected = expected @ rounded_weight(exact, recipe, GRAPH_RECIPES[recipe]).T
    tolerance = 1e-5 if dtype == "float" else 5e-3
    assert np.linalg.norm(found.reshape(-1, N) - expected) < tolerance * np.linalg.norm(expected)
    assert session.run(None, {"x": rows[:, :0]})[0].shape == (len(rows), 0, N)  # a prefill reads no logits
    plain = rows.reshape(-1, K).astype(np.float32) @ exact.T
    assert 0.02 < np.linalg.norm(expected - plain) / np.linalg.norm(plain) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(SM))
def test_a_bundle_verifies_and_compiles(exported: Bundle, recipe: str, tmp_path: Path) -> None:
    rtx()
    ranges = golden_ranges(exported, tmp_path / "ranges")
    made = quantize_bundle(exported, tmp_path / "b", recipe=RECIPES[recipe], ranges=ranges)
    bundle = Bundle.load(made)
    assert "ort-cpu" in verify_bundle(made, threads=1)
    precisions = {name: graphs["standard"].precision for name, graphs in bundle.manifest.graphs.items()}
    assert precisions["vision_encoder"] == "fp8 fp8" and precisions["language_model"] == f"{recipe} {recipe}"
    for graph, variant in (
        ("language_model", "standard"),
        ("language_model", "primitive"),
        ("vision_encoder", "standard"),
    ):
        words = matmul_words(bundle, graph, variant, SM[recipe], tmp_path)
        assert words["mlp"] == {recipe if graph == "language_model" else "fp8"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_text_bundles_compile_in_every_recipe(
    text_bundle: Callable[[str], Bundle], family: str, tmp_path: Path
) -> None:
    rtx()
    source = text_bundle(family)
    matmuls = find_matmuls(ir.load(source.graph_path("language_model", "standard")), "language_model")
    ranges = {"language_model": {matmul.node: TensorRange(0.05, "minmax", 6.0, 0.0) for matmul in matmuls}}
    for name, recipe in RECIPES.items():
        chosen = Recipe(name, {"language_model": recipe.of("language_model")})
        made = quantize_bundle(
            source, tmp_path / name, recipe=chosen, ranges=ranges, variants=["standard"], measure=False
        )
        words = matmul_words(Bundle.load(made), "language_model", "standard", SM.get(name, 86), tmp_path)
        wanted = {"w8a8": "int8", "w8": "fp32 × int8", "w4": "fp32 × int4"}.get(name, name)
        assert wanted in words["mlp"], (name, words)


def matmul_words(bundle: Bundle, graph: str, variant: str, sm: int, folder: Path) -> dict[str, set[str]]:
    """Compile a graph and return what its matmuls read, by the last part of the block's name."""
    path = bundle.graph_path(graph, variant)
    (folder / "plan").write_bytes(compile_for(path, small_sizes(bundle.manifest.spec.vision), capacity=256, sms=(sm,)))
    found: dict[str, set[str]] = {}
    for block, groups in read_plan_report(folder / "plan", path).items():
        found.setdefault(block.rpartition(".")[2], set()).update(groups.get("products", {}))
    return found
