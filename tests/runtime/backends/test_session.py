"""The checks of inputs that all backends share; no backend is needed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from bridge_stg.runtime.backends.session import check_feeds
from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec, TensorSpec
from tests.errors import raises

PLAIN = GraphSpec(
    name="spatial_decoder",
    variant="standard",
    inputs=(
        TensorSpec("feature_map", "float16", ("F", "h", "w", 3)),
        TensorSpec("frame_times", "float32", ("F",)),
        TensorSpec("frame_mask", "bool", ("B", "F")),
    ),
    outputs=(TensorSpec("boxes", "float32", ("B", "F", 4)),),
    opset=24,
    ranges={"F": (1, 8), "B": (1, None)},
)
CACHED = GraphSpec(
    name="language_model",
    variant="primitive",
    inputs=(
        TensorSpec("input_ids", "int64", ("B", "L")),
        TensorSpec("cache_position", "int64", ("B",)),
        TensorSpec("past_key_0", "float32", ("B", 2, "S", 4)),
        TensorSpec("past_value_0", "float32", ("B", 2, "S", 4)),
    ),
    outputs=tuple(TensorSpec(f"new_{part}_0", "float32", ("B", 2, "L", 4)) for part in ("key", "value")),
    opset=18,
    cache=CacheSpec("append", layers=1, kv_heads=2, head_dim=4),
)


def plain_feeds(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    feeds = {
        "feature_map": np.zeros((5, 2, 4, 3), np.float16),
        "frame_times": np.zeros(5, np.float32),
        "frame_mask": np.ones((2, 5), bool),
    }
    return {name: array for name, array in (feeds | changes).items() if array is not None}


def test_symbols_are_bound():
    assert check_feeds(PLAIN, plain_feeds()) == {"F": 5, "h": 2, "w": 4, "B": 2}


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"frame_mask": None}, "engine.bad_input", ["'frame_mask'", "frame_mask bool [B, F]"]),
        ({"taps": np.zeros(1)}, "engine.bad_input", ["'taps'", "feature_map, frame_times, frame_mask"]),
        ({"frame_times": [0.0]}, "engine.bad_input", ["'frame_times'", "list"]),
        ({"frame_times": np.zeros(5)}, "engine.bad_input", ["float64", "frame_times float32 [F]"]),
        ({"frame_times": np.zeros((5, 1), np.float32)}, "engine.bad_input", ["[5, 1]", "frame_times float32 [F]"]),
        ({"feature_map": np.zeros((5, 2, 4, 9), np.float16)}, "engine.bad_input", ["[5, 2, 4, 9]", "feature_map"]),
        ({"frame_mask": np.ones((2, 6), bool)}, "engine.bad_input", ["[2, 6]", "F = 6", "F = 5", "'feature_map'"]),
        ({"frame_mask": np.ones((0, 5), bool)}, "engine.out_of_range", ["'frame_mask'", "B = 0", "at least 1"]),
        ({"feature_map": np.zeros((9, 2, 4, 3), np.float16)}, "engine.out_of_range", ["F = 9", "1 to 8"]),
    ],
)
def test_wrong_inputs_are_named(changes, code, values):
    with raises(code, "spatial_decoder (standard): ", *values):
        check_feeds(PLAIN, plain_feeds(**changes))


def cached_feeds(batch: int = 2, length: int = 3, position: int = 0) -> dict[str, np.ndarray]:
    return {"input_ids": np.zeros((batch, length), np.int64), "cache_position": np.full(batch, position)}


def test_the_cache_binds_its_symbols_and_stands_for_the_pasts():
    cache = SimpleNamespace(batch=2, capacity=8)
    assert check_feeds(CACHED, cached_feeds(position=5), cache) == {"B": 2, "S": 8, "L": 3}
    with raises("engine.bad_input", "'input_ids'", "[1, 3]", "B = 1", "B = 2 in the cache"):
        check_feeds(CACHED, cached_feeds(batch=1), cache)
    with raises("engine.bad_input", "'past_key_0' was given"):
        check_feeds(CACHED, cached_feeds() | {"past_key_0": np.zeros(1, np.float32)}, cache)
    with raises("engine.bad_input", "'past_key_0' is missing"):
        check_feeds(CACHED, cached_feeds())
    with raises("engine.bad_cache", PLAIN):
        check_feeds(PLAIN, plain_feeds(), cache)


@pytest.mark.parametrize("position", [6, -1])
def test_positions_outside_the_cache(position):
    values = f"row 0 is {position}", "3 new positions", "8 positions"
    with raises("engine.out_of_range", *values):
        check_feeds(CACHED, cached_feeds(position=position), SimpleNamespace(batch=2, capacity=8))
    past = {name: np.zeros((2, 2, 8, 4), np.float32) for name in ("past_key_0", "past_value_0")}
    with raises("engine.out_of_range", *values):
        check_feeds(CACHED, cached_feeds(position=position) | past)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": CACHED.inputs[:3]}, "'append' needs a tensor 'past_value_0'"),
        ({"cache": CacheSpec("in_place", 1, 2, 4)}, "'in_place' needs a tensor 'present_key_0'"),
        ({"cache": CacheSpec("append", 1, 2, 8)}, r"float32 \[B, 2, S, 8\]"),
        ({"cache": CacheSpec("append", 1, 2, 4, "float16")}, "float16"),
    ],
)
def test_a_cache_contract_that_contradicts_the_tensors(changes, message):
    fields = {name: getattr(CACHED, name) for name in ("name", "variant", "inputs", "outputs", "opset", "cache")}
    with pytest.raises(ValueError, match=message):
        GraphSpec(**(fields | changes))
