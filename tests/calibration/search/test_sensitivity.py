"""Ranking by made-up errors and metrics."""

from __future__ import annotations

import math

import pytest

from bridge_stg.calibration.search.sensitivity import Sensitivity, confirm, rank_blocks
from bridge_stg.export.graph.blocks import Matmul


def named(graph: str, block: str, node: str) -> Matmul:
    return Matmul(node, graph, block, "w", "x", 8, 8)


MATMULS = [
    named("vision_encoder", "blocks.0.mlp", "fc1"),
    named("vision_encoder", "blocks.0.mlp", "fc2"),
    named("vision_encoder", "blocks.1.mlp", "fc1b"),
    named("language_model", "layers.0.mlp", "gate"),
]
ERRORS = {"vision_encoder": {"fc1": 0.03, "fc2": 0.04, "fc1b": 0.06}, "language_model": {"gate": 0.01}}


def test_blocks_are_ranked_by_the_error_of_all_their_matmuls() -> None:
    ranked = rank_blocks(MATMULS, ERRORS)
    assert [one.block for one in ranked] == ["blocks.1.mlp", "blocks.0.mlp", "layers.0.mlp"]
    assert ranked[1].proxy == pytest.approx(0.05)


def test_an_error_of_nan_is_the_worst() -> None:
    ranked = rank_blocks(MATMULS, {"language_model": {"gate": math.nan}, **{"vision_encoder": {"fc1b": 0.5}}})
    assert ranked[0].block == "layers.0.mlp" and ranked[0].proxy == math.inf


def test_the_metric_overrules_the_proxy() -> None:
    costs = {"blocks.1.mlp": (0.02, 0.01), "layers.0.mlp": (0.04, 0.3), "blocks.0.mlp": (7.0, 0.5)}
    tried: list[str] = []

    def alone(one: Sensitivity) -> tuple[float, float]:
        tried.append(one.block)
        return costs[one.block]

    ranked = confirm(rank_blocks(MATMULS, ERRORS), alone, count=3)
    assert [one.block for one in ranked] == ["blocks.0.mlp", "layers.0.mlp", "blocks.1.mlp"]
    assert (ranked[0].drop, ranked[0].changed) == (7.0, 0.5)
    assert sorted(tried) == sorted(costs)


def test_the_worst_of_each_graph_is_tried_first() -> None:
    tried: list[str] = []
    ranked = confirm(rank_blocks(MATMULS, ERRORS), lambda one: tried.append(one.block) or (0.0, 0.0), count=2)
    assert tried == ["blocks.1.mlp", "layers.0.mlp"]
    assert [one.block for one in ranked] == ["blocks.1.mlp", "layers.0.mlp", "blocks.0.mlp"]
    assert ranked[-1].drop is None
