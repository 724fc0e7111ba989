"""Recipes: what a file may contain, how a `base` is merged, and the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_stg.training.recipe import SHIPPED, Lora, Source, read_recipe
from tests.errors import raises

STAGES = "stages: [{name: one, steps: 5, lora: {rank: 4}}, {name: two, steps: 6}]\n"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_mappings_of_a_base_are_merged_and_lists_are_replaced(tmp_path):
    write(
        tmp_path, "base/a.yaml",
        STAGES + "seed: 3\ndata: {queries: 2, sources: [{annotations: [a.jsonl], media: m}], augment: {flip: 0.5}}\n",
    )  # fmt: skip
    write(tmp_path, "b.yaml", "base: base/a.yaml\ndata: {absent: 0.1, augment: {crop: 0.25}}\n")
    middle = read_recipe(tmp_path / "b.yaml")
    assert (middle.seed, middle.data.queries, middle.data.absent) == (3, 2, 0.1)
    assert (middle.data.augment.flip, middle.data.augment.crop) == (0.5, 0.25)
    assert middle.stages[0].lora == Lora(rank=4) and len(middle.stages) == 2
    base = tmp_path / "base"
    assert middle.data.sources == (Source((f"{base}/a.jsonl",), media=f"{base}/m"),)
    top = write(
        tmp_path, "c.yaml",
        "base: b.yaml\nstages: [{name: three, steps: 7}]\nvalidation: {samples: 8}\n"
        "data: {frame_cache: cache, sources: [{annotations: [/c.jsonl]}]}\n",
    )  # fmt: skip
    recipe = read_recipe(top)
    assert [stage.name for stage in recipe.stages] == ["three"] and recipe.stages[0].lora is None
    assert recipe.data.sources == (Source(("/c.jsonl",)),) and recipe.data.queries == 2
    assert recipe.data.frame_cache == str(tmp_path / "cache")
    assert recipe.validation is not None and recipe.validation.samples == 8


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("base: nothing\n", ["a.yaml", "nothing"]),
        ("base: b.yaml\n", ["a.yaml → ", "b.yaml", "its own base"]),
        ("base: a.yaml\n", ["its own base"]),
        ("base: 3\n", ["base is 3"]),
        ("base:\n" + STAGES, ["base is None"]),
        ("- 1\n", ["a.yaml"]),
        (STAGES + "data: 3\n", ["data is 3"]),
        (STAGES + "data: {sources: [3]}\n", ["data.sources[0]"]),
        (STAGES + "data: {sources: [{annotations: x}]}\n", ["data.sources[0].annotations"]),
        (STAGES + "validation: {every: 0}\n", ["validation.every"]),
        ("stages: []\n", ["no stages"]),
        ("stages: [{name: a, steps: 1}, {name: a, steps: 1}]\n", ["same name"]),
        ("stages: [{name: a, steps: 1, train: [head]}]\n", ["stages[0]", "'head'"]),
        ("stages: [{name: a, steps: 1, train: [llm], lora: {}}]\n", ["stages[0]", "llm"]),
        (STAGES + "speed: 1\n", ["unknown field speed"]),
        *((f'stages: [{{name: "{name}", steps: 1}}]\n', ["stages[0]", "name is"])
          for name in ("", "..", "a/b", "/a", "a.best", "a\\nb", "validation", "n" * 51)),
        ("stages: [{name: a, steps: 1, rates: {lllm: 2}}]\n", ["stages[0]", "rates", "'lllm'"]),
        ("stages: [{name: a, steps: 1, betas: [0.9, 1]}]\n", ["stages[0].betas[1]"]),
        ("stages: {2020-01-01: 1}\n", ["stages is", "2020"]),
        (STAGES + 'data: {frame_cache: "a\\0"}\n', ["line 2", "NUL"]),
        ("base: *x\n", ["aliases"]),
    ],
)  # fmt: skip
def test_faults_name_the_file_and_the_field(tmp_path, text, values):
    write(tmp_path, "a.yaml", text)
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    with raises("training.bad_recipe", *values):
        read_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED.glob("*.yaml")))
def test_shipped_recipes_leave_the_data_to_the_user_and_share_steps_over_their_devices(name):
    recipe = read_recipe(name)
    assert recipe.data.sources == () and recipe.validation is None
    assert [stage.name for stage in recipe.stages] == ["new-parts", "lora", "all"]
    assert all(stage.clips % (8 if "8x" in name else 1) == 0 for stage in recipe.stages)
    assert recipe.stages[0].lora is None and recipe.stages[1].lora is not None


def test_an_unknown_name_lists_the_shipped_recipes(tmp_path):
    with raises("training.bad_recipe", "3b", *(file.stem for file in SHIPPED.glob("*.yaml"))):
        read_recipe("3b")
