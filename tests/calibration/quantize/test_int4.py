"""Int4 rounding: on its levels, and better for the activations that it was made for than rounding to the nearest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.int4 import Int4Weights, dequantized, factors_of, int4_rounded
from bridge_stg.calibration.quantize.scales import compute_scales
from bridge_stg.calibration.quantize.smooth import smoothing_vector
from bridge_stg.calibration.recipes import RECIPES
from bridge_stg.calibration.search.matmul_errors import matmul_errors
from bridge_stg.export.graph.blocks import find_matmuls
from bridge_stg.runtime.bundle.bundle import Bundle

K, N, BLOCK = 192, 96, 32


@pytest.fixture(scope="module")
def activations() -> np.ndarray:
    """Rows [2048, K] with correlated channels, of which some are 20 to 60 times as large."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((2048, K)) @ (np.eye(K) + rng.standard_normal((K, K)) / np.sqrt(K))
    sizes = np.ones(K)
    sizes[rng.choice(K, 4, replace=False)] = rng.uniform(20, 60, 4)
    rows: np.ndarray = (mixed * sizes).astype(np.float32)
    return rows


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)


def error(rows: np.ndarray, weight: np.ndarray, rounded: np.ndarray) -> float:
    return float(np.linalg.norm(rows @ (rounded - weight)) / np.linalg.norm(rows @ weight))


def nearest(weight: np.ndarray) -> np.ndarray:
    """Return weights rounded to the nearest of 15 levels per block."""
    blocks = weight.reshape(-1, BLOCK, weight.shape[1])
    scales = np.abs(blocks).max(1, keepdims=True) / 7
    values: np.ndarray = (np.rint(blocks / scales) * scales).reshape(weight.shape)
    return values


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("known", [False, True])
def test_levels_and_scales(weight: np.ndarray, activations: np.ndarray, dtype: str, known: bool) -> None:
    sparse = weight.copy()
    sparse[:, 5] = 0
    activation = factors_of(activations) if known else None
    levels, scales = int4_rounded(sparse, activation, block_size=16, dtype=np.dtype(dtype))
    assert levels.shape == (K, N) and levels.dtype == np.int8 and levels.min() >= -8 and levels.max() <= 7
    assert scales.shape == (K // 16, N) and scales.dtype == dtype and (scales > 0).all()
    assert not levels[:, 5].any() and (scales[:, 5] == 1).all()
    assert error(activations, sparse, dequantized(levels, scales)) < 0.1


def test_other_activations_keep_the_gain(weight: np.ndarray, activations: np.ndarray) -> None:
    seen, others = activations[:1536], activations[1536:]
    plain = dequantized(*int4_rounded(weight, None, block_size=BLOCK, dtype=np.float32))
    solved = dequantized(*int4_rounded(weight, factors_of(seen), block_size=BLOCK, dtype=np.float32))
    vector = smoothing_vector(np.abs(seen).mean(0), np.ones(K, np.float32), 0.4)
    smooth = int4_rounded(weight * vector[:, None], factors_of(seen / vector), block_size=BLOCK, dtype=np.float32)
    errors = [error(others, weight, found) for found in (nearest(weight), plain, solved)]
    errors.append(error(others, weight, dequantized(*smooth) / vector[:, None]))
    assert errors[1] < errors[0] and errors[2] < 0.5 * errors[1] and errors[3] < 0.9 * errors[2], errors


def test_factors_invert_the_damped_products(activations: np.ndarray) -> None:
    squares, upper = factors_of(activations[:64])  # fewer rows than channels
    gram = activations[:64].T.astype(np.float64) @ activations[:64]
    np.testing.assert_allclose(squares, np.diag(gram) / 64, rtol=1e-4)
    gram += 0.01 * np.mean(np.diag(gram)) * np.eye(K)
    np.testing.assert_allclose(upper.T.astype(np.float64) @ upper @ gram, np.eye(K), atol=2e-3)
    assert not np.tril(upper, -1).any()
    squares, upper = factors_of(np.zeros((3, 4), np.float32))
    assert not squares.any() and np.isfinite(upper).all()


def test_weights_of_a_graph_are_rounded_once(
    exported: Bundle, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    matmuls = find_matmuls(ir.load(exported.graph_path("language_model", "standard")), "language_model")
    scales = compute_scales(statistics, [], RECIPES["w4"], folder=tmp_path)
    assert scales.int4 is not None
    solved = matmul_errors(statistics, matmuls, RECIPES["w4"], scales=scales)["language_model"]
    plain = matmul_errors(statistics, matmuls, RECIPES["w4"])["language_model"]
    assert np.exp(np.mean([np.log(solved[node] / plain[node]) for node in plain])) < 0.8
    monkeypatch.setattr("bridge_stg.calibration.quantize.int4.int4_rounded", None)
    again = Int4Weights(statistics, scales.smoothing, RECIPES["w4"], tmp_path / "int4")
    assert matmul_errors(statistics, matmuls, RECIPES["w4"], scales=dataclasses.replace(scales, int4=again))
