"""Live queries on the operator's sources: one watch per source, shared by all its clients.

A watch begins with its first client and ends with its last. It answers the distinct queries of all clients, so that
the source is read and encoded once. It runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi.sse import ServerSentEvent

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.live.source import open_live
from bridge_stg.runtime.live.watch import LiveOptions, LiveUpdate, LiveWatch
from bridge_stg.server.http.errors import ApiError, api_error, busy, logger, stopping
from bridge_stg.server.live.picture import NewestFrame
from bridge_stg.server.metrics import Metrics

MOST_QUERIES = 16
MOST_CLIENTS = 64
MOST_EVENTS = 64
"""Events that wait for one client; beyond it the oldest are dropped and counted."""


class Viewer:
    """One client of a source."""

    def __init__(self, queries: Sequence[str]) -> None:
        self.queries = tuple(dict.fromkeys(queries))
        self._events: asyncio.Queue[ServerSentEvent | None] = asyncio.Queue(MOST_EVENTS)

    def put(self, event: ServerSentEvent | None) -> bool:
        """Add an event, or None after the last one; return whether the oldest one was dropped for it."""
        full = self._events.full()
        if full:
            self._events.get_nowait()
        self._events.put_nowait(event)
        return full

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        """Yield the events until the last one."""
        while (event := await self._events.get()) is not None:
            yield event


class UpdateText:
    """One update as JSON in parts, serialized once, in the watch's thread, for all clients."""

    def __init__(self, update: LiveUpdate) -> None:
        value = update.to_json()
        self._groundings, self._events = (
            [(part["query"], json.dumps(part, ensure_ascii=False)) for part in value.pop(name)]
            for name in ("groundings", "events")
        )
        self._head = json.dumps(value)[:-1]

    def events_for(self, queries: Sequence[str]) -> list[ServerSentEvent]:
        """Return the events for a client with these queries."""
        answers = dict(self._groundings)
        groundings = ", ".join(answers[query] for query in queries if query in answers)
        events = [text for query, text in self._events if query in queries]
        update = f'{self._head}, "groundings": [{groundings}], "events": [{", ".join(events)}]}}'
        texts = [("update", update), *(("event", text) for text in events)]
        return [ServerSentEvent(event=name, raw_data=text) for name, text in texts]


