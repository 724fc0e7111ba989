"""The self-test finds matmuls that saturate in 16 bits, and passes exact ones."""

from __future__ import annotations

import numpy as np

from bridge_stg.calibration.quantize.packing import REDUCED_LIMIT
from bridge_stg.calibration.scoring.saturation_test import multiply_in_onnxruntime, patterns, saturation_test


def exact(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left.astype(np.int64) @ right.astype(np.int64).T


def clipped(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply as AVX2 does: activations are shifted to 0 … 255, and pairs summed in 16 bits."""
    shifted, weights = left.astype(np.int64) + 128, right.astype(np.int64)
    pairs = shifted[:, None, 0::2] * weights[None, :, 0::2] + shifted[:, None, 1::2] * weights[None, :, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(-1) - 128 * weights.sum(1)


def test_exact_matmuls_pass() -> None:
    found = saturation_test(exact)
    assert found.passed and found.worst == 0
    assert "exact here" in found.sentence


def test_saturation_is_found_and_a_reduced_range_avoids_it() -> None:
    found = saturation_test(clipped)
    assert not found.passed
    assert any(name.startswith("all at +127") for name in found.failed)
    assert "saturate" in found.sentence and "±64" in found.sentence
    assert saturation_test(clipped, limit=REDUCED_LIMIT).passed


def test_the_patterns_reach_the_limits() -> None:
    for name, left, right in patterns(3, 64, 5, 64):
        assert left.dtype == right.dtype == np.int8, name
        assert np.abs(left).min() == 127 and np.abs(right).min() == 64


def test_onnxruntime_is_exact_in_the_range_that_the_test_allows() -> None:
    found, reduced = saturation_test(), saturation_test(limit=REDUCED_LIMIT)
    assert found.cases == reduced.cases == 20 and reduced.passed
    rng = np.random.default_rng(0)
    left = rng.integers(-127, 128, (7, 64), np.int8)
    for limit, is_exact in ((REDUCED_LIMIT, True), (127, found.passed)):  # x86 without VNNI saturates at ±127
        right = rng.integers(-limit, limit + 1, (9, 64), np.int8)
        assert np.array_equal(multiply_in_onnxruntime(left, right), exact(left, right)) == is_exact, limit
