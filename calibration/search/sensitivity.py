"""Rank blocks by what INT8 does to the task: a cheap proxy for all of them, the metric itself for the worst.

The proxy is the relative error of a block's products on sampled activations. It knows nothing of what the rest of the
model makes of that error; so the worst are quantized alone, and judged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Progress = Callable[[str, int, int], object]


class NamedProduct(Protocol):
    """What is read of a `blocks.Matmul`."""

    @property
    def node(self) -> str: ...

    @property
    def graph(self) -> str: ...

    @property
    def block(self) -> str: ...


@dataclass(frozen=True)
class Sensitivity:
    """What INT8 does to one block.

    Attributes:
        block: its name.
        graph: that it lies in.
        proxy: relative error of its products' outputs (root of the sum of squares over products).
        drop: points of the metric that it costs alone in INT8; None: not tried.
        changed: share of the tubes that is lost then: 1 − mean vIoU with those of the bundle in float; None likewise.
    """

    block: str
    graph: str
    proxy: float
    drop: float | None = None
    changed: float | None = None

    @property
    def order(self) -> tuple[bool, float, float, float]:
        """Sorts the most sensitive first: by the metric in tenths of a point, then by tubes, then by the proxy."""
        drop = round(max(self.drop or 0.0, 0.0), 1)
        return (self.drop is None, -drop, -(self.changed or 0.0), -self.proxy)


def rank_blocks(products: Iterable[NamedProduct], errors: Mapping[str, Mapping[str, float]]) -> list[Sensitivity]:
    """Return the blocks by the proxy, most sensitive first.

    Args:
        products: of all graphs.
        errors: relative output error by graph and node; a product without one counts as exact.
    """
    squares: dict[tuple[str, str], float] = {}
    for product in products:
        key = product.block, product.graph
        error = errors.get(product.graph, {}).get(product.node, 0.0)
        squares[key] = squares.get(key, 0.0) + (error**2 if math.isfinite(error) else math.inf)
    found = [Sensitivity(block, graph, math.sqrt(total)) for (block, graph), total in squares.items()]
    return sorted(found, key=lambda one: (*one.order, one.graph, one.block))


def confirm(
    ranked: Sequence[Sensitivity],
    alone: Callable[[Sensitivity], tuple[float, float]],
    *,
    count: int,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """Return the ranking with the metric for its first blocks, which come first in their new order.

    Args:
        ranked: by the proxy.
        alone: returns `drop` and `changed` with this block alone in INT8.
        count: how many are tried; of every graph its worst is among them, since errors of one graph cannot be compared
            with those of another.
        progress: called as progress("sensitivity", done, total).
    """
    firsts = {one.graph: one for one in reversed(ranked)}
    chosen = [one for one in ranked if firsts[one.graph] is one][:count]
    chosen += [one for one in ranked if one not in chosen][: max(0, count - len(chosen))]
    report = progress or (lambda stage, done, total: None)
    tried: dict[tuple[str, str], Sensitivity] = {}
    for done, one in enumerate(chosen):
        report("sensitivity", done, len(chosen))
        drop, changed = alone(one)
        tried[one.graph, one.block] = dataclasses.replace(one, drop=drop, changed=changed)
    report("sensitivity", len(chosen), len(chosen))
    found = [tried.get((one.graph, one.block), one) for one in ranked]
    return sorted(found, key=lambda one: one.order)
