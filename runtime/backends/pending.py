"""Sessions that another thread opens, so that the video can be read meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bridge_stg.runtime.backends.session import KVCache, Preferences, Session
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.threads import Background


class PendingSession:
    """A `Session` that another thread opens. A call waits until it is open, and raises what the opening raised.

    Args:
        graph: graph of the session.
        open_it: opens the session; called once, by `open_in_order`.
    """

    device = None  # sessions on a device share its context, and are opened at once

    def __init__(self, graph: GraphSpec, open_it: Callable[[], Session]) -> None:
        self._graph, self._open_it = graph, open_it
        self._session: Session | None = None
        self._error: BaseException | None = None
        self._settled = threading.Event()
        self._closed = False

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
        """See `Session.close`. Waits for a session that is being opened; a later one is not opened any more."""
        self._closed = True
        self._settled.wait()
        if self._session is not None:
            self._session.close()

    def wait(self) -> Session:
        """Return the session once it is open.

        Raises:
            EngineError: the backend rejected the graph, or this was closed before.
        """
        self._settled.wait()
        if self._error is not None:
            raise self._error
        if self._session is None:
            raise EngineError("engine.closed", f"{self._graph}: this session is closed.")
        return self._session

    def open_now(self) -> None:
        """Open the session in this thread, unless it was closed."""
        try:
            if not self._closed:
                self._session = self._open_it()
        except BaseException as error:  # noqa: BLE001 - `wait` raises it in the caller's thread
            self._error = error
        finally:
            self._settled.set()


def open_in_order(sessions: Sequence[PendingSession]) -> None:
    """Start a thread that opens the sessions in order."""

    def open_all() -> None:
        for session in sessions:
            session.open_now()

    Background(open_all)
