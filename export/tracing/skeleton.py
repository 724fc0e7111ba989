"""A model on the meta device, and the store with the values of its weights.

Tracing needs shapes only; the torch reference reads values from the store (`streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_stg.checkpoint.checkpoint import open_checkpoint
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.model.model import BridgeSTG


def open_skeleton(checkpoint: Path | str, *, adapter: Path | str | None = None) -> tuple[BridgeSTG, WeightStore]:
    """Return a checkpoint's model in eval mode, with parameters on the meta device and real buffers, and its weights.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model, store = open_checkpoint(checkpoint, adapter=adapter)
    for name, value in model.fixed_buffers().items():
        owner, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(owner), buffer, value)
    return model.eval().requires_grad_(False), store


@contextmanager
def replaced_parameters(model: nn.Module, replace: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Replace the parameters of a model inside the block. Shared parameters stay shared."""
    before = [
        (module, name, value)
        for module in model.modules()
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    made: dict[int, nn.Parameter] = {}
    try:
        for module, name, value in before:
            if id(value) not in made:
                made[id(value)] = replace(value)
            setattr(module, name, made[id(value)])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Replace all parameters by fake CPU tensors inside the block."""

    def fake(value: nn.Parameter) -> nn.Parameter:
        with mode:
            return nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cpu"), requires_grad=False)

    with replaced_parameters(model, fake):
        yield
