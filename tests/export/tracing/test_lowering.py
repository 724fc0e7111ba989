"""The dialects in eager torch, as far as they are plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bridge_stg.export.parity.probes import feeds_of
from bridge_stg.export.tracing.graphs import LanguageModelGraph
from bridge_stg.export.tracing.lowering import LOWERINGS, visible_past_and_new
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession


def test_append_equals_the_reference(model: BridgeSTG) -> None:
    """One softmax over past and new rows is attention over the buffer with both."""
    sizes = {"B": 2, "L": 6, "K": 3, "S": 17, "V": 4}
    feeds, past = feeds_of("language_model", model.spec, sizes, np.random.default_rng(0))
    assert past is not None
    expected = TorchSession("language_model", model).infer({**feeds, **past})
    lowering = LOWERINGS["primitive"]
    tensors = [torch.from_numpy(array) for array in (*feeds.values(), *past.values())]
    with lowering.applied(model), torch.no_grad():
        logits, taps, *new = LanguageModelGraph(model, lowering)(*tensors)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(taps, expected["taps"], rtol=0, atol=2e-5)
    names = [name.replace("past", "present") for name in past]
    for name, rows in zip(names, new, strict=True):
        for b, start in enumerate(feeds["cache_position"]):
            np.testing.assert_allclose(rows[b], expected[name][b, :, start : start + 6], rtol=0, atol=2e-5)


def test_visible_past_and_new() -> None:
    mask = visible_past_and_new(torch.tensor([0, 2]), 2, 3)
    past = [[False, False, False], [True, True, False]]
    new = [[True, False], [True, True]]
    assert mask.shape == (2, 1, 2, 5)
    assert mask[:, 0].tolist() == [[row + new[i] for i in range(2)] for row in past]


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_model_is_left_as_it_was(model: BridgeSTG, name: str) -> None:
    def used() -> list[str]:
        layers = [module.attention for module in model.spatial_decoder.modules() if hasattr(module, "attention")]
        return [model.vision_encoder.model.config._attn_implementation, *layers]  # noqa: SLF001  # transformers has no public name

    before = used()
    with pytest.raises(ZeroDivisionError), LOWERINGS[name].applied(model):
        assert set(used()) == {LOWERINGS[name].attention}
        raise ZeroDivisionError
    assert used() == before
