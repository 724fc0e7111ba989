"""STSB: the learned bridging queries, and the aggregation of their tapped hidden states for the spatial decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BridgingQueries(nn.Embedding):
    """The table [Q, H] of learned queries that follow the answer; their ids are vocab to vocab + Q − 1."""

    def __init__(self, num_queries: int, hidden_size: int) -> None:
        super().__init__(num_queries, hidden_size)
        nn.init.normal_(self.weight, std=0.02)


class BridgingAggregator(nn.Module):
    """Project the bridging queries' states of all taps to the decoder's width, and summarize them in one vector."""

    def __init__(self, num_taps: int, num_queries: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(hidden_size, width) for _ in range(num_taps))
        self.slot = nn.Parameter(torch.randn(num_taps, num_queries, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.summary = nn.Sequential(
            nn.Linear(num_taps * num_queries * width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, taps: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory [B, T·Q, width], to attend to, and summary [B, width] of taps [T, B, Q, H]."""
        levels = torch.cat([projection(tap) for projection, tap in zip(self.projections, taps)], 1)
        memory = self.norm(levels + self.slot.flatten(0, 1))
        return memory, self.summary(memory.flatten(1))
