"""Feature maps of fine frames, or visual tokens of groups, in a cache: in blocks of adjacent places of their grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bridge_stg.runtime.index.index import VisualCache

BLOCK = 16
"""Frames of a file: a span's frames are adjacent, and a map of a large model takes megabytes."""

Entries = Mapping[int, "tuple[np.ndarray, float]"]
"""Index on the grid → feature map [h, w, C] or visual tokens [1+D, n, H], and the time of the frame shown."""


class StoredMaps:
    """Feature maps or visual tokens by their index on a grid of times.

    Args:
        cache: the cache of the file.
        kind: what is stored, the beginning of the files' names.
        grid: all that the values depend on beyond the index: rate of the grid, size of the frames, video stream.
    """

    def __init__(self, cache: VisualCache, kind: str, grid: Mapping[str, Any]) -> None:
        self._cache, self._kind, self._grid = cache, kind, dict(grid)

    def get(self, indices: Iterable[int]) -> dict[int, tuple[np.ndarray, float]]:
        """Return the entries that are stored. Raises HostError as `VisualCache.get` does."""
        wanted, found = set(indices), {}
        for block in sorted({index // BLOCK for index in wanted}):
            stored = self._cache.get(self._kind, {**self._grid, "block": block})
            if stored is not None:
                for index, values, time in zip(stored["indices"].tolist(), stored["values"], stored["times"]):
                    if index in wanted:
                        found[index] = (values.copy(), float(time))  # a view would keep the block alive
        return found

    def put(self, entries: Entries) -> None:
        """Store entries. Raises HostError as `VisualCache.put` does."""
        for block in sorted({index // BLOCK for index in entries}):
            some = {index: entry for index, entry in entries.items() if index // BLOCK == block}
            arrays = {
                "indices": np.array(list(some), np.int64),
                "values": np.stack([values for values, _ in some.values()]),
                "times": np.array([time for _, time in some.values()]),
            }
            self._cache.merge(self._kind, {**self._grid, "block": block}, arrays, by="indices")
