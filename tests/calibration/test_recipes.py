"""Recipes refuse what no engine runs; overrides are a file that a person edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge_stg.calibration.recipes import (
    RECIPES,
    GraphRecipe,
    Overrides,
    Recipe,
    read_overrides,
    write_overrides,
)
from bridge_stg.export.graph.blocks import Matmul
from bridge_stg.runtime.errors import BridgeError

BLOCK = "language_model.layers.1.mlp"


def test_defaults() -> None:
    assert {name: recipe.of("language_model").name for name, recipe in RECIPES.items()} == {
        "w8a8": "w8a8", "w8": "w8", "w4": "w4",
    }  # fmt: skip
    for recipe in RECIPES.values():
        assert recipe.of("vision_encoder").name == "w8a8" and not recipe.of("spatial_decoder").quantizes
        assert recipe.of("language_model").embedding == "int8"
    kv8 = RECIPES["w4"].with_int8_cache()
    assert kv8.of("language_model").precision("fp32") == "int4 w4-kv8"
    assert RECIPES["w8a8"].of("vision_encoder").precision("fp16") == "int8 w8a8 fp16"
    assert GraphRecipe().precision("fp16") == "fp16"
    assert kv8.with_graph("language_model", "w8").of("language_model").name == "w8-kv8"


def test_what_is_stored_how() -> None:
    recipe = GraphRecipe(weights="int4", block_size=32, keep_float=(BLOCK,))

    def form(node: str, block: str, k: int) -> str:
        return recipe.form_of(Matmul(node, "language_model", block, "w", "x", k, 8))

    assert form("a", "language_model.layers.0.mlp", 64) == "int4"
    assert form("a", BLOCK, 64) == "float"
    assert form("a", "language_model.lm_head", 64) == "int8"
    assert form("a", "language_model.layers.0.mlp", 48) == "int8"  # no whole number of blocks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int2"}, "weights is 'int2'; expected one of: float, int8, int4"),
        ({"weights": "int4", "activations": "int8"}, "int8 activations need int8 weights, and these are int4"),
        ({"block_size": 24}, "block_size is 24; expected one of: 16, 32"),
    ],
)
def test_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        GraphRecipe(**fields)  # type: ignore[arg-type]


def test_as_json() -> None:
    recipe = RECIPES["w8a8"].with_float(BLOCK, "vision_encoder.merger").with_float(BLOCK)
    assert recipe.of("language_model").keep_float == (BLOCK,)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_unknown_names() -> None:
    with pytest.raises(BridgeError, match="block 'decoder.0': its name must begin with one of: vision_encoder"):
        RECIPES["w8"].with_float("decoder.0")
    with pytest.raises(BridgeError, match="recipe of vision_encoder: 'w2' is unknown; expected one of: float, w8a8"):
        RECIPES["w8"].with_graph("vision_encoder", "w2")


def test_overrides_come_back(tmp_path: Path) -> None:
    node = f"model.{BLOCK}.down_proj/MatMul"
    overrides = Overrides((BLOCK,), {BLOCK: "mse", node: "percentile"}, {BLOCK: 0.5})
    write_overrides(tmp_path / "o.yaml", overrides)
    assert read_overrides(tmp_path / "o.yaml") == overrides
    assert (tmp_path / "o.yaml").read_text().startswith("# Overrides of a calibration. Edit")
    assert overrides.method_of(node) == "percentile" and overrides.strength_of(node) == 0.5
    assert overrides.method_of(f"model.{BLOCK}.up_proj/MatMul") == "mse"
    assert overrides.method_of("lm_head/MatMul") is None
    assert overrides.apply(RECIPES["w8"]).of("language_model").keep_float == (BLOCK,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_float: [", "cannot be read as YAML"),
        ("keep: []", "found 'keep'; expected a mapping with the keys keep_float, methods, smoothing"),
        ("- a", "found list; expected a mapping"),
        ("keep_float: language_model.lm_head", "keep_float is 'language_model.lm_head'; expected a list"),
        ("keep_float: [layers.0]", "block 'layers.0': its name must begin with"),
        (f"methods: {{{BLOCK}: best}}", f"methods: {BLOCK} is 'best'; expected one of: minmax"),
        (f"smoothing: {{{BLOCK}: 2}}", f"smoothing: {BLOCK} is 2; expected a number from 0 to 1"),
    ],
)
def test_overrides_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(BridgeError, match=message):
        read_overrides(tmp_path / "o.yaml")


def test_an_empty_file_overrides_nothing(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("# nothing\n")
    assert read_overrides(tmp_path / "o.yaml") == Overrides()
