"""Estimates of memory and hours: sizes that can be counted by hand, and what they depend on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from bridge_stg.checkpoint.checkpoint import build_model
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.runtime.device.table import GPUS
from bridge_stg.training.estimate.estimate import clip_shape, estimate
from bridge_stg.training.parts import part_of
from bridge_stg.training.recipe import NEW_PARTS, DataRecipe, Lora, Stage, TrainingRecipe
from tests.bridge_stg.model.tiny_model import tiny_config
from tests.errors import raises

ALL = ("bridging", "spatial", "mergers", "llm", "vision")
DATA = DataRecipe(queries=2, fine_frames=4)


def one(stage: Stage, config: BridgeSTGConfig | None = None, **options):
    recipe = TrainingRecipe((dataclasses.replace(stage),), DATA)
    return estimate(config or tiny_config(), recipe, **{"longest_s": 4.0, "mean_s": 4.0} | options).stages[0]


def parameters() -> dict[str, torch.nn.Parameter]:
    with torch.device("meta"):
        return dict(build_model(tiny_config(), where=Path()).named_parameters())


def test_weights_gradients_and_moments_are_those_of_the_trained_parts():
    frozen = [value for name, value in parameters().items() if part_of(name) not in NEW_PARTS]
    total = sum(value.numel() for value in parameters().values())
    new = total - sum(value.numel() for value in frozen)
    stage = one(Stage("a", 1))
    assert stage.trained == new
    assert stage.weights == 4 * new + sum((2 if value.ndim > 1 else 4) * value.numel() for value in frozen)
    assert (stage.gradients, stage.optimizer) == (4 * new, 8 * new)
    full = one(Stage("a", 1, train=ALL, ema=0.9))
    assert full.weights == full.gradients == 4 * total and full.optimizer == 8 * total + 4 * new
    assert one(Stage("a", 1, optimizer="adamw8bit")).optimizer == 2 * new
    assert full.peak >= full.weights + full.optimizer + full.activations


def test_adapters_are_counted():
    config = tiny_config().backbone_config().text_config
    rank, layers, hidden = 2, config.num_hidden_layers, config.hidden_size
    stage = one(Stage("a", 1, lora=Lora(rank=rank, modules=("gate_proj", "up_proj"))))
    assert stage.trained - one(Stage("a", 1)).trained == layers * 2 * rank * (hidden + config.intermediate_size)


def test_recomputation_keeps_less_and_computes_more():
    kept = one(Stage("a", 1, train=ALL))
    recomputed = one(Stage("a", 1, train=ALL, checkpoint_activations=True))
    assert recomputed.activations < 0.6 * kept.activations and recomputed.peak < kept.peak
    assert 1.1 < recomputed.operations / kept.operations < 1.4


def test_longer_clips_take_more_memory_and_hours():
    stage = Stage("a", 100, train=ALL, clips=2)
    short, long = (one(stage, gpu="l4", longest_s=s, mean_s=s) for s in (2.0, 6.0))
    assert short.activations < long.activations and short.hours < long.hours
    mixed = one(stage, gpu="l4", longest_s=6.0, mean_s=2.0)
    assert mixed.peak == long.peak and mixed.hours == pytest.approx(short.hours, rel=0.3)


def test_devices_share_the_work_and_sharding_the_weights():
    stage = Stage("a", 100, train=ALL, clips=8)
    single = one(stage, gpu="h100-80g")
    replicated, sharded = (one(stage, gpu="h100-80g", devices=4, sharded=shard) for shard in (False, True))
    assert replicated.hours == sharded.hours == pytest.approx(single.hours / 4)
    assert replicated.weights == single.weights and replicated.gradients == 2 * single.gradients
    one_clip = one(dataclasses.replace(stage, clips=4), devices=4, sharded=True)
    assert one_clip.peak == sharded.peak  # gradients are reduced after each clip
    assert sharded.weights == single.weights // 4 and sharded.optimizer == single.optimizer // 4
    assert single.hours == pytest.approx(100 * single.operations / (0.3 * GPUS["h100-80g"].peaks["fp16"]) / 3600)


def test_the_table_says_what_does_not_fit(monkeypatch):
    recipe = TrainingRecipe((Stage("first", 1), Stage("second", 1, train=ALL)), DATA)
    found = estimate(tiny_config(), recipe, gpu="l4", longest_s=2.0)
    assert all(found.fits(stage) for stage in found.stages)
    assert "first" in found.table() and "second" in found.table() and "too much" not in found.table()
    large = dataclasses.replace(found.stages[1], peak=24 * 10**9)
    assert "24.0 GB (too much)" in dataclasses.replace(found, stages=(found.stages[0], large)).table()
    unknown = estimate(tiny_config(), recipe, longest_s=2.0)
    assert unknown.fits(unknown.stages[0]) is None and unknown.stages[0].hours is None


def test_clip_shapes_follow_the_rules_of_the_runtime():
    spec = tiny_config().model_spec()
    longest = clip_shape(spec, DATA, math.inf, (480, 640))
    assert longest.groups == spec.frames.max_coarse_groups and longest.fine_frames == 4
    side = spec.vision.patch_size * spec.vision.merge_size
    few = clip_shape(spec, dataclasses.replace(DATA, max_visual_tokens=longest.groups), math.inf, (480, 640))
    assert few.groups * few.coarse[0] * few.coarse[1] // side**2 <= longest.groups


def test_a_stage_that_does_not_fit_the_model_is_an_error():
    with raises("training.bad_recipe", "no_such_layer"):
        one(Stage("a", 1, lora=Lora(modules=("no_such_layer",))))
