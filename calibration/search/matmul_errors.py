"""What a recipe does to each product by itself: the cheap proxy of how sensitive a block is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.matmul_weights import ProductWeights
from bridge_stg.calibration.quantize.ranges import TensorRange
from bridge_stg.calibration.quantize.rounding import LEVELS, Candidate, relative_errors, rounded_rows, rounded_weight
from bridge_stg.calibration.recipes import GraphRecipe, Recipe
from bridge_stg.export.graph.blocks import FLOAT, INT8, Matmul


def product_errors(
    statistics: Statistics,
    products: Sequence[Matmul],
    recipe: Recipe,
    *,
    ranges: Mapping[str, Mapping[str, TensorRange]] | None = None,
    smoothing: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the relative error of each product's output on the sampled rows, by graph and node.

    0 where the recipe leaves a product in float; products that no sample reached have none.

    Args:
        statistics: what was collected.
        products: of any of the graphs.
        recipe: what is in integers.
        ranges: of int8 activations; those that are not given are min-max.
        smoothing: vectors [K] by graph and node, as of `smooth`.
        progress: called as progress("errors", done, total).
    """
    weights = ProductWeights(statistics.bundle, statistics.variants)
    report = progress or (lambda stage, done, total: None)
    found: dict[str, dict[str, float]] = {product.graph: {} for product in products}
    for done, product in enumerate(products):
        report("errors", done, len(products))
        graph_recipe = recipe.of(product.graph)
        form = graph_recipe.form_of(product)
        rows = statistics.rows(product.graph, product.node)
        if form == FLOAT or not len(rows):
            found[product.graph] |= {product.node: 0.0} if form == FLOAT else {}
            continue
        vector = (smoothing or {}).get(product.graph, {}).get(product.node, np.ones(1, np.float32))
        multiplied = rows / vector
        if graph_recipe.activations == INT8:
            known = (ranges or {}).get(product.graph, {}).get(product.node)
            largest = float((statistics.absmax(product.graph, product.node) / vector).max())
            multiplied = rounded_rows(multiplied, known.scale if known else (largest or 1.0) / LEVELS)
        candidate = Candidate(multiplied, partial(_rounded, vector=vector, form=form, recipe=graph_recipe))
        (error,) = relative_errors(np.asarray(rows), weights.blocks(product), [candidate])
        found[product.graph][product.node] = error
    report("errors", len(products), len(products))
    return found


def _rounded(block: np.ndarray, *, vector: np.ndarray, form: str, recipe: GraphRecipe) -> np.ndarray:
    return rounded_weight(block * vector, form, recipe)
