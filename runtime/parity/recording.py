"""A session that records every call of another session, in the form that `golden.write_case` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, Session, SessionWrapper

Call = tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]  # graph, inputs, outputs; without the KV cache


class RecordingSession(SessionWrapper):
    """Run a graph on another session, and append host copies of the inputs and outputs of every call to `calls`.

    The KV cache is not copied: a replay fills its own.
    """

    def __init__(self, session: Session, calls: list[Call]) -> None:
        super().__init__(session)
        self._calls = calls
        self.capacity = 0  # positions of the largest KV cache that was used

    def infer(self, feeds: Mapping[str, Any], *, cache: KVCache | None = None) -> dict[str, Any]:
        """Run the graph and record the call; see `Session.infer`."""
        outputs = self.session.infer(feeds, cache=cache)
        if cache is not None:
            self.capacity = max(self.capacity, cache.capacity)
        inputs, results = ({name: np.array(array) for name, array in arrays.items()} for arrays in (feeds, outputs))
        self._calls.append((self.graph.name, inputs, results))
        return outputs
