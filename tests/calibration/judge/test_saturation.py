"""The self-test finds products that clip in 16 bits, and passes exact ones."""

from __future__ import annotations

import numpy as np

from bridge_stg.calibration.judge.saturation_test import (
    FULL,
    REDUCED,
    multiply_in_onnxruntime,
    patterns,
    saturation_test,
)


def exact(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left.astype(np.int64) @ right.astype(np.int64).T


def clipped(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply as AVX2 does: activations shifted to 0 … 255, pairs summed in 16 bits, the shift taken off again."""
    shifted, weights = left.astype(np.int64) + 128, right.astype(np.int64)
    pairs = shifted[:, None, 0::2] * weights[None, :, 0::2] + shifted[:, None, 1::2] * weights[None, :, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(-1) - 128 * weights.sum(1)


def test_exact_products_pass() -> None:
    found = saturation_test(exact)
    assert found.passed and found.worst == 0 and found.weight_limit == FULL
    assert "exact here" in found.sentence


def test_clipped_products_are_found_and_a_reduced_range_cures_them() -> None:
    found = saturation_test(clipped)
    assert not found.passed and found.weight_limit == REDUCED
    assert any(name.startswith("all at +127") for name in found.failed)
    assert "saturate" in found.sentence and "±64" in found.sentence
    assert saturation_test(clipped, limit=REDUCED).passed


def test_the_patterns_reach_the_ends() -> None:
    for name, left, right in patterns(3, 64, 5, 64):
        assert left.dtype == right.dtype == np.int8, name
        assert np.abs(left).min() == 127 and np.abs(right).min() == 64


def test_onnxruntime_multiplies_what_it_is_given() -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.integers(-127, 128, shape, np.int8) for shape in ((7, 64), (9, 64)))
    assert np.array_equal(multiply_in_onnxruntime(left, right), exact(left, right))
    found = saturation_test()
    assert found.cases == 20 and found.weight_limit in (FULL, REDUCED)
