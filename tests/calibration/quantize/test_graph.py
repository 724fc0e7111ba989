"""A small quantized graph: its outputs follow from levels and scales, and smoothing does not change float outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from bridge_stg.calibration.quantize.graph import GraphQuantizer
from bridge_stg.calibration.quantize.packing import INT8_LIMIT, REDUCED_LIMIT
from bridge_stg.calibration.quantize.ranges import TensorRange
from bridge_stg.calibration.recipes import GRAPH_RECIPES, GraphRecipe
from bridge_stg.calibration.scoring.saturation_test import saturation_test
from bridge_stg.export.graph.blocks import find_matmuls, find_tables
from bridge_stg.export.graph.ort_cpu import for_ort_cpu
from bridge_stg.export.graph.weight_file import WeightFile
from tests.errors import raises
from tests.export.graph.test_blocks import LANGUAGE, numbers, small_model

MLP = f"{LANGUAGE}.layers.0.mlp"
GATE_UP = (f"{MLP}.up_proj/MatMul", f"{MLP}.gate_proj/MatMul")
EXACT = saturation_test().passed
RECIPES = {**GRAPH_RECIPES, "w8a8": dataclasses.replace(GRAPH_RECIPES["w8a8"], reduced_range=not EXACT)}
"""Recipes that this CPU multiplies without saturation, as `calibrate` uses them."""

FLOAT_SMOOTH = GraphRecipe(weights="int8", keep_float=(
    "language_model.layers.0.mlp", "vision_encoder.merger", "language_model.lm_head",
))  # fmt: skip


def activation_ranges(feeds: dict[str, np.ndarray]) -> dict[str, TensorRange]:
    """Return min-max ranges of the matmuls' inputs in the float graph."""
    model = small_model()
    matmuls = find_matmuls(model, "language_model")
    proto = ir.serde.serialize_model(model)
    names = list(dict.fromkeys(p.activation for p in matmuls if p.activation != "x"))
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}
    largest = {p.node: float(np.abs(found[p.activation]).max()) for p in matmuls}
    return {node: TensorRange(value / 127, "minmax", value, 0.0) for node, value in largest.items()}


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((5, 4), np.float32), "ids": np.array([0, 3, 1, 2, 3])}


RANGES = activation_ranges(drawn())


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    return drawn()


def quantized(
    folder: Path,
    recipe: GraphRecipe,
    *,
    ranges: dict[str, TensorRange] | None = None,
    smoothing: dict[str, np.ndarray] | None = None,
    ort_cpu: bool = False,
) -> Path:
    model = small_model()
    folder.mkdir(exist_ok=True)
    with WeightFile(folder / "weights.data") as weights:
        GraphQuantizer(
            "language_model",
            recipe,
            ranges=RANGES if ranges is None else ranges,
            smoothing=smoothing or {},
            weights=weights,
        ).quantize(model)
    if ort_cpu:
        assert for_ort_cpu(model, "language_model")
    ir.save(model, folder / "g.onnx")
    onnx.checker.check_model(str(folder / "g.onnx"), full_check=True)
    return folder / "g.onnx"


