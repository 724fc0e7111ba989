"""Live queries on the operator's sources: one watch per source, shared by all its clients.

A watch begins with its first client and ends with its last. It answers the deduplicated queries of all clients, so that
the source is read and encoded once. It runs in its own thread.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from fastapi.sse import ServerSentEvent

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.live.source import Frames, LiveSource, open_live
from bridge_stg.runtime.live.watch import LiveOptions, LiveUpdate, LiveWatch
from bridge_stg.server.http import schemas
from bridge_stg.server.http.errors import ApiError, api_error, busy, logger
from bridge_stg.server.metrics import Metrics

MOST_QUERIES = 16
MOST_CLIENTS = 64
MOST_EVENTS = 64  # events that wait for one client; beyond it the oldest are dropped and counted


class NewestFrame:
    """A live source that keeps its newest frame. Messages of the runtime contain `address`; watch `source`."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self._inner = inner = open_live(address, realtime=True, timeout_s=timeout_s)
        self.address = inner.name
        self._converting = threading.Lock()  # PyAV converts a frame in one thread at a time
        self._newest: tuple[float, Callable[[], np.ndarray]] | None = None
        self.source = LiveSource(inner.name, inner.keeps_pace, self._read)

    def read(self) -> tuple[np.ndarray, float] | None:
        """Return the newest frame, uint8 [H, W, 3], and its time in the stream; None before the first frame."""
        newest = self._newest
        return None if newest is None else (newest[1](), newest[0])

    def _read(self, stop: threading.Event) -> Frames:
        for time_s, frame in self._inner.frames(stop):
            self._newest = time_s, partial(self._convert, frame)
            yield self._newest

    def _convert(self, frame: Callable[[], np.ndarray]) -> np.ndarray:
        with self._converting:
            return frame()


