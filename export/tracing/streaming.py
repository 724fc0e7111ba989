"""The torch reference of a model whose weights stay on disk: a few of them in memory at a time.

Matrices and tables, which are nearly all of a model, are read by rows when their module is called and let go again;
norms, biases and the patch embedding are small and stay. So the reference is the very model, in fp32, at whatever size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge_stg.checkpoint.checkpoint import checkpoint_key
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.tracing.weights import row_blocks
from bridge_stg.model.model import BridgeSTG

RESIDENT_BYTES = 512 * 2**20
"""Models up to this size in fp32 are held in memory as a whole."""


@contextmanager
def with_weights(model: BridgeSTG, store: WeightStore, *, resident_bytes: int = RESIDENT_BYTES) -> Iterator[None]:
    """Let a model without values compute inside the block, in fp32.

    Args:
        model: its parameters are on the meta device; so they are again after the block.
        store: their values.
        resident_bytes: up to this size of the fp32 weights, all are read once; beyond, `Linear` and `Embedding` read
            theirs at every call.
    """
    keys = {id(value): checkpoint_key(name) for name, value in model.named_parameters()}
    size = sum(4 * value.numel() for value in model.parameters())
    streams = size > resident_bytes
    streamed: list[nn.Module] = []
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    read: dict[str, nn.Parameter] = {}
    try:
        for module in model.modules():
            rows = streams and isinstance(module, nn.Linear | nn.Embedding)
            for name, value in module._parameters.items():
                if value is None or (rows and name == "weight"):
                    continue
                key = keys[id(value)]
                if key not in read:
                    read[key] = nn.Parameter(store.read(key).float(), requires_grad=False)
                before.append((module, name, value))
                module._parameters[name] = read[key]
            if rows:
                forward = _linear if isinstance(module, nn.Linear) else _embedding
                module.forward = forward(module, store, keys[id(module.weight)])  # type: ignore[method-assign]
                streamed.append(module)
        yield
    finally:
        for module, name, value in before:
            module._parameters[name] = value
        for module in streamed:
            del module.forward


def _linear(module: nn.Linear, store: WeightStore, key: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        parts, first = [], 0
        for block in row_blocks(store, key):
            bias = None if module.bias is None else module.bias[first : first + len(block)]
            parts.append(F.linear(x, block.float(), bias))
            first += len(block)
        return torch.cat(parts, -1)

    return forward


def _embedding(module: nn.Embedding, store: WeightStore, key: str) -> Callable[[Tensor], Tensor]:
    def forward(ids: Tensor) -> Tensor:
        out = torch.empty(*ids.shape, module.embedding_dim)
        first = 0
        for block in row_blocks(store, key):
            here = (ids >= first) & (ids < first + len(block))
            if here.any():
                out[here] = block[ids[here] - first].float()
            first += len(block)
        return out

    return forward
