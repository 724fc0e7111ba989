"""Choose the range of each activation, by the method with the least error in the matmuls that read it.

Min-max keeps the largest value; percentile, entropy (Migacz, GTC 2017, as in onnxruntime) and MSE clip rare values, so
that the others get finer steps in int8. Floating forms have them anyway: their ranges are min-max unless forced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.overrides import Overrides
from bridge_stg.calibration.quantize.matmul_weights import MatmulWeights
from bridge_stg.calibration.quantize.rounding import LEVELS, Candidate, relative_errors, rounded_rows
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.export.graph.blocks import INT8, Matmul, shared_activations
from bridge_stg.runtime.errors import BridgeError

PERCENTILE = 99.99
ENTROPY_BINS, ENTROPY_LEVELS = 512, 128
ENTROPY_VALUES = 2**19
MSE_STEPS = 40
"""Number of cut-offs that MSE tries, evenly up to the largest value."""

GAIN = 0.98
"""A cut-off must lower the error to this share of min-max's: the sampled rows may miss rare values."""


@dataclass(frozen=True)
class TensorRange:
    """Symmetric range of one tensor: value ≈ scale · q, q in −127 … 127 for int8 (see `rounding.LEVELS`).

    Attributes:
        scale: step size, above 0.
        method: method that chose it, one of `options.METHODS`.
        absmax: largest collected magnitude.
        error: relative error (ratio of Frobenius norms) of the output of the matmuls that read the tensor, on the
            sampled rows, if only the tensor is quantized; error of the tensor itself if no matmul reads it.
    """

    scale: float
    method: str
    absmax: float
    error: float


def choose_ranges(
    statistics: Statistics,
    matmuls: Sequence[Matmul],
    *,
    method: str | None = None,
    overrides: Overrides | None = None,
    smoothing: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[str, dict[str, TensorRange]]:
    """Return the range of each matmul's activation, and of keys and values, by graph and node.

    Matmuls that share an activation share its range. Keys and values have the names of the graph's inputs
    (past_key_0 …). Tensors that no sample reached have no range.

    Args:
        statistics: activation statistics.
        matmuls: matmuls of any of the graphs.
        method: one of `options.METHODS` for all; None: per tensor the one with the least error.
        overrides: manual methods of blocks, matmuls, or past_key_0 …; they take precedence.
        smoothing: vectors [K] by graph and node, see `smooth`; activations are divided by them first.
        recipe: gives the form of each graph's activations; None: int8.
        progress: called as progress("ranges", done, total).

    Raises:
        BridgeError: the method is unknown, or the statistics are those of another model.
    """
    if method is not None and method not in CUT_OFFS:
        what = f"the method of ranges is {method!r}; expected one of: {', '.join(CUT_OFFS)}."
        raise BridgeError("calibration.bad_recipe", what)
    groups = shared_activations(matmuls)
    found: dict[str, dict[str, TensorRange]] = {graph: {} for graph in statistics.tensors}
    caches = [(graph, name) for graph in found for name in statistics.caches(graph)]
    total, method_of = len(groups) + len(caches), (overrides or Overrides()).method_of
    report = progress or (lambda stage, done, total: None)
    weights = MatmulWeights(statistics.bundle, statistics.variants)
    for done, group in enumerate(groups):
        report("ranges", done, total)
        graph, nodes = group[0].graph, [matmul.node for matmul in group]
        rows, absmax = statistics.rows(graph, nodes[0]), statistics.absmax(graph, nodes[0])
        if not len(rows):
            continue
        vector = (smoothing or {}).get(graph, {}).get(nodes[0], np.ones(1, np.float32))
        forced = next((name for name in map(method_of, nodes) if name), method)
        blocks = (block * vector for matmul in group for block in weights.blocks(matmul))
        form = INT8 if recipe is None else recipe.of(graph).activations
        one = range_of(rows / vector, absmax / vector, method=forced, weights=blocks, form=form)
        found[graph] |= dict.fromkeys(nodes, one)
    for done, (graph, name) in enumerate(caches, len(groups)):
        report("ranges", done, total)
        rows = statistics.rows(graph, name)
        if len(rows):
            found[graph][name] = range_of(rows, statistics.absmax(graph, name), method=method_of(name) or method)
    report("ranges", total, total)
    return found


def range_of(
    rows: np.ndarray,
    absmax: np.ndarray,
    *,
    method: str | None = None,
    weights: Iterable[np.ndarray] = (),
    form: str = INT8,
) -> TensorRange:
    """Return the range of a tensor.

    Args:
        rows: float32 [R, K], sampled rows.
        absmax: float32 [K], largest magnitudes of the whole tensor.
        method: one of `options.METHODS`; None: the one with the least error.
        weights: [N, K] of the matmuls that read the tensor, whole or in blocks; empty: the tensor's own error counts.
        form: `int8`, `fp8` or `nvfp4`.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    largest = float(absmax.max(initial=0.0))
    if largest == 0 or not rows.any():
        return TensorRange((largest or 1.0) / LEVELS[form], method or "minmax", largest, 0.0)
    methods = [method] if method else list(CUT_OFFS) if form == INT8 else ["minmax"]
    scales = [min(CUT_OFFS[name](rows, largest), largest) / LEVELS[form] for name in methods]
    errors = relative_errors(rows, weights, [Candidate(rounded_rows(rows, scale, form)) for scale in scales])
    best = int(np.argmin(errors))
    if not method and errors[best] > GAIN * errors[0]:
        best = 0  # min-max comes first
    return TensorRange(scales[best], methods[best], largest, errors[best])


def _percentile(rows: np.ndarray, largest: float) -> float:
    return float(np.percentile(np.abs(rows), PERCENTILE)) or largest


def _entropy(rows: np.ndarray, largest: float) -> float:
    """Return the cut-off whose distribution has the least divergence from the whole one (onnxruntime's search)."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = rows.reshape(-1)
    values = values[:: max(1, values.size // ENTROPY_VALUES)]
    seen = float(np.abs(values).max())
    if seen == 0:
        return largest
    histogram, edges = np.histogram(values, ENTROPY_BINS, range=(-seen, seen))
    ends = np.float32(-seen), np.float32(seen)
    search = HistogramCollector("entropy", True, ENTROPY_BINS, ENTROPY_LEVELS, PERCENTILE, "same")
    low, high = search.get_entropy_threshold((histogram, edges.astype(np.float32), *ends), ENTROPY_LEVELS)
    return float(max(-low, high)) or largest


def _mse(rows: np.ndarray, largest: float) -> float:
    """Return the cut-off with the least squared error of the tensor itself, by a histogram of its magnitudes."""
    magnitudes = np.abs(rows).reshape(-1)
    histogram, edges = np.histogram(magnitudes, 4096, range=(0.0, largest))
    middles = (edges[1:] + edges[:-1]) / 2
    cuts = largest * np.arange(1, MSE_STEPS + 1) / MSE_STEPS
    errors = [float(histogram @ (middles - rounded_rows(middles, cut / LEVELS[INT8])) ** 2) for cut in cuts]
    return float(cuts[int(np.argmin(errors))])


CUT_OFFS: Mapping[str, Callable[[np.ndarray, float], float]] = {
    "minmax": lambda rows, largest: largest,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
"""Method, in the order of `options.METHODS` → function of rows [R, K] and the largest magnitude to a cut-off."""
