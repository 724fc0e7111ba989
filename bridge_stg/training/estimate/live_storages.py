"""Measure a computation on tensors without values: bytes that are alive at any time, and operations of matmuls."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, is_causal: bool = False, **_: Any
) -> float:
    """Return the operations of a fused attention's forward pass, which skips the hidden half of causal scores."""
    return float(sdpa_flop_count(query.shape, key.shape, value.shape)) * (0.5 if is_causal else 1.0)


def fused_attention_backward(  # noqa: PLR0917 - the operator's signature
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, dropout: float = 0.0,
    is_causal: bool = False, **__: Any,
) -> float:  # fmt: skip
    """Return the operations of a fused attention's backward pass: five matmuls instead of two."""
    return 2.5 * fused_attention(query, key, value, dropout, is_causal)


FUSED = "_scaled_dot_product_flash_attention_for_cpu"
OPERATIONS: Mapping[Any, Any] = {
    **flop_registry,
    getattr(torch.ops.aten, FUSED): fused_attention,
    getattr(torch.ops.aten, f"{FUSED}_backward"): fused_attention_backward,
}


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of the storages that operations create, while they are alive.

    `ignored` are the ids of storages that are not counted.
    """

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak, self.operations, self.ignored = 0, 0, 0.0, ignored
        self.reduced, self.reduced_peak = 0, 0
        self.collect_garbage = False
        """Whether garbage is collected before a new peak counts: recomputation leaves cycles of references."""
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its outputs."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        if (count := OPERATIONS.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = id(storage)
        if key in self.seen or key in self.ignored:
            return
        self.seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        if self.now > 1.01 * self.peak or self.now - self.reduced > 1.01 * self.reduced_peak:
            if self.collect_garbage:
                gc.collect()
            self.peak = max(self.peak, self.now)
            self.reduced_peak = max(self.reduced_peak, self.now - self.reduced)
        weakref.finalize(storage, self.drop, key)

    def add_reduced(self, parameter: Tensor) -> None:
        """Count the complete gradient of a parameter, which sharded training reduces and frees at once."""
        assert parameter.grad is not None
        self.reduced += parameter.grad.nbytes

    def drop(self, key: int) -> None:
        """Stop counting a storage."""
        self.now -= self.seen.pop(key)
