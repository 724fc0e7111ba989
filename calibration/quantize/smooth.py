"""Choose how much of an activation's outliers moves into the weights that read it.

Activations X are divided by s, and weight columns multiplied by it. Where both are quantized, SmoothQuant (Xiao et al.,
arXiv 2211.10438) sets s = max|X|^a / max|W|^(1-a) per channel. Where only weights are, AWQ (Lin et al., arXiv
2306.00978) sets s = mean|X|^a: important channels get finer steps. The migration strength a is searched for each group
of matmuls that share X, by the error of their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.overrides import Overrides
from bridge_stg.calibration.quantize.matmul_weights import MatmulWeights
from bridge_stg.calibration.quantize.ranges import CUT_OFFS
from bridge_stg.calibration.quantize.rounding import LEVELS, Candidate, relative_errors, rounded_rows, rounded_weight
from bridge_stg.calibration.quantize.smoothing_groups import SmoothingGroup, smoothing_groups
from bridge_stg.calibration.recipes import GraphRecipe, Recipe
from bridge_stg.export.graph.blocks import FLOAT, INT8

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEARCH_ROWS = 256
"""Maximum number of rows that the search uses."""

GAIN = 0.98
"""Smoothing must lower the error to this share, or it is not used."""

SPREAD = 1e4
"""Largest ratio of a channel's divisor to the median one: a divided tensor may be stored in fp16."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Divisors of activations, float32 [K], and migration strengths, by graph and node of the smoothed matmuls."""

    vectors: Mapping[str, Mapping[str, np.ndarray]]
    strengths: Mapping[str, Mapping[str, float]]


def choose_smoothing(
    statistics: Statistics,
    recipe: Recipe,
    *,
    overrides: Overrides | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Smoothing:
    """Search the migration strengths of the graphs that are smoothed; groups that nothing would gain are skipped."""
    weights = MatmulWeights(statistics.bundle, statistics.variants)
    report = progress or (lambda stage, done, total: None)
    strength_of = (overrides or Overrides()).strength_of
    groups: list[tuple[str, SmoothingGroup]] = []
    for graph, graph_recipe in recipe.graphs.items():
        if graph_recipe.smooth:
            found = smoothing_groups(weights.model(graph), graph)
            form = graph_recipe.weights
            groups += [(graph, g) for g in found if any(graph_recipe.form_of(m) == form for m in g.matmuls)]
    vectors: dict[str, dict[str, np.ndarray]] = {graph: {} for graph in recipe.graphs}
    strengths: dict[str, dict[str, float]] = {graph: {} for graph in recipe.graphs}
    for done, (graph, group) in enumerate(groups):
        report("smoothing", done, len(groups))
        forced = next((s for s in map(strength_of, group.nodes) if s is not None), None)
        chosen = None if forced == 0 else _search(statistics, weights, group, recipe.of(graph), forced)
        if chosen is not None:
            strength, vector = chosen
            vectors[graph] |= dict.fromkeys(group.nodes, vector)
            strengths[graph] |= dict.fromkeys(group.nodes, strength)
    report("smoothing", len(groups), len(groups))
    return Smoothing(vectors, strengths)


def smoothing_vector(activation: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    """Return s as float32 [K] with median 1; it is 1 in channels where activations or weights are all zero.

    `activation` and `weight`, [K], are the magnitudes of the activation's channels and of the weights' columns.
    """
    live = (activation > 0) & (weight > 0)
    logs = np.zeros(len(activation))
    logs[live] = strength * np.log(activation[live]) - (1 - strength) * np.log(weight[live])
    if live.any():
        logs[live] -= np.median(logs[live])
    return np.exp(np.clip(logs, -np.log(SPREAD), np.log(SPREAD))).astype(np.float32)


def _search(
    statistics: Statistics,
    weights: MatmulWeights,
    group: SmoothingGroup,
    recipe: GraphRecipe,
    forced: float | None,
) -> tuple[float, np.ndarray] | None:
    """Return strength and vector of a group; None if smoothing does not help."""
    matmuls, graph, node = group.matmuls, group.matmuls[0].graph, group.nodes[0]
    rows = statistics.rows(graph, node)
    if not len(rows):
        return None
    rows = np.array(rows[:: -(-len(rows) // SEARCH_ROWS)], np.float32)
    absmax = statistics.absmax(graph, node)
    methods: tuple[str, ...] = ("",) if recipe.activations == FLOAT else ("minmax", "mse")
    if recipe.activations == FLOAT:
        sizes, columns = np.abs(rows).mean(0), np.ones(len(absmax), np.float32)
    else:
        sizes = absmax
        columns = np.max([np.abs(block).max(0) for m in matmuls for block in weights.blocks(m)], axis=0)
    strengths = STRENGTHS if forced is None else (forced,)
    vectors = [np.ones(len(absmax), np.float32), *(smoothing_vector(sizes, columns, s) for s in strengths)]
    candidates = [_candidate(rows, absmax, vector, method, recipe) for vector in vectors for method in methods]
    blocks = (block for matmul in matmuls for block in weights.blocks(matmul))
    errors = np.reshape(relative_errors(rows, blocks, candidates), (-1, len(methods))).min(1)
    best = 1 + int(np.argmin(errors[1:]))
    if forced is None and not errors[best] <= GAIN * errors[0]:
        return None
    return strengths[best - 1], vectors[best]


def _candidate(rows: np.ndarray, absmax: np.ndarray, vector: np.ndarray, method: str, recipe: GraphRecipe) -> Candidate:
    smooth, largest = rows / vector, float((absmax / vector).max())
    rounding = partial(rounded_weight, form=recipe.weights, recipe=recipe, vector=vector)
    if not method:  # activations stay in float
        return Candidate(smooth, rounding)
    cut = min(CUT_OFFS[method](smooth, largest), largest) if largest else 1.0
    return Candidate(rounded_rows(smooth, cut / LEVELS[INT8]), rounding)
