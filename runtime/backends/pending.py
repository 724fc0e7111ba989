"""Sessions that another thread opens while the video is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from bridge_stg.runtime.backends.session import KVCache, Preferences, Session
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError


class PendingSession:
    """A `Session` that another thread opens. A call waits until it is open, and raises what the opening raised."""

    device = None  # sessions on a device share its context, and are opened at once

    def __init__(self, graph: GraphSpec, opening: Future[Session]) -> None:
        self._graph, self._opening = graph, opening

    @property
    def graph(self) -> GraphSpec:
        """See `Session.graph`."""
        return self._graph

    @property
    def preferences(self) -> Preferences:
        """See `Session.preferences`."""
        return self.wait().preferences

    def infer(self, feeds: Mapping[str, Any], *, cache: KVCache | None = None) -> dict[str, Any]:
        """See `Session.infer`."""
        return self.wait().infer(feeds, cache=cache)

    def allocate_cache(self, *, batch: int, capacity: int) -> KVCache:
        """See `Session.allocate_cache`."""
        return self.wait().allocate_cache(batch=batch, capacity=capacity)

    def close(self) -> None:
        """See `Session.close`. Waits for a session that is being opened; a later one is not opened."""
        if not self._opening.cancel() and self._opening.exception() is None:
            self._opening.result().close()

    def wait(self) -> Session:
        """Return the session once it is open. Raises EngineError: the graph was rejected, or this was closed before."""
        try:
            return self._opening.result()
        except CancelledError:
            raise EngineError("engine.closed", f"{self._graph}: this session is closed.") from None


def open_in_order(openers: Mapping[str, tuple[GraphSpec, Callable[[], Session]]]) -> dict[str, PendingSession]:
    """Open sessions in another thread, one after another; return them by name immediately."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="bridge-stg-background")
    sessions = {name: PendingSession(graph, executor.submit(open_it)) for name, (graph, open_it) in openers.items()}
    executor.shutdown(wait=False)  # after the last one
    return sessions
