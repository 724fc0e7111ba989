"""Training's KV cache: the prefix of a video is computed once, with gradients, and shared by its questions."""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixCache:
    """Keys and values of V prefixes, then of V·B suffixes that follow them."""

    def __init__(self, rows_per_prefix: int) -> None:
        self.rows = rows_per_prefix
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store the first call of a layer; in the second, put what was stored in front."""
        if layer_idx not in self.stored:
            self.stored[layer_idx] = (key, value)
            return key, value
        old = (tensor.repeat_interleave(self.rows, 0) for tensor in self.stored[layer_idx])
        return tuple(torch.cat([before.to(new.dtype), new], 2) for before, new in zip(old, (key, value)))  # type: ignore[return-value]
