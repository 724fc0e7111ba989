"""Recipes reject combinations that no backend runs; overrides are read from and written to YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge_stg.calibration.inputs import requested_recipe
from bridge_stg.calibration.options import Options
from bridge_stg.calibration.overrides import Overrides, read_overrides, write_overrides
from bridge_stg.calibration.recipes import RECIPES, GraphRecipe, Recipe
from bridge_stg.export.graph.blocks import Matmul
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.typed_json import from_json
from tests.errors import raises

BLOCK = "language_model.layers.1.mlp"


def test_defaults() -> None:
    assert {name: recipe.of("language_model").name for name, recipe in RECIPES.items()} == {
        "w8a8": "w8a8", "w8": "w8", "w4": "w4", "fp8": "fp8", "nvfp4": "nvfp4",
    }  # fmt: skip
    for recipe in RECIPES.values():
        vision = "fp8" if recipe.name in ("fp8", "nvfp4") else "w8a8"
        assert recipe.of("vision_encoder").name == vision and not recipe.of("spatial_decoder").quantizes
        assert recipe.of("language_model").embedding == "int8"
    kv8 = RECIPES["w4"].replace("language_model", cache="int8")
    assert kv8.of("language_model").precision("fp32") == "int4 w4-kv8"
    assert RECIPES["w8a8"].of("vision_encoder").precision("fp16") == "int8 w8a8 fp16"
    assert GraphRecipe().precision("fp16") == "fp16"
    assert RECIPES["nvfp4"].of("language_model").precision("fp16") == "nvfp4 nvfp4 fp16"
    assert kv8.with_graph("language_model", "w8").of("language_model").name == "w8-kv8"


def test_weights_for_decoding_are_for_onnxruntime_on_cpu(exported: Bundle) -> None:
    def asked(backends: tuple[str, ...], form: bool | None) -> bool | None:
        options = Options(backends=backends, decode_form=form)
        return requested_recipe(options, Overrides(), exported).of("language_model").decode_form

    cpu, gpu = ("onnxruntime-cpu",), ("tensorrt-10",)
    assert [asked(cpu, form) for form in (None, True, False)] == [None, True, False]
    assert asked(gpu, None) is False and asked((*cpu, *gpu), True) is True
    with raises("options.conflict", "--decode-form", "tensorrt-10"):
        asked(gpu, True)


def test_stored_forms() -> None:
    recipe = GraphRecipe(weights="int4", block_size=32, keep_float=(BLOCK,))

    def form(node: str, block: str, k: int) -> str:
        return recipe.form_of(Matmul(node, "language_model", block, "w", "x", k, 8))

    assert form("a", "language_model.layers.0.mlp", 64) == "int4"
    assert form("a", BLOCK, 64) == "float"
    assert form("a", "language_model.lm_head", 64) == "int8"
    assert form("a", "language_model.layers.0.mlp", 48) == "int8"  # not a multiple of the block size


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"weights": "int2"}, "weights is 'int2'"),
        ({"weights": "int4", "activations": "int8"}, "'int4'"),
        ({"block_size": 24}, "block_size is 24"),
        ({"weights": "nvfp4"}, "nvfp4 weights need nvfp4 activations"),
        ({"weights": "fp8", "activations": "int8"}, "int8 activations need int8 weights"),
        ({"weights": "mxfp8", "activations": "mxfp8"}, "'mxfp8'"),
        ({"cache": "fp8"}, "cache is 'fp8'"),
    ],
)
def test_invalid_recipes(fields: dict[str, object], value: str) -> None:
    with raises("calibration.bad_recipe", value):
        GraphRecipe(**fields)  # type: ignore[arg-type]


def test_as_json() -> None:
    recipe = RECIPES["w8a8"].with_float(BLOCK, "vision_encoder.merger").with_float(BLOCK)
    assert recipe.of("language_model").keep_float == (BLOCK,)
    assert from_json(Recipe, json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_unknown_names() -> None:
    with raises("calibration.unknown_block", "decoder.0", "vision_encoder"):
        RECIPES["w8"].with_float("decoder.0")
    with raises("calibration.bad_recipe", "vision_encoder", "'w2'", "float, w8a8"):
        RECIPES["w8"].with_graph("vision_encoder", "w2")


def test_overrides_round_trip(tmp_path: Path) -> None:
    node = f"model.{BLOCK}.down_proj/MatMul"
    overrides = Overrides((BLOCK,), {BLOCK: "mse", node: "percentile"}, {BLOCK: 0.5})
    write_overrides(tmp_path / "o.yaml", overrides)
    assert read_overrides(tmp_path / "o.yaml") == overrides
    assert (tmp_path / "o.yaml").read_text().startswith("# Overrides of a calibration. Edit")
    assert overrides.method_of(node) == "percentile" and overrides.strength_of(node) == 0.5
    assert overrides.method_of(f"model.{BLOCK}.up_proj/MatMul") == "mse"
    assert overrides.method_of("lm_head/MatMul") is None
    assert set(overrides.names) == {BLOCK, node}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("keep_float: [", ["YAML"]),
        ("keep: []", ["'keep'", "keep_float, methods, smoothing"]),
        ("- a", ["list"]),
        ("keep_float: language_model.lm_head", ["keep_float is 'language_model.lm_head'"]),
        ("keep_float: false", ["keep_float is False"]),
        ("keep_float: [a, a]", ["['a', 'a']"]),
        (f"smoothing: {{{BLOCK}: .nan}}", ["is nan"]),
        (f"methods: {{{BLOCK}: best}}", [BLOCK, "'best'", "minmax"]),
        (f"smoothing: {{{BLOCK}: 2}}", [BLOCK, "is 2"]),
    ],
)
def test_invalid_overrides(tmp_path: Path, text: str, values: list[str]) -> None:
    (tmp_path / "o.yaml").write_text(text)
    with raises("calibration.bad_overrides", "o.yaml", *values):
        read_overrides(tmp_path / "o.yaml")


def test_overrides_of_an_unknown_graph(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("keep_float: [layers.0]")
    with raises("calibration.unknown_block", "layers.0"):
        read_overrides(tmp_path / "o.yaml")


def test_an_empty_file_overrides_nothing(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("# nothing\n")
    assert read_overrides(tmp_path / "o.yaml") == Overrides()
