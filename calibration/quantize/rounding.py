"""What int8 and int4 leave of a product, without making a graph: rounded rows times rounded weights.

Letters: R sampled rows, K channels that are summed, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bridge_stg.calibration.quantize.packing import INT4_LEAST, INT4_MOST, INT8_LIMIT, REDUCED_LIMIT, int4_scales
from bridge_stg.calibration.recipes import GraphRecipe
from bridge_stg.export.graph.blocks import FLOAT, INT4

LEVELS = 127
"""Activations in symmetric int8 use −127 … 127."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to compute a product in integers.

    Attributes:
        rows: float32 [R, K], what is multiplied instead of the float rows.
        weight: returns what [N, K] is multiplied instead of some rows of the float weight.
    """

    rows: np.ndarray
    weight: Callable[[np.ndarray], np.ndarray] = lambda block: block


def relative_errors(rows: np.ndarray, weights: Iterable[np.ndarray], candidates: Sequence[Candidate]) -> list[float]:
    """Return what each candidate changes in rows · weightᵀ: the root of squares over that of the float product.

    Args:
        rows: float32 [R, K].
        weights: float32 [N, K], whole or in blocks, of one product or several; without any, the error of the rows.
        candidates: to compare.
    """
    right, wrong, some = 0.0, np.zeros(len(candidates)), False
    for block in weights:
        some = True
        exact = rows @ block.T
        right += _energy(exact)
        wrong += [_energy(candidate.rows @ candidate.weight(block).T - exact) for candidate in candidates]
    if not some:
        right, wrong = _energy(rows), np.array([_energy(candidate.rows - rows) for candidate in candidates])
    return [float(error) for error in np.sqrt(wrong / right)] if right else [0.0] * len(candidates)


def rounded_rows(rows: np.ndarray, scale: float) -> np.ndarray:
    """Return what is left of rows in symmetric int8 with one scale."""
    levels = np.rint(rows / np.float32(scale))
    np.clip(levels, -LEVELS, LEVELS, out=levels)
    levels *= np.float32(scale)
    return levels


def rounded_weight(weight: np.ndarray, form: str, recipe: GraphRecipe) -> np.ndarray:
    """Return what is left of a weight float32 [N, K] in a form: `float`, `int8` or `int4`."""
    if form == FLOAT:
        return weight
    if form == INT4:
        blocks = weight.reshape(len(weight), -1, recipe.block_size)
        scales = int4_scales(blocks, np.float32)[..., None]
        return (np.clip(np.rint(blocks / scales), INT4_LEAST, INT4_MOST) * scales).reshape(weight.shape)
    limit = REDUCED_LIMIT if recipe.reduced_range else INT8_LIMIT
    largest = np.abs(weight).max(-1, keepdims=True)
    scales = np.where(largest > 0, largest, 1) / np.float32(limit)
    return np.rint(weight / scales) * scales


def _energy(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float32).sum(dtype=np.float64))