class SharedWatch:
    """The watch of one source and its clients. Lives in the event loop; its thread calls back into it."""

    def __init__(
        self, name: str, watch: LiveWatch, newest: NewestFrame, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.name, self.watch, self.newest = name, watch, newest
        self.viewers: list[Viewer] = []
        self.ended = False
        self._metrics, self._loop = metrics, loop
        self._dropped = 0
        self.thread = threading.Thread(target=self._run, name=f"bridge-stg live {name}", daemon=True)

    @property
    def queries(self) -> tuple[str, ...]:
        """The distinct queries of all clients."""
        return tuple(dict.fromkeys(query for viewer in self.viewers for query in viewer.queries))

    def end(self, event: ServerSentEvent) -> None:
        """Send the last event to all clients."""
        self.ended = True
        for viewer in self.viewers:
            viewer.put(event)
            viewer.put(None)

    def _run(self) -> None:
        try:
            with self.watch as watch:
                for update in watch:
                    self._call(self._update, UpdateText(update), watch.stats.dropped_coarse_frames)
            last = ServerSentEvent(event="end", data={"ended": self.watch.stats.ended})
        except Exception as error:  # noqa: BLE001  # the thread's border: clients get whatever went wrong
            failure = api_error(error, path=self.newest.address, name=f"The source {self.name}")
            last = ServerSentEvent(event="failed", data=failure.to_json())
        self._call(self.end, last)

    def _call(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(work, *arguments)
        except RuntimeError:  # the loop has ended
            self.watch.stop()

    def _update(self, update: UpdateText, dropped: int) -> None:
        self._metrics.live_updates.labels(self.name).inc()
        self._metrics.live_dropped.labels(self.name).inc(dropped - self._dropped)
        self._dropped = dropped
        for viewer in self.viewers:
            missed = sum(viewer.put(event) for event in update.events_for(viewer.queries))
            self._metrics.live_skipped.labels(self.name).inc(missed)


class LiveHub:
    """All live sources of one server. Clients see their names, not their addresses, which may contain passwords.

    Raises:
        BridgeError: a source cannot be watched, such as a file that does not exist.
    """

    def __init__(
        self, grounder: Grounder, sources: dict[str, str], metrics: Metrics, *, options: dict[str, Any] | None = None
    ) -> None:
        self._grounder, self._sources, self._metrics = grounder, sources, metrics
        self._options = options or {}
        for name, address in sources.items():
            try:
                open_live(address)
            except VideoError as error:
                raise BridgeError(error.code, f"--live {name}: {error}") from error
        self._watches: dict[str, SharedWatch] = {}
        self._ending: list[SharedWatch] = []
        self._closed = False
        metrics.gauge("live_watches", "Sources that are watched.", lambda: len(self._watches))
        watches = self._watches
        metrics.gauge("live_clients", "Clients of live sources.", lambda: sum(len(w.viewers) for w in watches.values()))

    def to_json(self) -> dict[str, Any]:
        """Return the names of the sources and the queries on them."""
        queries = {name: list(watch.queries) for name, watch in self._watches.items()}
        return {
            "live": [
                {"name": name, "watched": name in queries, "queries": queries.get(name, [])} for name in self._sources
            ]
        }

    def join(self, name: str, queries: Sequence[str]) -> Viewer:
        """Begin to watch; every viewer must `leave`.

        Raises:
            ApiError: the source does not exist, or has too many clients or queries.
            QueryError: a query is not valid.
        """
        if self._closed:
            raise stopping()
        if name not in self._sources:
            message = "No live source has this name; GET /v1/live lists them."
            raise ApiError(404, "server.source_not_found", message)
        viewer = Viewer(queries)
        watch = self._watches.get(name)
        if watch is not None and watch.ended:
            watch = None
        together = dict.fromkeys((*(() if watch is None else watch.queries), *viewer.queries))
        if len(together) > MOST_QUERIES or (watch is not None and len(watch.viewers) >= MOST_CLIENTS):
            raise busy(f"A source has at most {MOST_QUERIES} different queries and {MOST_CLIENTS} clients.", 30)
        if watch is None:
            newest = self._open(name)
            source: Any = newest.source
            live = self._grounder.watch(source, list(viewer.queries), **self._options)
            watch = SharedWatch(name, live, newest, self._metrics, asyncio.get_running_loop())
            self._watches[name] = watch
            watch.thread.start()
        else:
            watch.watch.set_queries(list(together))
        watch.viewers.append(viewer)
        return viewer

    def newest_frame(self, name: str) -> NewestFrame:
        """Return the newest frame of a source. Raises ApiError 404 if nobody watches it."""
        if name not in self._watches:
            raise ApiError(404, "server.frame_not_found", "Nobody watches this source, so it has no frame.")
        return self._watches[name].newest

    def leave(self, viewer: Viewer) -> None:
        """Stop watching; the last viewer ends the watch."""
        for name, watch in list(self._watches.items()):
            if viewer not in watch.viewers:
                continue
            watch.viewers.remove(viewer)
            if watch.viewers and not watch.ended:
                watch.watch.set_queries(list(watch.queries))
            else:
                watch.watch.stop()
                if not watch.viewers:
                    del self._watches[name]
                    self._ending.append(watch)
        self._ending = [watch for watch in self._ending if watch.thread.is_alive()]

    def stop(self) -> None:
        """Stop all watches, without waiting."""
        self._closed = True
        for watch in [*self._watches.values(), *self._ending]:
            watch.watch.stop()

    async def close(self) -> None:
        """Stop all watches, and wait for their threads."""
        self.stop()
        watches = [*self._watches.values(), *self._ending]
        for watch in watches:
            watch.end(ServerSentEvent(event="end", data={"ended": "stopping"}))
        for watch in watches:
            await asyncio.get_running_loop().run_in_executor(None, watch.thread.join, 30)
            if watch.thread.is_alive():
                logger.error("the watch of %s did not end", watch.name)

    def _open(self, name: str) -> NewestFrame:
        try:
            return NewestFrame(self._sources[name], timeout_s=LiveOptions(**self._options).stall_s)
        except VideoError as error:  # it existed when the server started
            logger.error("the live source %s: %s", name, error)
            message = f"The source {name} does not exist now; the server's log says why."
            raise ApiError(404, "server.source_not_found", message) from None
