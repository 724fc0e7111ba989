"""The checks of inputs that all backends share; no backend is needed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from bridge_stg.runtime.backends.session import check_feeds
from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec, TensorSpec
from bridge_stg.runtime.errors import EngineError

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
    ("changes", "message"),
    [
        ({"frame_mask": None}, r"input 'frame_mask' is missing; expected frame_mask bool \[B, F\]"),
        ({"taps": np.zeros(1)}, "has no input 'taps'; its inputs: feature_map, frame_times, frame_mask"),
        ({"frame_times": [0.0]}, "input 'frame_times' is a list, expected a numpy array"),
        ({"frame_times": np.zeros(5)}, r"input 'frame_times' is float64, expected frame_times float32 \[F\]"),
        ({"frame_times": np.zeros((5, 1), np.float32)}, r"has shape \[5, 1\], expected frame_times float32 \[F\]"),
        ({"feature_map": np.zeros((5, 2, 4, 9), np.float16)}, r"has shape \[5, 2, 4, 9\], expected feature_map"),
        (
            {"frame_mask": np.ones((2, 6), bool)},
            r"'frame_mask' has shape \[2, 6\], so F = 6, but F = 5 in input 'feature_map'; expected",
        ),
        ({"frame_mask": np.ones((0, 5), bool)}, "input 'frame_mask' has B = 0; this graph takes at least 1"),
        ({"feature_map": np.zeros((9, 2, 4, 3), np.float16)}, "'feature_map' has F = 9; this graph takes 1 to 8"),
    ],
)
def test_wrong_inputs_are_named(changes, message):
    with pytest.raises(EngineError, match=r"^spatial_decoder \(standard\): .*" + message):
        check_feeds(PLAIN, plain_feeds(**changes))


def cached_feeds(batch: int = 2, length: int = 3, position: int = 0) -> dict[str, np.ndarray]:
    return {"input_ids": np.zeros((batch, length), np.int64), "cache_position": np.full(batch, position)}


def test_the_cache_binds_its_symbols_and_stands_for_the_pasts():
    cache = SimpleNamespace(batch=2, capacity=8)
    assert check_feeds(CACHED, cached_feeds(position=5), cache) == {"B": 2, "S": 8, "L": 3}
    with pytest.raises(EngineError, match=r"'input_ids' has shape \[1, 3\], so B = 1, but B = 2 in the cache"):
        check_feeds(CACHED, cached_feeds(batch=1), cache)
    with pytest.raises(EngineError, match="input 'past_key_0' was given, but comes from the cache"):
        check_feeds(CACHED, cached_feeds() | {"past_key_0": np.zeros(1, np.float32)}, cache)
    with pytest.raises(EngineError, match="input 'past_key_0' is missing"):
        check_feeds(CACHED, cached_feeds())
    with pytest.raises(EngineError, match="was given a KV cache, but this graph keeps none"):
        check_feeds(PLAIN, plain_feeds(), cache)


@pytest.mark.parametrize("position", [6, -1])
def test_positions_outside_the_cache(position):
    message = f"cache_position of row 0 is {position}; with 3 new positions that does not fit the cache's 8 positions"
    with pytest.raises(EngineError, match=message):
        check_feeds(CACHED, cached_feeds(position=position), SimpleNamespace(batch=2, capacity=8))
    past = {name: np.zeros((2, 2, 8, 4), np.float32) for name in ("past_key_0", "past_value_0")}
    with pytest.raises(EngineError, match=message):
        check_feeds(CACHED, cached_feeds(position=position) | past)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": CACHED.inputs[:3]}, "'append' needs a tensor 'past_value_0'"),
        ({"cache": CacheSpec("in_place", 1, 2, 4)}, "'in_place' needs a tensor 'present_key_0'"),
        ({"cache": CacheSpec("append", 1, 2, 8)}, r"is not the cache's float32 \[B, 2, S, 8\]"),
        ({"cache": CacheSpec("append", 1, 2, 4, "float16")}, "is not the cache's float16"),
    ],
)
def test_a_cache_contract_that_contradicts_the_tensors(changes, message):
    fields = {name: getattr(CACHED, name) for name in ("name", "variant", "inputs", "outputs", "opset", "cache")}
    with pytest.raises(ValueError, match=message):
        GraphSpec(**(fields | changes))
