"""Estimate the output error of each quantized matmul by itself: a cheap proxy for the sensitivity of its block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.int4 import dequantized
from bridge_stg.calibration.quantize.matmul_weights import MatmulWeights
from bridge_stg.calibration.quantize.rounding import LEVELS, Candidate, relative_errors, rounded_rows, rounded_weight
from bridge_stg.calibration.quantize.scales import Scales
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.export.graph.blocks import FLOAT, INT4, Matmul


def matmul_errors(
    statistics: Statistics,
    matmuls: Sequence[Matmul],
    recipe: Recipe,
    *,
    scales: Scales | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the relative error of each quantized matmul's output on the sampled rows, by graph and node.

    Matmuls that the recipe keeps in float, or that no sample reached, have none. Without `scales`, ranges are min-max.
    """
    weights = MatmulWeights(statistics.bundle, statistics.variants)
    report = progress or (lambda stage, done, total: None)
    known = scales or Scales()
    found: dict[str, dict[str, float]] = {}
    for done, matmul in enumerate(matmuls):
        report("errors", done, len(matmuls))
        graph, node = matmul.graph, matmul.node
        form, rows = recipe.of(graph).form_of(matmul), statistics.rows(graph, node)
        if form == FLOAT or not len(rows):
            continue
        vector = known.smoothing.get(graph, {}).get(node, np.ones(1, np.float32))
        multiplied = rows / vector
        if recipe.of(graph).activations == form:
            range_ = known.ranges.get(graph, {}).get(node)
            largest = float((statistics.absmax(graph, node) / vector).max())
            multiplied = rounded_rows(multiplied, range_.scale if range_ else (largest or 1.0) / LEVELS[form], form)
        blocks: Iterable[np.ndarray] = weights.blocks(matmul)
        rounding: Callable[[np.ndarray], np.ndarray] = partial(
            rounded_weight, form=form, recipe=recipe.of(graph), vector=vector
        )
        if form == INT4 and known.int4 is not None:
            blocks, rounding = [np.concatenate(list(blocks))], partial(_of_all, known.int4.rounded(graph, node))
        (error,) = relative_errors(np.asarray(rows), blocks, [Candidate(multiplied, rounding)])
        found.setdefault(graph, {})[node] = error
    report("errors", len(matmuls), len(matmuls))
    return found


def _of_all(rounded: tuple[np.ndarray, np.ndarray], _: np.ndarray) -> np.ndarray:
    """Return a rounded weight [N, K] in place of the whole one."""
    return dequantized(*rounded).T
