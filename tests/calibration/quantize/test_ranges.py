from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.matmul_weights import ProductWeights
from bridge_stg.calibration.quantize.ranges import CUT_OFFS, choose_ranges, range_of, shared_activations
from bridge_stg.calibration.quantize.rounding import Candidate, relative_errors, rounded_rows
from bridge_stg.calibration.recipes import METHODS, Overrides
from bridge_stg.export.graph.blocks import Matmul, find_matmuls
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BridgeError


def rows_of(outlier: float = 0.0) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)
    if outlier:
        rows[7, 3] = outlier
    return rows


@pytest.fixture(scope="module")
def products(exported: Bundle) -> list[Matmul]:
    graphs = ("vision_encoder", "language_model")
    return [p for g in graphs for p in find_matmuls(ir.load(exported.graph_path(g, "standard")), g)]


def test_the_methods_are_those_of_recipes() -> None:
    assert tuple(CUT_OFFS) == METHODS


def test_min_max_covers_what_the_rows_lack() -> None:
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


def test_the_products_output_decides() -> None:
    """A channel that nothing reads may be cut off; the tensor's own error would forbid it."""
    rows = rows_of()
    rows[7, 0] = 20000
    weight = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    weight[:, 0] = 0
    absmax = np.abs(rows).max(0)
    alone, with_product = range_of(rows, absmax), range_of(rows, absmax, weights=[weight[:20], weight[20:]])
    assert alone.method == "minmax"
    assert with_product.method != "minmax" and with_product.scale < alone.scale / 2
    exact = rows @ weight.T
    error = np.linalg.norm(rounded_rows(rows, with_product.scale) @ weight.T - exact) / np.linalg.norm(exact)
    assert with_product.error == pytest.approx(error, rel=1e-3)


def test_what_is_always_zero_has_a_range() -> None:
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


def test_ranges_of_the_chain(statistics: Statistics, products: list[Matmul]) -> None:
    found = choose_ranges(statistics, products)
    nodes = {product.node for product in products if product.graph == "language_model"}
    assert set(found["language_model"]) == nodes | set(statistics.caches("language_model"))
    for group in shared_activations(products):
        ranges = {found[product.graph][product.node] for product in group}
        assert len(ranges) == 1  # one scale serves all products that read a tensor
        (one,) = ranges
        assert 0 < one.scale * 127 <= one.absmax * (1 + 1e-6) and 0 <= one.error < 0.2
    assert choose_ranges(statistics, products) == found
    least = choose_ranges(statistics, products, method="minmax")
    for graph, ranges in found.items():
        assert all(ranges[name].error <= least[graph][name].error for name in ranges)


def test_a_person_decides(statistics: Statistics, products: list[Matmul]) -> None:
    block = "vision_encoder.blocks.0.mlp"
    (first, *_) = [p.node for p in products if p.block == block]
    overrides = Overrides(methods={block: "percentile", first: "entropy", "past_key_0": "mse"})
    found = choose_ranges(statistics, products, method="minmax", overrides=overrides)
    methods = {p.node: found[p.graph][p.node].method for p in products}
    assert methods.pop(first) == "entropy"
    assert {m for n, m in methods.items() if n.startswith("model.visual.blocks.0.mlp")} == {"percentile"}
    assert {m for n, m in methods.items() if not n.startswith("model.visual.blocks.0.mlp")} == {"minmax"}
    assert found["language_model"]["past_key_0"].method == "mse"
    with pytest.raises(BridgeError, match="'max'; expected one of: minmax"):
        choose_ranges(statistics, products, method="max")


def test_smoothed_activations_have_their_own_range(statistics: Statistics, products: list[Matmul]) -> None:
    product = products[0]
    rows = np.array(statistics.rows("vision_encoder", product.node))
    absmax = statistics.absmax("vision_encoder", product.node)
    vector = np.linspace(0.2, 5, product.k, dtype=np.float32)
    smooth = choose_ranges(
        statistics, [product], method="minmax", smoothing={"vision_encoder": {product.node: vector}}
    )["vision_encoder"][product.node]
    assert smooth.scale == pytest.approx((absmax / vector).max() / 127)
    # Its error is that of the product, whose weight's columns were multiplied.
    (weight,) = ProductWeights(statistics.bundle, statistics.variants).blocks(product)
    exact = rows @ weight.T
    wrong = rounded_rows(rows / vector, smooth.scale) @ (weight * vector).T - exact
    assert smooth.error == pytest.approx(np.linalg.norm(wrong) / np.linalg.norm(exact), rel=1e-3)
