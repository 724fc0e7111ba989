"""A pool of KV caches of one language model, allocated in a few sizes and reused.

Allocation zero-fills a cache, and an engine binds its buffers once per size, so caches are kept. Content of an earlier
call is harmless: a position is written before it becomes visible.
"""

from __future__ import annotations

import threading

from bridge_stg.runtime.backends.session import KVCache, Session
from bridge_stg.runtime.host.memory import available_bytes

DEFAULT_BUDGET_BYTES = 2**29
"""Budget on a host whose free memory is unknown; on a host with at least twice as much, the smallest budget."""
DEVICE_DIVISOR, HOST_DIVISOR = 2, 8
"""The budget is a half of a GPU's free memory, or an eighth of the host's, which runs other programs too."""
BUCKET_POSITIONS = 256
"""Capacities are multiples of this: some attention kernels compute over the whole cache, so it should not be larger."""


class KVPool:
    """Provides caches of a language model's session; safe to use from many threads.

    Args:
        session: allocates the caches.
        budget_bytes: maximum bytes of one batch, and of the unused caches together; None: by the memory that is free
            when a batch is formed.
    """

    def __init__(self, session: Session, *, budget_bytes: int | None = None) -> None:
        self._session = session
        ranges = session.graph.ranges
        self._least, self._most = ranges.get("S", (1, None))
        self._most_rows = ranges.get("B", (1, None))[1]
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._unused: list[KVCache] = []

    def take(self, *, batch: int, positions: int) -> KVCache:
        """Return a cache of `batch` rows of at least `positions` tokens each. Return it with `give` after use."""
        capacity = self._capacity(positions)
        with self._lock:
            fitting = [c for c in self._unused if c.batch == batch and capacity <= c.capacity < 2 * capacity]
            if fitting:
                best = min(fitting, key=lambda cache: cache.capacity)  # attention may compute over all of it
                self._unused = [cache for cache in self._unused if cache is not best]
                return best
        return self._session.allocate_cache(batch=batch, capacity=capacity)

    def give(self, cache: KVCache) -> None:
        """Take a cache back. The cache of a failed call must not be returned."""
        with self._lock:
            self._unused.append(cache)
            budget = self._budget(unused := sum(kept.nbytes for kept in self._unused))
            while unused > budget:
                unused -= self._unused.pop(0).nbytes

    def rows(self, like: KVCache, *, positions: int) -> int:
        """Return how many rows of `positions` tokens fit the budget and the session, at least one.

        `like` is a cache of the same model, for the bytes per token.
        """
        row_bytes = like.nbytes // (like.batch * like.capacity) * self._capacity(positions)
        with self._lock:
            budget = self._budget(sum(kept.nbytes for kept in self._unused))
        rows = max(1, budget // max(row_bytes, 1))
        return rows if self._most_rows is None else min(rows, self._most_rows)

    def _budget(self, unused: int) -> int:
        """Return the budget now; `unused` bytes of kept caches count as free."""
        if self._budget_bytes is not None:
            return self._budget_bytes
        if self._session.device is not None:
            return (self._session.device.free_bytes + unused) // DEVICE_DIVISOR
        if (free := available_bytes()) is None:
            return DEFAULT_BUDGET_BYTES
        return max((free + unused) // HOST_DIVISOR, min(DEFAULT_BUDGET_BYTES, (free + unused) // 2))

    def _capacity(self, positions: int) -> int:
        """Return the bucket for a number of positions, within the session's limits (an engine's may be fixed)."""
        capacity = max(bucketed(positions), self._least)
        return capacity if self._most is None else max(positions, min(capacity, self._most))

    def clear(self) -> None:
        """Free the unused caches."""
        with self._lock:
            self._unused.clear()


def bucketed(positions: int) -> int:
    """Round a number of positions up to the next multiple of the bucket."""
    return -(-max(positions, 1) // BUCKET_POSITIONS) * BUCKET_POSITIONS
