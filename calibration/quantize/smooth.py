"""How much of an activation's outliers moves into the weights behind it (SmoothQuant, Xiao et al., arXiv 2211.10438).

Activations X are divided by s and weights' columns multiplied by it: s = max|X|^a / max|W|^(1-a), channel by channel.
The migration strength a is searched for each group of products that share X, by the error of their outputs in int8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.matmul_weights import ProductWeights
from bridge_stg.calibration.quantize.ranges import CUT_OFFS
from bridge_stg.calibration.quantize.rounding import LEVELS, Candidate, relative_errors, rounded_rows, rounded_weight
from bridge_stg.calibration.quantize.smoothing_groups import SmoothingGroup, smoothing_groups
from bridge_stg.calibration.recipes import GraphRecipe, Overrides, Recipe
from bridge_stg.export.graph.blocks import INT8

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEARCH_ROWS = 256
"""Rows that the search looks at."""

GAIN = 0.98
"""Smoothing must lower the error to this share, or it is left out."""

SPREAD = 1e4
"""Largest ratio of two channels' divisors to the middle one: what is divided may be stored in fp16."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """What is moved where.

    Attributes:
        vectors: graph → node of a product → float32 [K], what its activation is divided by. Nodes that are not named
            are left as they are.
        strengths: graph → node → migration strength, of the same nodes.
        errors: graph → node → the group's relative output error before and after.
    """

    vectors: Mapping[str, Mapping[str, np.ndarray]]
    strengths: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, tuple[float, float]]]


def choose_smoothing(
    statistics: Statistics,
    recipe: Recipe,
    *,
    overrides: Overrides | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Smoothing:
    """Search the migration strengths of a recipe's graphs with int8 activations that may be smoothed.

    Args:
        statistics: what was collected.
        recipe: groups whose products all stay float are left alone.
        overrides: strengths that a person asks for; 0 leaves a group alone.
        progress: called as progress("smoothing", done, total).
    """
    weights = ProductWeights(statistics.bundle, statistics.variants)
    report = progress or (lambda stage, done, total: None)
    asked = (overrides or Overrides()).strength_of
    groups: list[tuple[str, SmoothingGroup]] = []
    for graph, graph_recipe in recipe.graphs.items():
        if graph_recipe.smooth and graph_recipe.activations == INT8:
            found = smoothing_groups(weights.model(graph), graph)
            groups += [(graph, g) for g in found if any(p.block not in graph_recipe.keep_float for p in g.products)]
    vectors: dict[str, dict[str, np.ndarray]] = {graph: {} for graph in recipe.graphs}
    strengths: dict[str, dict[str, float]] = {graph: {} for graph in recipe.graphs}
    errors: dict[str, dict[str, tuple[float, float]]] = {graph: {} for graph in recipe.graphs}
    for done, (graph, group) in enumerate(groups):
        report("smoothing", done, len(groups))
        forced = next((s for s in map(asked, group.nodes) if s is not None), None)
        chosen = None if forced == 0 else _search(statistics, weights, graph, group, recipe.of(graph), forced)
        if chosen is not None:
            strength, vector, before_after = chosen
            vectors[graph] |= dict.fromkeys(group.nodes, vector)
            strengths[graph] |= dict.fromkeys(group.nodes, strength)
            errors[graph] |= dict.fromkeys(group.nodes, before_after)
    report("smoothing", len(groups), len(groups))
    return Smoothing(vectors, strengths, errors)


def smoothing_vector(activation: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    """Return s float32 [K], its middle at 1; channels in which nothing flows or nothing is read are not touched.

    Args:
        activation: the largest magnitudes [K] of the activation.
        weight: those of the weights' columns.
        strength: how much moves, 0 … 1.
    """
    live = (activation > 0) & (weight > 0)
    logs = np.zeros(len(activation))
    logs[live] = strength * np.log(activation[live]) - (1 - strength) * np.log(weight[live])
    if live.any():
        logs[live] -= np.median(logs[live])
    return np.exp(np.clip(logs, -np.log(SPREAD), np.log(SPREAD))).astype(np.float32)


def _search(
    statistics: Statistics,
    weights: ProductWeights,
    graph: str,
    group: SmoothingGroup,
    recipe: GraphRecipe,
    forced: float | None,
) -> tuple[float, np.ndarray, tuple[float, float]] | None:
    """Return (strength, vector, errors before and after) of a group; None where it is better left alone."""
    node, products = group.nodes[0], group.products
    rows = statistics.rows(graph, node)
    if not len(rows):
        return None
    rows = np.array(rows[:: -(-len(rows) // SEARCH_ROWS)], np.float32)
    absmax = statistics.absmax(graph, node)
    columns = np.max([np.abs(block).max(0) for p in products for block in weights.blocks(p)], axis=0)
    strengths = STRENGTHS if forced is None else (forced,)
    vectors = [np.ones(len(absmax), np.float32), *(smoothing_vector(absmax, columns, s) for s in strengths)]
    candidates = [_candidate(rows, absmax, vector, cut, recipe) for vector in vectors for cut in ("minmax", "mse")]
    blocks = (block for product in products for block in weights.blocks(product))
    errors = np.reshape(relative_errors(rows, blocks, candidates), (-1, 2)).min(1)
    best = 1 + int(np.argmin(errors[1:]))
    if forced is None and not errors[best] <= GAIN * errors[0]:
        return None
    return strengths[best - 1], vectors[best], (float(errors[0]), float(errors[best]))


def _candidate(rows: np.ndarray, absmax: np.ndarray, vector: np.ndarray, method: str, recipe: GraphRecipe) -> Candidate:
    smooth, largest = rows / vector, float((absmax / vector).max())
    cut = min(CUT_OFFS[method](smooth, largest), largest) if largest else 1.0
    return Candidate(rounded_rows(smooth, cut / LEVELS), partial(_rounded_columns, vector=vector, recipe=recipe))


def _rounded_columns(block: np.ndarray, *, vector: np.ndarray, recipe: GraphRecipe) -> np.ndarray:
    return rounded_weight(block * vector, recipe.weights, recipe)
