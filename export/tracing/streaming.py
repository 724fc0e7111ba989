"""The torch reference of a model whose weights stay on disk: a few of them are in memory at a time.

Matrices and embedding tables, nearly all of a model, are read in every call of their module; norms, biases and
the patch embedding are small and stay in memory. So the reference is the model itself, in fp32, at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge_stg.checkpoint.checkpoint import checkpoint_key
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.tracing.side_by_side import Multiply, multiply_together
from bridge_stg.export.tracing.skeleton import replaced_parameters
from bridge_stg.export.tracing.weights import read_rows, row_blocks
from bridge_stg.model.model import BridgeSTG

RESIDENT_BYTES = 512 * 2**20
"""Largest model in fp32 that is read into memory as a whole."""

STREAM_BYTES = 2 * 2**20
"""Stored bytes of a matrix that are read, converted and multiplied at a time: about what a core's cache holds."""


class _Memory:
    """Memory that all streamed matrices use one after another: fresh pages would cost more than reading them."""

    def __init__(self) -> None:
        self.stored = bytearray(STREAM_BYTES)
        self._floats = torch.empty(STREAM_BYTES)

    def as_floats(self, block: Tensor) -> Tensor:
        """Return a block of a matrix in fp32, in this memory if it fits."""
        if block.numel() > self._floats.numel():
            return block.float()
        return self._floats[: block.numel()].view(block.shape).copy_(block)


@contextmanager
def with_weights(model: BridgeSTG, store: WeightStore, *, resident_bytes: int = RESIDENT_BYTES) -> Iterator[None]:
    """Let a model with parameters on the meta device compute inside the block, in fp32, with the values of a store.

    In models of more than `resident_bytes` in fp32, `Linear` and `Embedding` read their weight in every call; `Linear`
    reads it once for all tasks of `side_by_side`.
    """
    keys = {id(value): checkpoint_key(name) for name, value in model.named_parameters()}
    streamed: list[nn.Linear | nn.Embedding] = []
    if sum(4 * value.numel() for value in model.parameters()) > resident_bytes:
        streamed = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    on_disk, memory = {id(module.weight) for module in streamed}, _Memory()

    def read(value: nn.Parameter) -> nn.Parameter:
        if id(value) in on_disk:
            return value
        return nn.Parameter(store.read(keys[id(value)]).float(), requires_grad=False)

    try:
        for place, module in enumerate(streamed):
            key = keys[id(module.weight)]
            if isinstance(module, nn.Linear):
                vars(module)["forward"] = partial(multiply_together, place, _linear(module, store, key, memory))
            else:
                vars(module)["forward"] = _embedding(module, store, key)
        with replaced_parameters(model, read):
            yield
    finally:
        for module in streamed:
            vars(module).pop("forward", None)


def _linear(module: nn.Linear, store: WeightStore, key: str, memory: _Memory) -> Multiply:
    def multiply(inputs: Sequence[Tensor]) -> list[Tensor]:
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
        out, first = torch.empty(len(rows), module.out_features), 0
        for block in row_blocks(store, key, block_bytes=len(memory.stored), buffer=memory.stored):
            last = first + len(block)
            bias = None if module.bias is None else module.bias[first:last]
            out[:, first:last] = F.linear(rows, memory.as_floats(block), bias)
            first = last
        products = out.split([x.shape[:-1].numel() for x in inputs])
        return [product.view(*x.shape[:-1], -1) for product, x in zip(products, inputs, strict=True)]

    return multiply


def _embedding(module: nn.Embedding, store: WeightStore, key: str) -> Callable[[Tensor], Tensor]:
    def forward(ids: Tensor) -> Tensor:
        rows, index = torch.unique(ids, return_inverse=True)
        return read_rows(store, key, rows.tolist()).float()[index]

    return forward
