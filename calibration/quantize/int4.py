"""Round weights to int4 so that the outputs of their matmuls with recorded activations change least (GPTQ).

GPTQ (Frantar et al., arXiv 2210.17323): the rows of W [K, N] are rounded one after the other, and the rows that are
left compensate the error of each, with the Cholesky factor of the inverse of XᵀX. Scales of a block are searched by the
error weighted with the mean square of each channel. Without activations, each row is rounded on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.matmul_weights import MatmulWeights
from bridge_stg.calibration.quantize.packing import INT4_LEAST, INT4_MOST, pack_nibbles, storable, unpack_nibbles
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.work_folder import digest, read_arrays
from bridge_stg.export.graph.blocks import Matmul, find_matmuls
from bridge_stg.runtime.host.files import replacing

DIVISORS = tuple(np.arange(6.5, 12.5, 0.5))
"""Candidates for the ratio of a block's largest magnitude to its scale; the one with the least error is used."""

DAMPING = 0.01
"""Share of the mean of XᵀX's diagonal that is added to it."""

STEP = 128
"""Number of rows after which errors are passed on to all that are left."""


class Int4Weights:
    """The int4 weights of one calibration, each rounded once, with its activations, and kept in a folder.

    Args:
        statistics: activation statistics.
        smoothing: vectors [K] by graph and node; activations are divided by them first.
        recipe: gives the block size of each graph.
        folder: folder of the files; it must be named by all that they depend on.
    """

    def __init__(
        self,
        statistics: Statistics,
        smoothing: Mapping[str, Mapping[str, np.ndarray]],
        recipe: Recipe,
        folder: Path,
    ) -> None:
        self._statistics, self._smoothing, self._recipe, self._folder = statistics, smoothing, recipe, folder
        self._weights = MatmulWeights(statistics.bundle, statistics.variants)
        self._matmuls: dict[str, dict[str, Matmul]] = {}
        self._last: tuple[tuple[str, str], tuple[np.ndarray, np.ndarray] | None] | None = None

    def rounded(self, graph: str, node: str) -> tuple[np.ndarray, np.ndarray]:
        """Return levels int8 [K, N] and scales [K / block_size, N] of a smoothed weight, without factors of rows."""
        matmul, size = self._matmul(graph, node), self._recipe.of(graph).block_size
        file = self._folder / f"{digest(graph, node, size)}.npz"
        if (found := self._stored(file, matmul, size)) is None:
            vector = self._vector(graph, node)
            weight = np.concatenate([(block * vector).T for block in self._weights.blocks(matmul)], axis=1)
            dtype = self._weights.dtype(matmul)
            levels, scales = int4_rounded(weight, self.activation(graph, node), block_size=size, dtype=dtype)
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial, partial.open("wb") as stream:
                np.savez(stream, levels=pack_nibbles(levels), scales=scales)
            return levels, scales
        return found

    @staticmethod
    def _stored(file: Path, matmul: Matmul, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return levels and scales as `rounded` wrote them; None if the file is missing or damaged."""
        arrays = read_arrays(file) or {}
        if arrays.keys() != {"levels", "scales"} or arrays["scales"].shape != (-(-matmul.k // size), matmul.n):
            return None
        return unpack_nibbles(arrays["levels"], (matmul.k, matmul.n)), arrays["scales"]

    def _matmul(self, graph: str, node: str) -> Matmul:
        if graph not in self._matmuls:
            self._matmuls[graph] = {m.node: m for m in find_matmuls(self._weights.model(graph), graph)}
        return self._matmuls[graph][node]

    def activation(self, graph: str, node: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return `factors_of` a matmul's smoothed activation, and keep them for the next matmul, which may share it."""
        matmul = self._matmul(graph, node)
        key = graph, matmul.activation
        if self._last is None or self._last[0] != key:
            rows = self._statistics.rows(graph, node)
            self._last = key, factors_of(rows / self._vector(graph, node)) if len(rows) else None
        return self._last[1]

    def _vector(self, graph: str, node: str) -> np.ndarray:
        """Return the smoothing vector [K] of a matmul, or [1] of one that is not smoothed."""
        return self._smoothing.get(graph, {}).get(node, np.ones(1, np.float32))


def factors_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean squares [K] of activations X [R, K], and the upper U with UᵀU = (XᵀX)⁻¹, damped, both float32."""
    rows = np.asarray(rows, np.float32)
    gram = (rows.T @ rows).astype(np.float64)
    squares = np.diag(gram) / len(rows)
    gram[np.diag_indices_from(gram)] += DAMPING * float(np.mean(np.diag(gram))) or 1.0
    # XᵀX = R Rᵀ with R upper, by the lower factor of the reversed matrix; then U = R⁻¹.
    upper = np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    return squares.astype(np.float32), _upper_inverse(upper).astype(np.float32)


def int4_rounded(
    weight: np.ndarray,
    activation: tuple[np.ndarray, np.ndarray] | None,
    *,
    block_size: int,
    dtype: np.dtype | type,
) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight.

    Args:
        weight: float32 [K, N].
        activation: `factors_of` the activation that it is multiplied by; None: unknown.
        block_size: number of values along K that share a scale; divides K.
        dtype: of the scales.

    Returns:
        Levels int8 [K, N], and scales [K / block_size, N].
    """
    left = np.array(weight, np.float32)
    k, n = left.shape
    squares, upper = (np.ones(k, np.float32), None) if activation is None else activation
    levels, scales = np.empty((k, n), np.int8), np.empty((k // block_size, n), dtype)
    for first in range(0, k, max(STEP, block_size)):
        part = left[first : first + max(STEP, block_size)]
        end, errors = first + len(part), np.zeros_like(part)
        for row in range(first, end):
            at = row - first
            if row % block_size == 0:
                block = slice(at, at + block_size)
                scales[row // block_size] = _best_scales(part[block], squares[row : row + block_size], dtype)
                wide = scales[row // block_size].astype(np.float32)
            rounded = np.clip(np.rint(part[at] / wide), INT4_LEAST, INT4_MOST)
            levels[row] = rounded
            if upper is not None:
                errors[at] = (part[at] - rounded * wide) / upper[row, row]
                part[at + 1 :] -= upper[row, row + 1 : end, None] * errors[at]
        if upper is not None:
            left[end:] -= upper[first:end, end:].T @ errors
    return levels, scales


def dequantized(levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the values float32 [K, N] of `int4_rounded`."""
    values: np.ndarray = levels * np.repeat(scales.astype(np.float32), len(levels) // len(scales), axis=0)
    return values


def _best_scales(block: np.ndarray, squares: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """Return the scales [N] of values [block_size, N] with the least squared error, weighted by `squares`."""
    largest = np.abs(block).max(0)
    best, least = storable(largest / DIVISORS[0], dtype), np.full(len(largest), np.inf, np.float32)
    for divisor in DIVISORS:
        scales = storable(largest / divisor, dtype)
        wide = scales.astype(np.float32)
        errors = squares @ np.square(np.clip(np.rint(block / wide), INT4_LEAST, INT4_MOST) * wide - block)
        best, least = np.where(errors < least, scales, best), np.minimum(errors, least)
    return best


def _upper_inverse(upper: np.ndarray) -> np.ndarray:
    """Return the inverse of an upper triangular matrix by halves, three times as fast as that of any matrix."""
    size = len(upper)
    if size <= STEP:
        return np.linalg.inv(upper)
    half = size // 2
    first, last = _upper_inverse(upper[:half, :half]), _upper_inverse(upper[half:, half:])
    inverse = np.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ (upper[:half, half:] @ last)
    return inverse
