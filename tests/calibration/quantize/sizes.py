"""Sizes of quantized bundles, for tests."""

from __future__ import annotations

from bridge_stg.calibration.search.block_sizes import size_of_blocks
from bridge_stg.runtime.bundle.bundle import Bundle


def quantized_share(bundle: Bundle, graph: str | None = None) -> float:
    """Return the bytes of quantized blocks relative to fp32, of one graph or all; 1 without quantized blocks."""
    chosen = [b for b in size_of_blocks(bundle).values() if b.quantized and graph in (None, b.graph)]
    return sum(b.stored_bytes for b in chosen) / sum(b.fp32_bytes for b in chosen) if chosen else 1.0
