"""The key/value caches of one language model: allocated in a few sizes, handed out, taken back.

Allocating zero-fills a cache, and an engine binds its buffers once a size; so caches are kept and used again.
What an earlier call left in one is harmless: a position is written before it becomes visible.
"""

from __future__ import annotations

import threading

from bridge_stg.runtime.backends.session import KVCache, Session

DEFAULT_BUDGET_BYTES = 2**29
BUCKET_POSITIONS = 256
"""Capacities are multiples of this: an attention kernel that works over the whole cache stays close to its need."""


class KVPool:
    """Hands out caches of a language model's session; safe to use from many threads.

    Args:
        session: allocates the caches.
        budget_bytes: what the rows of one batch may hold together; unused caches are kept up to the same size.
    """

    def __init__(self, session: Session, *, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self._session = session
        ranges = session.graph.ranges
        self._least, self._most = ranges.get("S", (1, None))
        self._most_rows = ranges.get("B", (1, None))[1]
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._unused: list[KVCache] = []

    def take(self, *, batch: int, positions: int) -> KVCache:
        """Return a cache of `batch` rows that holds at least `positions` tokens each, to be given back."""
        capacity = self._capacity(positions)
        with self._lock:
            fitting = [c for c in self._unused if c.batch == batch and capacity <= c.capacity < 2 * capacity]
            if fitting:
                best = min(fitting, key=lambda cache: cache.capacity)  # attention may work over all of it
                self._unused = [cache for cache in self._unused if cache is not best]
                return best
        return self._session.allocate_cache(batch=batch, capacity=capacity)

    def give(self, cache: KVCache) -> None:
        """Take a cache back. One that a failed call may have left in a bad state must not come back."""
        with self._lock:
            self._unused.append(cache)
            while sum(unused.nbytes for unused in self._unused) > self._budget_bytes:
                self._unused.pop(0)

    def rows(self, like: KVCache, *, positions: int) -> int:
        """Return how many rows of `positions` tokens fit the budget and the session, at least one.

        `like` tells a token's bytes.
        """
        row_bytes = like.nbytes // (like.batch * like.capacity) * self._capacity(positions)
        rows = max(1, self._budget_bytes // max(row_bytes, 1))
        return rows if self._most_rows is None else min(rows, self._most_rows)

    def _capacity(self, positions: int) -> int:
        """The bucket for so many positions, within what the session takes: in an engine it may be fixed."""
        capacity = max(bucketed(positions), self._least)
        return capacity if self._most is None else max(positions, min(capacity, self._most))

    def clear(self) -> None:
        """Let go of the unused caches."""
        with self._lock:
            self._unused.clear()


def bucketed(positions: int) -> int:
    """Return the capacity for so many positions: the next multiple of the bucket."""
    return -(-max(positions, 1) // BUCKET_POSITIONS) * BUCKET_POSITIONS
