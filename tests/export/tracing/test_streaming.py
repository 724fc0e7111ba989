"""The reference whose weights stay on disk is the model itself, and a skeleton takes no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bridge_stg.export.parity.probes import PROBE_SIZES, feeds_of, run
from bridge_stg.export.tracing import streaming
from bridge_stg.export.tracing.skeleton import open_skeleton
from bridge_stg.export.tracing.streaming import with_weights
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import CheckpointError


@pytest.mark.parametrize("resident_bytes", [0, 2**40])
@pytest.mark.parametrize("name", GRAPHS)
def test_streamed_weights_give_the_same(
    checkpoint: Path, model: BridgeSTG, monkeypatch: pytest.MonkeyPatch, name: str, resident_bytes: int
) -> None:
    monkeypatch.setattr(streaming, "STREAM_BYTES", 1000)  # every matrix in several blocks
    skeleton, store = open_skeleton(checkpoint)
    feeds, past = feeds_of(name, model.spec, PROBE_SIZES[name][1], np.random.default_rng(0))
    expected = run(TorchSession(name, model), feeds, past)
    for _ in range(2):  # nothing remains
        with with_weights(skeleton, store, resident_bytes=resident_bytes):
            found = run(TorchSession(name, skeleton), feeds, past)
        for tensor, values in expected.items():
            np.testing.assert_allclose(found[tensor], values, rtol=0, atol=2e-5 * max(1, np.abs(values).max()))
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_streaming_holds_no_matrix(checkpoint: Path) -> None:
    skeleton, store = open_skeleton(checkpoint)
    with with_weights(skeleton, store, resident_bytes=0):
        loaded = [name for name, value in skeleton.named_parameters() if not value.is_meta]
        assert loaded and not any(name.endswith(("_proj.weight", "embed_tokens.weight")) for name in loaded)
    with with_weights(skeleton, store):
        assert not any(value.is_meta for value in skeleton.parameters())


def test_a_skeleton_has_its_buffers_and_its_ties(checkpoint: Path, model: BridgeSTG) -> None:
    skeleton, store = open_skeleton(checkpoint)
    assert skeleton.tied and skeleton.spec == model.spec and not skeleton.training
    assert all(value.is_meta for value in skeleton.parameters()) and len(store) > 50
    expected = dict(model.named_buffers())
    assert set(expected) == {name for name, _ in skeleton.named_buffers()}
    for name, value in skeleton.named_buffers():
        assert torch.equal(value, expected[name]), name


def test_a_skeleton_is_of_a_whole_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        open_skeleton(tmp_path)