class Viewer:
    """One client of a source, with distinct queries."""

    def __init__(self, queries: Sequence[str]) -> None:
        self.queries = queries
        self._events: asyncio.Queue[ServerSentEvent | None] = asyncio.Queue(MOST_EVENTS)

    def put(self, event: ServerSentEvent | None) -> bool:
        """Add an event, or None after the last one; return whether the oldest one was dropped for it."""
        full = self._events.full()
        if full:
            self._events.get_nowait()
        self._events.put_nowait(event)
        return full

    def skip_events(self) -> bool:
        """Drop the events so far; return whether the last one was among them."""
        while not self._events.empty():
            if self._events.get_nowait() is None:
                return True
        return False

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

    def __init__(self, name: str, watch: LiveWatch, newest: NewestFrame, metrics: Metrics) -> None:
        self.name, self.watch, self.newest = name, watch, newest
        self.viewers: list[Viewer] = []
        self.ended = False
        self.update: LiveUpdate | None = None  # the newest round
        self._metrics, self._loop = metrics, asyncio.get_running_loop()
        self._dropped = 0
        self.thread = threading.Thread(target=self._run, name=f"bridge-stg live {name}", daemon=True)
        self.thread.start()

    @property
    def queries(self) -> tuple[str, ...]:
        """The deduplicated queries of all clients."""
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
                    self._call(self._update, update, UpdateText(update), watch.stats.dropped_coarse_frames)
            last = ServerSentEvent(event="end", data={"ended": self.watch.stats.ended})
        except Exception as error:  # noqa: BLE001  # the thread's boundary: clients get every error
            failure = api_error(error, path=self.newest.address, name=f"The source {self.name}")
            last = ServerSentEvent(event="failed", data=failure.to_json())
        self._call(self.end, last)

    def _call(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(work, *arguments)
        except RuntimeError:  # the loop has ended
            self.watch.stop()

    def _update(self, update: LiveUpdate, text: UpdateText, dropped: int) -> None:
        self.update = update
        self._metrics.live_latency.labels(self.name).observe(update.latency_s)
        self._metrics.live_updates.labels(self.name).inc()
        self._metrics.live_dropped.labels(self.name).inc(dropped - self._dropped)
        self._dropped = dropped
        for viewer in self.viewers:
            missed = sum(viewer.put(event) for event in text.events_for(viewer.queries))
            self._metrics.live_skipped.labels(self.name).inc(missed)


class LiveHub:
    """All live sources of one server. Clients see their names, not their addresses, which may contain passwords.

    Raises BridgeError if a source cannot be watched, such as a file that does not exist. `options` are the fields of
    `LiveOptions`.
    """

    def __init__(
        self, grounder: Grounder, sources: Mapping[str, str], metrics: Metrics, options: dict[str, Any]
    ) -> None:
        self._grounder, self._sources, self._metrics, self._options = grounder, sources, metrics, options
        for name, address in sources.items():
            try:
                open_live(address)
            except VideoError as error:
                raise BridgeError(error.code, f"--live {name}: {error}") from error
        self._watches: dict[str, SharedWatch] = {}
        self._ending: list[SharedWatch] = []
        metrics.gauge("live_watches", "Sources that are watched.", lambda: len(self._watches))
        watches = self._watches
        metrics.gauge("live_clients", "Clients of live sources.", lambda: sum(len(w.viewers) for w in watches.values()))

    def sources(self) -> list[schemas.LiveSource]:
        """Return the sources and the queries on them."""
        queries = {name: list(watch.queries) for name, watch in self._watches.items()}
        return [
            schemas.LiveSource(name=name, watched=name in queries, queries=queries.get(name, []))
            for name in self._sources
        ]

    @contextmanager
    def viewer(self, name: str, queries: Sequence[str]) -> Iterator[Viewer]:
        """Watch a source within the block; the last viewer ends the watch. Raises ApiError, and QueryError."""
        if name not in self._sources:
            message = "No live source has this name; GET /v1/live lists them."
            raise ApiError(404, "server.source_not_found", message)
        viewer = Viewer(list(dict.fromkeys(queries)))
        watch = self._watches.get(name)
        current = None if watch is None or watch.ended else watch
        together = list(dict.fromkeys([*(current.queries if current else ()), *viewer.queries]))
        if len(together) > MOST_QUERIES or (current and len(current.viewers) >= MOST_CLIENTS):
            raise busy(f"A source has at most {MOST_QUERIES} different queries and {MOST_CLIENTS} clients.", 30)
        if current is None:
            current = self._watches[name] = self._start(name, together)
        else:
            current.watch.set_queries(together)
        current.viewers.append(viewer)
        try:
            yield viewer
        finally:
            self._leave(viewer, current)

    def watch(self, name: str) -> SharedWatch:
        """Return the watch of a source. Raises ApiError 404 if no client watches it."""
        if name not in self._watches:
            raise ApiError(404, "server.frame_not_found", "No client watches this source; watch it first.")
        return self._watches[name]

    def stop(self) -> None:
        """Stop all watches, without waiting."""
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

    def _start(self, name: str, queries: Sequence[str]) -> SharedWatch:
        try:
            newest = NewestFrame(self._sources[name], timeout_s=LiveOptions(**self._options).stall_s)
        except VideoError as error:  # it existed when the server started
            logger.error("the live source %s: %s", name, error)
            message = f"The source {name} is not available; see the server's log."
            raise ApiError(404, "server.source_not_found", message) from None
        source: Any = newest.source
        return SharedWatch(name, self._grounder.watch(source, queries, **self._options), newest, self._metrics)

    def _leave(self, viewer: Viewer, watch: SharedWatch) -> None:
        watch.viewers.remove(viewer)
        if watch.viewers and not watch.ended:
            watch.watch.set_queries(watch.queries)
            return
        watch.watch.stop()
        if not watch.viewers and self._watches.get(watch.name) is watch:
            del self._watches[watch.name]
            self._ending = [*(other for other in self._ending if other.thread.is_alive()), watch]
