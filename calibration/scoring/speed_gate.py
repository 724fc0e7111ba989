"""Measure whether a graph gains from INT8 on this machine: by recorded calls side by side in one run, and by bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.choose import choose, open_graph
from bridge_stg.runtime.backends.session import KVCache, Session, SessionWrapper
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.parity.compare import Boundary, replay

MARGIN = 0.03
"""Ratios of times this close to 1 are noise."""


@dataclass(frozen=True)
class Gate:
    """Seconds of all recorded calls of one graph, the minimum of several rounds, and bytes of its weights.

    A `forced` graph is quantized without regard to the measurement.
    """

    graph: str
    float_seconds: float
    int8_seconds: float
    float_bytes: int
    int8_bytes: int
    forced: bool = False

    @property
    def faster(self) -> bool:
        """Whether INT8 takes less time, by more than `MARGIN`."""
        return self.int8_seconds < (1 - MARGIN) * self.float_seconds

    @property
    def smaller(self) -> bool:
        """Whether INT8 takes fewer bytes."""
        return self.int8_bytes < self.float_bytes

    @property
    def open(self) -> bool:
        """Whether the graph is quantized."""
        return self.forced or (self.faster and self.smaller)

    @property
    def sentence(self) -> str:
        """The measurement as a sentence."""
        times = f"{1e3 * self.int8_seconds:.1f} ms in INT8 against {1e3 * self.float_seconds:.1f} ms in float"
        sizes = f"{self.int8_bytes / 1e6:.2f} MB against {self.float_bytes / 1e6:.2f} MB"
        faults = [word for word, good in (("faster", self.faster), ("smaller", self.smaller)) if not good]
        if not faults:
            return f"INT8 is faster and smaller here: {times}, {sizes}"
        return f"INT8 is not {' and not '.join(faults)} here: {times}, {sizes}"

    @property
    def why(self) -> str:
        """The measurement and its consequence as a sentence."""
        if self.faster and self.smaller:
            return self.sentence
        return f"{self.sentence}; {'it was requested anyway' if self.forced else 'the graph stays in float'}"


class TimedSession(SessionWrapper):
    """A session that adds up the seconds of its calls."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.seconds = 0.0

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        """See `Session.infer`."""
        began = time.perf_counter()
        outputs = self.session.infer(feeds, cache=cache)
        self.seconds += time.perf_counter() - began
        return outputs


def measure_gate(
    graph: str,
    before: Bundle,
    after: Bundle,
    cases: Sequence[Path],
    *,
    options: Mapping[str, Any],
    side_by_side: bool = True,
    rounds: int = 5,
    forced: bool = False,
) -> tuple[Gate, list[Boundary]]:
    """Replay recorded calls of one graph in the float bundle `before`, then in `after`, in alternation, and compare.

    `options` are `backend`, `variant` and `threads` of the sessions, which are open at the same time if `side_by_side`,
    otherwise one after the other, to save memory. The first of the rounds does not count.

    Returns:
        The gate, and the differences of the quantized graph's outputs from the recorded ones, one boundary per output.
    """
    choice = {name: options[name] for name in ("backend", "variant")}
    groups = [[before, after]] if side_by_side else [[before], [after]]
    least: list[float] = []
    drift: list[Boundary] = []
    for group in groups:
        opened = (open_graph(one, graph, choose(one, **choice), threads=options["threads"]) for one in group)
        sessions = [TimedSession(session) for session in opened]
        try:
            times: list[list[float]] = [[] for _ in sessions]
            for _ in range(rounds):
                for session, taken in zip(sessions, times):
                    session.seconds = 0.0
                    drift = replay(cases, {graph: session}, graphs=(graph,))
                    taken.append(session.seconds)
        finally:
            for session in sessions:
                session.close()
        least += [min(taken[1:] or taken) for taken in times]
    sizes = [graph_bytes(bundle, graph) for bundle in (before, after)]
    return Gate(graph, least[0], least[1], sizes[0], sizes[1], forced), drift


def graph_bytes(bundle: Bundle, graph: str) -> int:
    """Return the bytes of a graph's weights, which its variants share."""
    files = {entry.path: entry.size for spec in bundle.manifest.graphs[graph].values() for entry in spec.data}
    return sum(files.values()) or max(spec.size for spec in bundle.manifest.graphs[graph].values())
