"""Rank blocks by the effect of INT8 on the task: a cheap proxy for all blocks, the metric itself for the worst.

The proxy is the relative error of a block's matmuls on sampled activations. It does not know what the rest of the model
makes of that error, so the worst blocks are also quantized alone and scored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bridge_stg.export.graph.blocks import Matmul, Table


@dataclass(frozen=True)
class Sensitivity:
    """Effect of INT8 on one block.

    Attributes:
        proxy: relative error of its matmuls' outputs (root of the sum of squares over matmuls).
        drop: points of the metric that are lost with only this block quantized; None: not measured.
        changed: share of the tubes that is lost then: 1 − mean vIoU with those of the float bundle; None: not measured.
    """

    block: str
    graph: str
    proxy: float
    drop: float | None = None
    changed: float | None = None

    @property
    def order(self) -> tuple[bool, float, float, float]:
        """Sort key, most sensitive first: by the metric in tenths of a point, then by tubes, then by the proxy."""
        drop = round(max(self.drop or 0.0, 0.0), 1)
        return (self.drop is None, -drop, -(self.changed or 0.0), -self.proxy)


def rank_blocks(entries: Iterable[Matmul | Table], errors: Mapping[str, Mapping[str, float]]) -> list[Sensitivity]:
    """Return the blocks by the proxy, most sensitive first; an entry without an error counts as exact."""
    squares: dict[tuple[str, str], float] = {}
    for entry in entries:
        key = entry.block, entry.graph
        error = errors.get(entry.graph, {}).get(entry.node, 0.0)
        squares[key] = squares.get(key, 0.0) + (error**2 if math.isfinite(error) else math.inf)
    found = [Sensitivity(block, graph, math.sqrt(total)) for (block, graph), total in squares.items()]
    return sorted(found, key=lambda one: (*one.order, one.graph, one.block))


def confirm(
    ranked: Sequence[Sensitivity], alone: Callable[[Sensitivity], tuple[float, float]], *, count: int
) -> list[Sensitivity]:
    """Return the ranking with the metric measured for its first blocks, which come first in their new order.

    The worst block of each graph is measured first, since the errors of different graphs cannot be compared. `alone`
    returns `drop` and `changed` with only this block quantized.
    """
    firsts = {one.graph: one for one in reversed(ranked)}
    chosen = [one for one in ranked if firsts[one.graph] is one][:count]
    chosen += [one for one in ranked if one not in chosen][: max(0, count - len(chosen))]
    tried: dict[tuple[str, str], Sensitivity] = {}
    for one in chosen:
        drop, changed = alone(one)
        tried[one.graph, one.block] = dataclasses.replace(one, drop=drop, changed=changed)
    found = [tried.get((one.graph, one.block), one) for one in ranked]
    return sorted(found, key=lambda one: one.order)
