"""Emulate a quantized matmul in numpy: rounded rows times rounded weights.

R = sampled rows, K = summed channels, N = outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bridge_stg.calibration.quantize.packing import (
    FP8_LIMIT,
    INT4_LEAST,
    INT4_MOST,
    INT8_LIMIT,
    NVFP4_LIMIT,
    REDUCED_LIMIT,
    fp8,
    nvfp4,
)
from bridge_stg.calibration.recipes import GraphRecipe
from bridge_stg.export.graph.blocks import FLOAT, FP8, INT4, INT8, NVFP4

LEVELS = {INT8: INT8_LIMIT, FP8: FP8_LIMIT, NVFP4: NVFP4_LIMIT}
"""Largest magnitude of an activation in units of its scale, by form; symmetric int8 uses −127 … 127."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to quantize a matmul: rows float32 [R, K], and a function of blocks of rows of the weight [N, K]."""

    rows: np.ndarray
    weight: Callable[[np.ndarray], np.ndarray] = lambda block: block


def relative_errors(rows: np.ndarray, weights: Iterable[np.ndarray], candidates: Sequence[Candidate]) -> list[float]:
    """Return the relative error of each candidate in rows · weightᵀ, as ratio of Frobenius norms.

    `weights` are float32 [N, K] of one or more matmuls, whole or in blocks; without any, it is the error of the rows.
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


def rounded_rows(rows: np.ndarray, scale: float, form: str = INT8) -> np.ndarray:
    """Return rows float32 after rounding to a form with one scale."""
    if form == FP8:
        return fp8(rows / np.float32(scale)).astype(np.float32) * np.float32(scale)
    if form == NVFP4:
        return _nvfp4_rows(rows, scale)
    levels = np.rint(rows / np.float32(scale))
    np.clip(levels, -INT8_LIMIT, INT8_LIMIT, out=levels)
    levels *= np.float32(scale)
    return levels


def rounded_weight(weight: np.ndarray, form: str, recipe: GraphRecipe, vector: np.ndarray | None = None) -> np.ndarray:
    """Return a weight float32 [N, K] times `vector` [K] after rounding to the nearest of a form.

    This is how all forms are stored, except `int4`, which `int4.Int4Weights` rounds better.
    """
    weight = weight if vector is None else weight * vector
    if form == FLOAT:
        return weight
    if form == INT4:
        blocks = weight.reshape(len(weight), -1, recipe.block_size)
        largest = np.abs(blocks).max(-1, keepdims=True)
        scales = np.where(largest > 0, largest, 1) / np.float32(INT4_MOST)
        four: np.ndarray = (np.clip(np.rint(blocks / scales), INT4_LEAST, INT4_MOST) * scales).reshape(weight.shape)
        return four
    if form == NVFP4:
        return _nvfp4_rows(weight, float(np.abs(weight).max()) / NVFP4_LIMIT or 1.0)
    limit = FP8_LIMIT if form == FP8 else REDUCED_LIMIT if recipe.reduced_range else INT8_LIMIT
    largest = np.abs(weight).max(-1, keepdims=True)
    scales = np.where(largest > 0, largest, 1) / np.float32(limit)
    if form == FP8:
        eight: np.ndarray = fp8(weight / scales).astype(np.float32) * scales
        return eight
    rounded: np.ndarray = np.rint(weight / scales) * scales
    return rounded


def _nvfp4_rows(rows: np.ndarray, scale: float) -> np.ndarray:
    levels, scales = nvfp4(np.asarray(rows, np.float32), scale)
    wide = np.repeat(scales.astype(np.float32) * np.float32(scale), rows.shape[-1] // scales.shape[-1], axis=-1)
    values: np.ndarray = levels.astype(np.float32) * wide
    return values


def _energy(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float32).sum(dtype=np.float64))
