from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.options import METHODS
from bridge_stg.calibration.overrides import Overrides
from bridge_stg.calibration.quantize.matmul_weights import MatmulWeights
from bridge_stg.calibration.quantize.ranges import CUT_OFFS, choose_ranges, range_of
from bridge_stg.calibration.quantize.rounding import Candidate, relative_errors, rounded_rows
from bridge_stg.export.graph.blocks import Matmul, find_matmuls, shared_activations
from bridge_stg.runtime.bundle.bundle import Bundle
from tests.errors import raises


def rows_of(outlier: float = 0.0) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)
    if outlier:
        rows[7, 3] = outlier
    return rows


@pytest.fixture(scope="module")
def matmuls(exported: Bundle) -> list[Matmul]:
    graphs = ("vision_encoder", "language_model")
    return [p for g in graphs for p in find_matmuls(ir.load(exported.graph_path(g, "standard")), g)]


def test_every_method_has_a_cut_off() -> None:
    assert tuple(CUT_OFFS) == METHODS


def test_min_max_covers_values_outside_the_sampled_rows() -> None:
    found = range_of(rows_of(), np.full(64, 9.0, np.float32), method="minmax")
    assert (found.scale, found.method, found.absmax) == (9.0 / 127, "minmax", 9.0)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_cut_offs_leave_a_rare_outlier_out(method: str) -> None:
    rows = rows_of(outlier=12.0)
    found = range_of(rows, np.abs(rows).max(0), method=method)
    assert found.absmax == 12 and 2 < found.scale * 127 < 10
    assert found.method == method


def test_mse_is_the_least_of_its_cut_offs() -> None:
    rows = rows_of(outlier=8.0)
    found = range_of(rows, np.abs(rows).max(0), method="mse")
    scales = np.linspace(0.02, 1, 50) * 8.0 / 127
    errors = [float(np.square(rounded_rows(rows, scale) - rows).mean()) for scale in scales]
    assert np.square(rounded_rows(rows, found.scale) - rows).mean() <= 1.02 * min(errors)


def test_the_error_of_the_matmul_output_decides() -> None:
    """A channel with zero weights may be clipped, although the tensor's own error is then large."""
    rows = rows_of()
    rows[7, 0] = 20000
    weight = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    weight[:, 0] = 0
    absmax = np.abs(rows).max(0)
    alone, with_matmul = range_of(rows, absmax), range_of(rows, absmax, weights=[weight[:20], weight[20:]])
    assert alone.method == "minmax"
    assert with_matmul.method != "minmax" and with_matmul.scale < alone.scale / 2
    exact = rows @ weight.T
    error = np.linalg.norm(rounded_rows(rows, with_matmul.scale) @ weight.T - exact) / np.linalg.norm(exact)
    assert with_matmul.error == pytest.approx(error, rel=1e-3)


def test_a_tensor_of_zeros_has_a_range() -> None:
    found = range_of(np.zeros((4, 8), np.float32), np.zeros(8, np.float32))
    assert found.scale > 0 and found.error == 0
    silent = range_of(np.zeros((4, 8), np.float32), np.full(8, 5, np.float32), method="mse")
    assert silent.scale == 5 / 127


def test_errors_add_up_over_blocks() -> None:
    rows, weight = rows_of(), np.random.default_rng(2).normal(size=(10, 64)).astype(np.float32)
    candidates = [Candidate(rounded_rows(rows, 0.1)), Candidate(rows)]
    whole = relative_errors(rows, [weight], candidates)
    assert relative_errors(rows, [weight[:3], weight[3:]], candidates) == pytest.approx(whole, rel=1e-5)
    assert whole[0] > 0.01 and whole[1] == 0


def test_ranges_of_the_chain(statistics: Statistics, matmuls: list[Matmul]) -> None:
    found = choose_ranges(statistics, matmuls)
    nodes = {matmul.node for matmul in matmuls if matmul.graph == "language_model"}
    assert set(found["language_model"]) == nodes | set(statistics.caches("language_model"))
    for group in shared_activations(matmuls):
        ranges = {found[matmul.graph][matmul.node] for matmul in group}
        assert len(ranges) == 1  # all readers of a tensor share one scale
        (one,) = ranges
        assert 0 < one.scale * 127 <= one.absmax * (1 + 1e-6) and 0 <= one.error < 0.2
    assert choose_ranges(statistics, matmuls) == found
    least = choose_ranges(statistics, matmuls, method="minmax")
    for graph, ranges in found.items():
        assert all(ranges[name].error <= least[graph][name].error for name in ranges)


def test_overrides_take_precedence(statistics: Statistics, matmuls: list[Matmul]) -> None:
    block = "vision_encoder.blocks.0.mlp"
    (first, *_) = [p.node for p in matmuls if p.block == block]
    overrides = Overrides(methods={block: "percentile", first: "entropy", "past_key_0": "mse"})
    found = choose_ranges(statistics, matmuls, method="minmax", overrides=overrides)
    methods = {p.node: found[p.graph][p.node].method for p in matmuls}
    assert methods.pop(first) == "entropy"
    assert {m for n, m in methods.items() if n.startswith("model.visual.blocks.0.mlp")} == {"percentile"}
    assert {m for n, m in methods.items() if not n.startswith("model.visual.blocks.0.mlp")} == {"minmax"}
    assert found["language_model"]["past_key_0"].method == "mse"
    with raises("calibration.bad_recipe", "'max'", "minmax"):
        choose_ranges(statistics, matmuls, method="max")


def test_smoothed_activations_have_their_own_range(statistics: Statistics, matmuls: list[Matmul]) -> None:
    matmul = matmuls[0]
    rows = np.array(statistics.rows("vision_encoder", matmul.node))
    absmax = statistics.absmax("vision_encoder", matmul.node)
    vector = np.linspace(0.2, 5, matmul.k, dtype=np.float32)
    smooth = choose_ranges(statistics, [matmul], method="minmax", smoothing={"vision_encoder": {matmul.node: vector}})[
        "vision_encoder"
    ][matmul.node]
    assert smooth.scale == pytest.approx((absmax / vector).max() / 127)
    # Its error is that of the matmul with multiplied weight columns.
    (weight,) = MatmulWeights(statistics.bundle, statistics.variants).blocks(matmul)
    exact = rows @ weight.T
    wrong = rounded_rows(rows / vector, smooth.scale) @ (weight * vector).T - exact
    assert smooth.error == pytest.approx(np.linalg.norm(wrong) / np.linalg.norm(exact), rel=1e-3)
