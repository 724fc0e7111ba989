"""A session that looks at its graph's activations while the chain runs, and keeps a few rows a tensor and sample.

Which rows are kept depends on the seed, the sample's place and the call alone, so that a second run keeps the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bridge_stg.calibration.collect.instrument import PLACES, Tap
from bridge_stg.runtime.backends.session import KVCache, Session, SessionWrapper
from bridge_stg.runtime.bundle.manifest import GraphSpec

ROWS_A_CALL = 64
"""Rows a tensor that one call may return."""

Kind = Callable[[Mapping[str, np.ndarray]], str]
"""Tells what a call is for from what it is fed; the kinds of a graph get equal shares of the rows."""


@dataclass(eq=False)
class Rows:
    """What one tensor's calls of one sample left: the rows of lowest rank, the one of largest magnitude.

    Attributes:
        values: float32 [R, K].
        ranks: float64 [R], random.
    """

    values: np.ndarray
    ranks: np.ndarray


@dataclass(eq=False)
class Seen:
    """What one sample showed of one tensor.

    Attributes:
        absmax: float32 [K].
        peak: float32 [K], the row with the largest magnitude of all.
        count: rows that flowed.
        kinds: by kind of call.
    """

    absmax: np.ndarray
    peak: np.ndarray
    count: int = 0
    kinds: dict[str, Rows] = field(default_factory=dict)

    def rows(self) -> np.ndarray:
        """Return the kept rows [R, K] of all kinds."""
        return np.concatenate([self.kinds[kind].values for kind in sorted(self.kinds)])


class RecordingSession(SessionWrapper):
    """Runs a graph with taps as if it had none. See `session.Session`.

    Args:
        session: runs the graph with its taps, of which its `graph` tells.
        graph: the graph without them.
        taps: what is looked at.
        number: the graph's place in the chain, which tells its random numbers from those of other graphs.
        kind: tells the kind of a call.
        quota: rows of a tensor that are kept of each kind of call, a sample.
        seed: of the choice of rows.
    """

    def __init__(
        self,
        session: Session,
        graph: GraphSpec,
        taps: tuple[Tap, ...],
        *,
        number: int,
        kind: Kind,
        quota: int,
        seed: int,
    ) -> None:
        super().__init__(session)
        self.graph = graph
        self._taps = taps
        self._number, self._kind, self._quota, self._seed = number, kind, quota, seed
        self.begin(0)

    def begin(self, sample: int) -> None:
        """Forget what was seen, and draw the next rows for the sample at a place of the set."""
        self.seen: dict[str, Seen] = {}
        self.calls: dict[str, int] = {}
        self._random = np.random.default_rng([self._seed, sample, self._number])

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        """See `Session.infer`."""
        kind = self._kind(feeds)
        self.calls[kind] = self.calls.get(kind, 0) + 1
        taken = _rows_worth(self.graph, feeds)
        # One row of each of R equal parts: rows of pixels lie in a raster, on which a fixed step would see one column.
        places = (np.arange(taken) + self._random.random(taken)) / taken
        ranks = self._random.random(taken)
        places = np.minimum(places, 1 - 1e-6).astype(np.float32)
        outputs = self.session.infer({**feeds, PLACES: places}, cache=cache)
        for tap in self._taps:
            absmax, rows, index, count = (
                outputs.pop(f"{tap.stem}.{part}") for part in ("absmax", "rows", "index", "count")
            )
            if int(count[0]):
                self._add(tap, kind, absmax, rows, index, int(count[0]), ranks)
        return outputs

    def _add(
        self,
        tap: Tap,
        kind: str,
        absmax: np.ndarray,
        rows: np.ndarray,
        index: np.ndarray,
        count: int,
        ranks: np.ndarray,
    ) -> None:
        seen = self.seen.get(tap.stem)
        if seen is None:
            seen = self.seen[tap.stem] = Seen(absmax, rows[-1].copy())
        elif absmax.max() > seen.absmax.max():
            seen.peak = rows[-1].copy()
        seen.absmax = np.maximum(seen.absmax, absmax)
        seen.count += count
        new = np.flatnonzero(np.diff(index[:-1], prepend=-1))  # a short tensor is asked for the same row twice
        values, ranks = rows[new], ranks[new]
        if kind in seen.kinds:
            values = np.concatenate([seen.kinds[kind].values, values])
            ranks = np.concatenate([seen.kinds[kind].ranks, ranks])
        kept = np.argsort(ranks, kind="stable")[: self._quota]
        seen.kinds[kind] = Rows(values[kept], ranks[kept])


def _rows_worth(graph: GraphSpec, feeds: Mapping[str, np.ndarray]) -> int:
    """Return the rows to ask a call for: a language model's call has no more than its tokens."""
    tokens = feeds["input_ids"].size if graph.cache is not None else ROWS_A_CALL
    return min(ROWS_A_CALL, tokens)
