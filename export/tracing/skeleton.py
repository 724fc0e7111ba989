"""A checkpoint without its weights in memory: a model on the meta device beside the store that holds its values.

Tracing needs shapes only; the torch reference takes values from the store as it goes (`bridge_stg.export.tracing.streaming`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_stg.checkpoint.checkpoint import build_model, check_folder, check_weights, load_tokenizer, open_weights
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.model.model import BridgeSTG


def open_skeleton(checkpoint: Path | str) -> tuple[BridgeSTG, WeightStore]:
    """Read everything of a checkpoint folder but the weights' values.

    Returns:
        A model in eval mode whose parameters are on the meta device and whose buffers are real, and its weights.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or of another shape.
    """
    folder = Path(checkpoint)
    check_folder(folder)
    config = BridgeSTGConfig.load(folder)
    store = open_weights(folder, config)
    tokenizer = load_tokenizer(folder)
    with torch.device("meta"):
        model = build_model(config, tokenizer, where=folder / "config.json")
    check_weights(model, store)
    for name, value in model.fixed_buffers().items():
        owner, _, buffer = name.rpartition(".")
        model.get_submodule(owner)._buffers[buffer] = value
    return model.eval().requires_grad_(False), store


@contextmanager
def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Put fake CPU tensors in the place of all parameters inside the block; shared ones stay shared."""
    before = [(module, name, value) for module in model.modules() for name, value in module._parameters.items()]
    fakes: dict[int, nn.Parameter] = {}
    try:
        with mode:
            for module, name, value in before:
                if value is not None:
                    if id(value) not in fakes:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                        fakes[id(value)] = nn.Parameter(fake, requires_grad=False)
                    module._parameters[name] = fakes[id(value)]
        yield
    finally:
        for module, name, value in before:
            module._parameters[name] = value
