from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.overrides import Overrides
from bridge_stg.calibration.quantize.rounding import rounded_weight
from bridge_stg.calibration.quantize.scales import Scales
from bridge_stg.calibration.quantize.smooth import choose_smoothing, smoothing_vector
from bridge_stg.calibration.quantize.smoothing_groups import smoothing_groups
from bridge_stg.calibration.recipes import RECIPES, GraphRecipe
from bridge_stg.calibration.search.matmul_errors import matmul_errors
from bridge_stg.export.graph.blocks import Matmul, find_matmuls
from bridge_stg.runtime.bundle.bundle import Bundle

RECIPE = RECIPES["w8a8"]
GATE = "model.language_model.layers.0.mlp.gate_proj/MatMul"
UP = "model.language_model.layers.0.mlp.up_proj/MatMul"


@pytest.fixture(scope="module")
def matmuls(exported: Bundle) -> list[Matmul]:
    return find_matmuls(ir.load(exported.graph_path("language_model", "standard")), "language_model")


@pytest.fixture(scope="module")
def outliers(statistics: Statistics, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """The statistics with two channels of one activation 100 times as large, as in large language models."""
    folder = tmp_path_factory.mktemp("outliers") / "s"
    shutil.copytree(statistics.folder, folder)
    tensor = statistics.tensors["language_model"][GATE]
    for name in (tensor.rows, tensor.absmax):
        values = np.load(folder / name)
        values[..., [3, 17]] *= 100
        np.save(folder / name, values)
    return dataclasses.replace(statistics, folder=folder)


def test_the_vector_follows_the_strength() -> None:
    activation, weight = np.array([100, 1, 4, 0], np.float32), np.array([1, 1, 1, 2], np.float32)
    half = smoothing_vector(activation, weight, 0.5)
    assert half / half[1] == pytest.approx([10, 1, 2, 1 / half[1]])
    assert half[3] == 1 and np.median(half[:3]) == pytest.approx(1)
    whole = activation / smoothing_vector(activation, weight, 1.0)
    assert whole[:3] == pytest.approx(whole[0])  # no outlier is left


def test_outliers_are_found_and_moved(outliers: Statistics, matmuls: list[Matmul]) -> None:
    found = choose_smoothing(outliers, RECIPE)
    vector = found.vectors["language_model"][GATE]
    assert found.vectors["language_model"][UP] is vector
    assert set(np.argsort(-vector)[:2]) == {3, 17} and vector[[3, 17]].min() > 5
    plain = matmul_errors(outliers, matmuls, RECIPE)["language_model"]
    smooth = matmul_errors(outliers, matmuls, RECIPE, scales=Scales(smoothing=found.vectors))["language_model"]
    assert smooth[GATE] < plain[GATE] / 2


def test_only_what_can_be_folded_is_smoothed(exported: Bundle, statistics: Statistics) -> None:
    found = choose_smoothing(statistics, RECIPE)
    for graph in ("vision_encoder", "language_model"):
        model = ir.load(exported.graph_path(graph, "primitive"))  # names agree between variants
        possible = {node for group in smoothing_groups(model, graph) for node in group.nodes}
        assert set(found.vectors[graph]) <= possible
        assert all(strength > 0 for strength in found.strengths[graph].values())
    assert not found.vectors["spatial_decoder"]
    again = choose_smoothing(statistics, RECIPE)
    assert again.strengths == found.strengths


def test_recipes_and_overrides_turn_smoothing_off(outliers: Statistics) -> None:
    block = "language_model.layers.0.mlp"
    assert GATE not in choose_smoothing(outliers, RECIPE.with_float(block)).vectors["language_model"]
    zero = choose_smoothing(outliers, RECIPE, overrides=Overrides(smoothing={block: 0.0}))
    assert GATE not in zero.vectors["language_model"]
    forced = choose_smoothing(outliers, RECIPE, overrides=Overrides(smoothing={GATE: 0.35}))
    assert forced.strengths["language_model"][UP] == 0.35
    for recipe in (RECIPES["w8"], RECIPE.replace("language_model", smooth=False)):
        assert not choose_smoothing(outliers, recipe).vectors["language_model"]


def test_errors_by_hand(statistics: Statistics, exported: Bundle, matmuls: list[Matmul]) -> None:
    errors = matmul_errors(statistics, matmuls, RECIPES["w8"])["language_model"]
    matmul = next(p for p in matmuls if p.node == GATE)
    model = ir.load(exported.graph_path("language_model", "standard"))
    tensor = model.graph.initializers[matmul.weight].const_value
    assert tensor is not None
    weight = tensor.numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    rows = np.array(statistics.rows("language_model", GATE))
    exact = rows @ weight.T
    wrong = rows @ (np.rint(weight / scale) * scale).T - exact
    assert errors[GATE] == pytest.approx(np.linalg.norm(wrong) / np.linalg.norm(exact), rel=1e-3)


def test_errors_follow_the_recipe(statistics: Statistics, matmuls: list[Matmul]) -> None:
    means = {}
    for name in ("w8", "w8a8", "w4"):
        errors = matmul_errors(statistics, matmuls, RECIPES[name])["language_model"]
        assert set(errors) == {matmul.node for matmul in matmuls}
        means[name] = float(np.mean(list(errors.values())))
    assert 0 < means["w8"] < means["w8a8"] < means["w4"] < 0.3
    kept = matmul_errors(statistics, matmuls, RECIPES["w8"].with_float("language_model.layers.0.mlp"))
    assert GATE not in kept["language_model"]
    reduced = matmul_errors(statistics, matmuls, RECIPES["w8"].replace("language_model", reduced_range=True))
    assert reduced["language_model"][GATE] > matmul_errors(statistics, matmuls, RECIPES["w8"])["language_model"][GATE]


def test_a_hostile_matmul_has_the_largest_error(statistics: Statistics, matmuls: list[Matmul], tmp_path: Path) -> None:
    """One channel whose range leaves no levels for the others."""
    shutil.copytree(statistics.folder, tmp_path / "s")
    tensor = statistics.tensors["language_model"][GATE]
    values = np.load(tmp_path / "s" / tensor.absmax)
    np.save(tmp_path / "s" / tensor.absmax, np.where(np.arange(len(values)) == 5, 4096 * values.max(), values))
    hostile = dataclasses.replace(statistics, folder=tmp_path / "s")
    errors = matmul_errors(hostile, matmuls, RECIPE)["language_model"]
    assert max(errors, key=lambda node: errors[node]) in (GATE, UP) and errors[GATE] > 0.5


def test_rounded_weights_lie_on_their_levels() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    weight[2] = 0
    recipe = GraphRecipe(weights="int4", block_size=32)
    four = rounded_weight(weight, "int4", recipe).reshape(6, 2, 32)
    assert max(len(np.unique(block)) for row in four for block in row) <= 16
    eight = rounded_weight(weight, "int8", recipe)
    assert np.abs(eight - weight).max() <= np.abs(weight).max() / 127 / 2 * 1.01
    assert not eight[2].any() and rounded_weight(weight, "float", recipe) is weight
    assert json.dumps(four.tolist())  # finite