def run(path: Path, feeds: dict[str, np.ndarray], *, optimise: bool = True) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture
def in_float(tmp_path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ir.save(small_model(), tmp_path / "float.onnx")
    return run(tmp_path / "float.onnx", feeds)


def fake(x: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)


def test_a_w8a8_matmul_is_its_levels_times_its_scales(tmp_path: Path, feeds: dict[str, np.ndarray]) -> None:
    table = np.array(numbers(16).split(", "), np.float32).reshape(4, 4)
    scales = np.abs(table).max(-1, keepdims=True) / (INT8_LIMIT if EXACT else REDUCED_LIMIT)
    expected = fake(feeds["x"], RANGES["lm_head/MatMul"].scale) @ (np.rint(table / scales) * scales).T
    path = quantized(tmp_path, RECIPES["w8a8"])
    np.testing.assert_allclose(run(path, feeds)["logits"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(path, feeds, optimise=False)["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "error"), [("w8a8", 0.03), ("w8", 0.01), ("w4", 0.15)])
def test_near_the_float_graph(
    tmp_path: Path, feeds: dict[str, np.ndarray], in_float: dict[str, np.ndarray], name: str, error: float
) -> None:
    recipe = dataclasses.replace(RECIPES[name], block_size=16)
    found = run(quantized(tmp_path / name, recipe), feeds)
    for tensor in ("y", "logits"):
        relative = np.linalg.norm(found[tensor] - in_float[tensor]) / np.linalg.norm(in_float[tensor])
        assert 1e-4 < relative < error, tensor
    np.testing.assert_array_equal(found["scores"], in_float["scores"])  # attention is not quantized


def test_ort_cpu_computes_the_same(tmp_path: Path, feeds: dict[str, np.ndarray]) -> None:
    plain = run(quantized(tmp_path / "standard", RECIPES["w8a8"]), feeds, optimise=False)
    path = quantized(tmp_path / "ort-cpu", RECIPES["w8a8"], ort_cpu=True)
    for name, value in run(path, feeds).items():
        np.testing.assert_allclose(value, plain[name], rtol=1e-4, atol=1e-5)
    found = [node.op_type for node in onnx.load(path).graph.node]
    assert found.count("MatMulIntegerToFloat") == 5 and "DequantizeLinear" not in found
    assert found.count("QuantizeLinear") == 4 and found.count("Add") == 1  # gate and up share one; biases are fused


def test_matmuls_are_found_in_quantized_graphs(tmp_path: Path) -> None:
    """Matmuls keep names and sizes, and are found after Q and DQ."""
    plain = find_matmuls(small_model(), "language_model")
    for name in ("w8a8", "w8", "w4"):
        recipe = dataclasses.replace(RECIPES[name], block_size=16)
        for ort_cpu in (False, True):
            model = ir.load(quantized(tmp_path / f"{name}{ort_cpu}", recipe, ort_cpu=ort_cpu))
            found = find_matmuls(model, "language_model")
            assert [(p.node, p.k, p.n, p.activation) for p in found] == [
                (p.node, p.k, p.n, p.activation) for p in plain
            ]
            assert {p.form for p in found} == {"int8"}  # sums of 4 and 6 hold no block of 16
            assert [table.form for table in find_tables(model, "language_model")] == ["int8"]


def test_smoothing_changes_nothing_in_float(
    tmp_path: Path, feeds: dict[str, np.ndarray], in_float: dict[str, np.ndarray]
) -> None:
    strengths = np.array([0.25, 1, 3, 8], np.float32)
    hidden = np.geomspace(0.1, 5, 6, dtype=np.float32)
    smoothing = {**dict.fromkeys(GATE_UP, strengths), f"{MLP}.down_proj/MatMul": hidden}
    path = quantized(tmp_path / "smooth", FLOAT_SMOOTH, smoothing=smoothing)
    for name, value in run(path, feeds).items():
        np.testing.assert_allclose(value, in_float[name], rtol=1e-5, atol=1e-5)
    found = {t.name: onnx.numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer}
    np.testing.assert_allclose(found["scale"], np.array([1, 2, 3, 4]) / strengths, rtol=1e-6)


def test_blocks_that_stay_float_keep_their_bytes(
    tmp_path: Path, feeds: dict[str, np.ndarray], in_float: dict[str, np.ndarray]
) -> None:
    recipe = dataclasses.replace(RECIPES["w8a8"], keep_float=("language_model.lm_head", "vision_encoder.merger"))
    path = quantized(tmp_path / "kept", recipe)
    found = run(path, feeds)
    np.testing.assert_array_equal(found["logits"], in_float["logits"])
    proto = onnx.load(path)
    types = {t.name: t.data_type for t in proto.graph.initializer}
    assert types["table"] == types["merge"] == onnx.TensorProto.FLOAT  # a tied table follows its head
    assert types["up_int8"] == onnx.TensorProto.INT8 and "up" not in types
    assert [node.op_type for node in proto.graph.node].count("Gemm") == 1


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    proto = onnx.load(quantized(tmp_path, RECIPES["w8"]))
    assert [t.name for t in proto.graph.initializer if t.name.startswith("table")] == ["table_int8", "table_scale"]


def test_a_missing_range(tmp_path: Path) -> None:
    with raises("calibration.missing_range", "up_proj/MatMul"):
        quantized(tmp_path, RECIPES["w8a8"], ranges={})
    broken = {**RANGES, GATE_UP[0]: TensorRange(0.0, "minmax", 0.0, 0.0)}
    with raises("calibration.missing_range", "up_proj/MatMul", "0.0"):
        quantized(tmp_path, RECIPES["w8a8"], ranges=broken)


@pytest.mark.parametrize(
    ("smoothing", "value"),
    [
        ({"lm_head/MatMul": np.ones(4)}, "lm_head/MatMul"),
        ({GATE_UP[0]: np.ones(4)}, "found 1"),
        (dict.fromkeys(GATE_UP, np.zeros(4)), "4 positive numbers"),
        (dict.fromkeys(GATE_UP, np.ones(3)), "found 2 of shape [3]"),
    ],
)
def test_smoothing_that_does_not_fit(tmp_path: Path, smoothing: dict[str, np.ndarray], value: str) -> None:
    with raises("calibration.bad_smoothing", value):
        quantized(tmp_path, RECIPES["w8a8"], smoothing=smoothing)


def test_two_ranges_of_one_activation(tmp_path: Path, feeds: dict[str, np.ndarray]) -> None:
    ranges = dict(RANGES)
    for node, scale in zip(GATE_UP, (0.03, 0.05), strict=True):
        ranges[node] = TensorRange(scale, "minmax", 127 * scale, 0.0)
    proto = onnx.load(quantized(tmp_path, RECIPES["w8a8"], ranges=ranges))
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.startswith("normed_")}
    assert sorted(round(float(scale), 3) for scale in scales.values()) == [0.03, 0.05]
