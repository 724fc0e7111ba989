"""A video file whose search uses an index: what it has of the file is neither decoded nor encoded again.

The first search notes the times of all frames while it decodes them. Later ones sample these times without pixels, and
read the frames of which the index has no tokens, or no feature map, by seeking.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.index.coarse import facts_from_arrays, facts_to_arrays
from bridge_stg.runtime.index.fine import StoredMaps
from bridge_stg.runtime.index.index import VisualCache
from bridge_stg.runtime.live.cuts import CutFinder
from bridge_stg.runtime.live.plan import LivePlan
from bridge_stg.runtime.live.source import Frames, LiveSource
from bridge_stg.runtime.live.window import StoredWindows
from bridge_stg.runtime.search.reader import FileReader
from bridge_stg.runtime.video.file import FileFacts

KIND = "facts"


class IndexedVideo:
    """A video file in a search, with its cache; a context manager.

    Args:
        cache: what is stored of the file.
        reader: reads the file.
        spec: the model's sizes and rates.
        cuts: see `SearchOptions`.
        as_tokens: whether fine frames are visual tokens; otherwise feature maps.

    Attributes:
        facts: what an earlier pass over the file found out; None: it has to be decoded.
        cuts: finds the cuts, or passes those of the earlier pass on; None: cuts are not searched.
        source: the frames, without pixels if `facts` are known: uint8 [H, W, 0].
    """

    def __init__(self, cache: VisualCache, reader: FileReader, spec: ModelSpec, *, cuts: bool, as_tokens: bool) -> None:
        self._cache, self._reader, self._spec = cache, reader, spec
        self._key: Mapping[str, Any] = {"stream": reader.stream, "cuts": cuts}
        self._kind = "fine-tokens" if as_tokens else "fine-maps"
        found = cache.get(KIND, self._key)
        self.facts: FileFacts | None = None
        self._decoded_facts: FileFacts | None = None
        values: Mapping[str, Any] = {"cuts": None}
        if found is not None:
            self.facts, values = facts_from_arrays(found)
        self.cuts = CutFinder(values["cuts"]) if cuts else None
        self.source = LiveSource(reader.path, False, self._decoded if self.facts is None else self._noted)
        if self.facts is not None:
            self._note(self.facts)

    def _decoded(self, stop: threading.Event) -> Frames:
        self._decoded_facts = yield from self._reader.frames(stop)
        if self._decoded_facts is not None:
            self._note(self._decoded_facts)

    def keep(self) -> None:
        """Store what this pass has found out, after its last group. Raises HostError as `VisualCache.put` does."""
        if self._decoded_facts is not None:
            cuts = None if self.cuts is None else self.cuts.times
            self._cache.put(KIND, self._key, facts_to_arrays(self._decoded_facts, cuts=cuts))

    def _note(self, facts: FileFacts) -> None:
        self.source.times_from.clock, self.source.times_from.stream = facts.clock, facts.stream

    def _noted(self, stop: threading.Event) -> Frames:
        assert self.facts is not None
        width, height = self.facts.size
        blank = np.empty((height, width, 0), np.uint8)
        for time in self.facts.times.tolist():
            if stop.is_set():
                return
            yield time, lambda: blank

    def stored(self, plan: LivePlan, shot_s: float) -> StoredWindows:
        """Return what is stored for one sampling of the shot that starts at `shot_s`."""
        sampled = {**self._key, "shot_s": shot_s, "size": plan.coarse_size, "interval_s": plan.interval_s}
        fine = {**self._key, "shot_s": shot_s, "size": plan.fine_size, "fps": plan.fine_fps, "from": "search"}
        groups = StoredMaps(self._cache, "groups", sampled)
        return StoredWindows(groups, StoredMaps(self._cache, self._kind, fine), self.pictures)

    def pictures(self, times: np.ndarray, size: tuple[int, int], limits: Limits) -> np.ndarray:
        """Return the frames that start at these times [N ≥ 1], uint8 [N, *size, 3], after `facts` are known."""
        assert self.facts is not None
        return self._reader.pictures(self.facts, self._spec, np.searchsorted(self.facts.times, times), size, limits)

    def __enter__(self) -> IndexedVideo:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.close()
