"""Activation checkpointing: blocks whose activations are computed again in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """Base of modules that run blocks one after the other, with activation checkpointing if it is turned on."""

    checkpoint_activations = False
    """Whether only the inputs of blocks are kept for the backward pass, which runs the blocks again."""

    def run_block(self, block: Callable[..., Any], *args: Any, **options: Any) -> Tensor:
        """Return the output of a block."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, **options)  # type: ignore[no-any-return]
        return block(*args, **options)  # type: ignore[no-any-return]
