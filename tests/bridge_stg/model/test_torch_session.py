"""Sessions in eager torch compute on the model's device, and so do their KV caches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from bridge_stg.export.parity.probes import PROBE_SIZES, feeds_of
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.bundle.contracts import GRAPHS
from tests.errors import raises


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_run_on_the_device_of_the_model(
    tiny_model: BridgeSTG, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The meta device takes no tensor of another device, as CUDA does."""
    devices: set[str] = set()

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        devices.add(tensor.device.type)
        return torch.zeros(tensor.shape, device="cpu")

    session = TorchSession(name, copy.deepcopy(tiny_model).to("meta"))
    feeds, past = feeds_of(name, tiny_model.spec, PROBE_SIZES[name][1], np.random.default_rng(0))
    expected = TorchSession(name, tiny_model).infer({**feeds, **(past or {})})
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    found = session.infer({**feeds, **(past or {})})
    if past:
        batch, _, capacity, _ = next(iter(past.values())).shape
        cache = session.allocate_cache(batch=batch, capacity=capacity)
        session.infer(feeds, cache=cache)
        session.allocate_cache(batch=batch, capacity=capacity + 1).copy_prefix(cache, 2)
        assert all(buffer.is_meta for buffer in cache.buffers.values())
    assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in expected.items()}
    assert devices == {"meta"}


def test_a_cache_is_read_and_written(tiny_model: BridgeSTG) -> None:
    session = TorchSession("language_model", tiny_model)
    feeds, past = feeds_of(
        "language_model", tiny_model.spec, PROBE_SIZES["language_model"][1], np.random.default_rng(0)
    )
    assert past is not None
    batch, _, capacity, _ = next(iter(past.values())).shape
    cache = session.allocate_cache(batch=batch, capacity=capacity)
    assert not any(value.any() for value in cache.read().values()) and cache.nbytes == sum(
        v.nbytes for v in past.values()
    )
    cache.write(past)
    found, expected = session.infer(feeds, cache=cache), session.infer({**feeds, **past})
    assert np.array_equal(found["logits"], expected["logits"])
    values = cache.read()
    for key, value in past.items():
        assert not np.array_equal(values[key], value)
        assert np.array_equal(values[key], expected[key.replace("past", "present")])
    values["past_key_0"][:] = 7  # a copy
    assert not (cache.read()["past_key_0"] == 7).all()
    with raises("engine.bad_cache", "past_key_0"):
        cache.write({**past, "past_key_0": past["past_key_0"][:, :, 1:]})
    with raises("engine.out_of_memory"):
        session.allocate_cache(batch=2**20, capacity=2**30)
