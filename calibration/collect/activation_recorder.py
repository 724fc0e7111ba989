"""A session that records rows of its graph's activations while the chain runs.

The recorded rows depend only on the seed, the sample's position and the call, so that a second run gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bridge_stg.calibration.collect.instrument import PLACES, Activation
from bridge_stg.runtime.backends.session import KVCache, Session, SessionWrapper
from bridge_stg.runtime.bundle.manifest import GraphSpec

ROWS_PER_CALL = 64
"""Maximum number of rows per tensor that one call returns."""

Kind = Callable[[Mapping[str, np.ndarray]], str]
"""Returns the kind of a call, given its inputs; the kinds of a graph get equal shares of the rows."""


@dataclass(eq=False)
class Seen:
    """Statistics of one tensor from one sample.

    Attributes:
        absmax: float32 [K].
        peak: float32 [K], the row with the largest magnitude.
        count: number of rows of all calls.
        kinds: kind of call → kept rows float32 [R, K], and their random ranks float64 [R].
    """

    absmax: np.ndarray
    peak: np.ndarray
    count: int = 0
    kinds: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def rows(self) -> np.ndarray:
        """Return the kept rows [R, K] of all kinds."""
        return np.concatenate([self.kinds[kind][0] for kind in sorted(self.kinds)])


class ActivationRecorder(SessionWrapper):
    """Runs an instrumented graph like the plain one. See `session.Session`.

    `graph` is the spec of the plain graph, `number` its position in the chain, which is part of the random seed, and
    `quota` the number of rows to keep per tensor, sample and kind of call.
    """

    def __init__(
        self,
        session: Session,
        graph: GraphSpec,
        activations: tuple[Activation, ...],
        *,
        number: int,
        kind: Kind,
        quota: int,
        seed: int,
    ) -> None:
        super().__init__(session)
        self.graph, self.activations = graph, activations
        self._number, self._kind, self._quota, self._seed = number, kind, quota, seed
        self.begin(0)

    def begin(self, sample: int) -> None:
        """Start the recording of the sample at a position of the set."""
        self.seen: dict[str, Seen] = {}
        self.calls: dict[str, int] = {}
        self._random = np.random.default_rng([self._seed, sample, self._number])

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        """See `Session.infer`."""
        kind = self._kind(feeds)
        self.calls[kind] = self.calls.get(kind, 0) + 1
        # A call of the language model has no more rows than tokens.
        taken = min(ROWS_PER_CALL, feeds["input_ids"].size if self.graph.cache is not None else ROWS_PER_CALL)
        # One row of each of R equal parts: with a fixed step, rows of pixels would all come from one column.
        places = (np.arange(taken) + self._random.random(taken)) / taken
        ranks = self._random.random(taken)
        places = np.minimum(places, 1 - 1e-6).astype(np.float32)
        outputs = self.session.infer({**feeds, PLACES: places}, cache=cache)
        for activation in self.activations:
            parts = {name: outputs.pop(f"{activation.stem}.{name}") for name in ("absmax", "rows", "index", "count")}
            if int(parts["count"][0]):
                self._add(activation.stem, kind, parts, ranks)
        return outputs

    def _add(self, stem: str, kind: str, parts: Mapping[str, np.ndarray], ranks: np.ndarray) -> None:
        absmax, rows = parts["absmax"], parts["rows"]
        seen = self.seen.get(stem)
        if seen is None:
            seen = self.seen[stem] = Seen(absmax, rows[-1].copy())
        elif absmax.max() > seen.absmax.max():
            seen.peak = rows[-1].copy()
        seen.absmax = np.maximum(seen.absmax, absmax)
        seen.count += int(parts["count"][0])
        new = np.flatnonzero(np.diff(parts["index"][:-1], prepend=-1))  # a short tensor returns a row several times
        values, ranks = rows[new], ranks[new]
        if kind in seen.kinds:
            values, ranks = (np.concatenate(both) for both in zip(seen.kinds[kind], (values, ranks)))
        kept = np.argsort(ranks, kind="stable")[: self._quota]
        seen.kinds[kind] = values[kept], ranks[kept]
