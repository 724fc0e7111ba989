"""Standing queries on the operator's own sources: one watch a source, shared by all who look at it.

A watch begins with its first client and ends with its last. Its queries are those of all its clients, each once, so
that the source is read and encoded once whoever asks. It runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.live.source import open_live
from bridge_stg.runtime.live.watch import LiveOptions, LiveUpdate, LiveWatch
from bridge_stg.server.http.errors import ApiError, api_error, full, logger, stopping
from bridge_stg.server.jobs.events import KEEP_ALIVE, KEEP_ALIVE_S, event
from bridge_stg.server.live.picture import Looking
from bridge_stg.server.metrics import Metrics

MOST_QUERIES = 16
MOST_CLIENTS = 64
MOST_BEHIND = 64
"""Events that may wait for one client; the oldest give way, and are counted."""


class Viewer:
    """One client of a source."""

    def __init__(self, queries: Sequence[str]) -> None:
        self.queries = tuple(dict.fromkeys(queries))
        self.events: deque[str] = deque()
        self.ended = False
        self.news = asyncio.Event()

    def put(self, text: str) -> int:
        """Hand over an event; return how many were dropped for it."""
        dropped = 0
        while len(self.events) >= MOST_BEHIND:
            self.events.popleft()
            dropped += 1
        self.events.append(text)
        self.news.set()
        return dropped


@dataclass(frozen=True)
class Told:
    """One update as JSON in parts, so that it is written once, in the watch's thread, for all who are told of it.

    Attributes:
        head: all but the answers and events, without its closing brace.
        groundings: the answers by query.
        events: the queries and texts of the events, in order of time.
    """

    head: str
    groundings: dict[str, str]
    events: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, update: LiveUpdate) -> Told:
        """Write an update."""
        value = update.to_json()
        answers, happened = value.pop("groundings"), value.pop("events")
        return cls(
            json.dumps(value)[:-1],
            {answer["query"]: json.dumps(answer, ensure_ascii=False) for answer in answers},
            tuple((one["query"], json.dumps(one, ensure_ascii=False)) for one in happened),
        )

    def texts(self, queries: Sequence[str]) -> list[str]:
        """Return the events to send to who asks these queries."""
        answers = ", ".join(self.groundings[query] for query in queries if query in self.groundings)
        happened = [text for query, text in self.events if query in queries]
        update = f'{self.head}, "groundings": [{answers}], "events": [{", ".join(happened)}]}}'
        return [event("update", update), *(event("event", text) for text in happened)]


class SharedWatch:
    """The watch of one source and its clients. Lives in the event loop; its thread calls back into it."""

    def __init__(
        self, name: str, watch: LiveWatch, looking: Looking, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.name, self.watch, self.looking = name, watch, looking
        self.viewers: list[Viewer] = []
        self.ended = False
        self._metrics, self._loop = metrics, loop
        self._dropped = 0
        self.thread = threading.Thread(target=self._run, name=f"bridge-stg live {name}", daemon=True)

    @property
    def queries(self) -> tuple[str, ...]:
        """The queries of all clients, each once."""
        return tuple(dict.fromkeys(query for viewer in self.viewers for query in viewer.queries))

    def _run(self) -> None:
        refusal: ApiError | None = None
        try:
            with self.watch as watch:
                for update in watch:
                    self._call(self._updated, Told.of(update), watch.stats.dropped_coarse_frames)
        except Exception as error:
            refusal = api_error(error, path=self.looking.address, name=f"The source {self.name}")
        ended = self.watch.stats.ended
        self._call(self._end, ended, refusal)

    def _call(self, work: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(work, *arguments)
        except RuntimeError:  # the loop has ended
            self.watch.stop()

    def _updated(self, told: Told, dropped: int) -> None:
        self._metrics.live_updates.labels(self.name).inc()
        self._metrics.live_dropped.labels(self.name).inc(dropped - self._dropped)
        self._dropped = dropped
        for viewer in self.viewers:
            missed = sum(viewer.put(text) for text in told.texts(viewer.queries))
            self._metrics.live_skipped.labels(self.name).inc(missed)

    def _end(self, ended: str, refusal: ApiError | None) -> None:
        self.ended = True
        last = event("end", {"ended": ended}) if refusal is None else event("failed", refusal.to_json())
        for viewer in self.viewers:
            viewer.put(last)
            viewer.ended = True


class LiveHub:
    """All sources of one server.

    Args:
        sources: what `Grounder.watch` takes, by name; addresses, which may hold passwords, are told to nobody.
        options: the fields of `LiveOptions`.

    Raises:
        BridgeError: a source is nothing that can be watched, such as a file that is not there.
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
                raise BridgeError(f"--live {name}: {error}") from error
        self._watches: dict[str, SharedWatch] = {}
        self._ending: list[SharedWatch] = []
        self._closed = False
        metrics.gauge("live_watches", "Sources that are watched.", lambda: len(self._watches))
        metrics.gauge(
            "live_clients",
            "Clients of live sources.",
            lambda: sum(len(watch.viewers) for watch in list(self._watches.values())),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the sources' names, and who watches them."""
        return {
            "live": [
                {"name": name, "watched": name in self._watches, "queries": list(self._queries(name))}
                for name in self._sources
            ]
        }

    def join(self, name: str, queries: Sequence[str]) -> Viewer:
        """Begin to watch; every viewer must `leave`.

        Raises:
            ApiError: there is no such source, or too much is asked of it.
            QueryError: a query cannot be asked.
        """
        if self._closed:
            raise stopping()
        if name not in self._sources:
            raise ApiError(404, "no_source", "There is no live source of that name; GET /v1/live lists them.")
        viewer = Viewer(queries)
        watch = self._watches.get(name)
        if watch is not None and watch.ended:
            watch = None
        together = dict.fromkeys((*(() if watch is None else watch.queries), *viewer.queries))
        if len(together) > MOST_QUERIES or (watch is not None and len(watch.viewers) >= MOST_CLIENTS):
            raise full(f"This source is asked {MOST_QUERIES} different queries, or watched by {MOST_CLIENTS}.", 30)
        if watch is None:
            looking = self._looking(name)
            source: Any = looking.source
            live = self._grounder.watch(source, list(viewer.queries), **self._options)
            watch = SharedWatch(name, live, looking, self._metrics, asyncio.get_running_loop())
            self._watches[name] = watch
            watch.viewers.append(viewer)
            watch.thread.start()
        else:
            watch.watch.set_queries(list(together))
            watch.viewers.append(viewer)
        return viewer

    def looking(self, name: str) -> Looking:
        """Return where a source's newest picture is. Raises ApiError 404 if nobody watches it."""
        if name not in self._watches:
            raise ApiError(404, "no_picture", "Nobody watches this source, so there is no picture of it.")
        return self._watches[name].looking

    def leave(self, viewer: Viewer) -> None:
        """Stop watching; the last one ends the watch."""
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
        """Tell all watches to end."""
        self._closed = True
        for watch in [*self._watches.values(), *self._ending]:
            watch.watch.stop()

    async def close(self) -> None:
        """End all watches, and wait for their threads."""
        self.stop()
        watches = [*self._watches.values(), *self._ending]
        for watch in watches:
            for viewer in watch.viewers:
                viewer.put(event("end", {"ended": "stopping"}))
                viewer.ended = True
        loop = asyncio.get_running_loop()
        for watch in watches:
            await loop.run_in_executor(None, watch.thread.join, 30)
            if watch.thread.is_alive():
                logger.error("the watch of %s did not end", watch.name)

    def _looking(self, name: str) -> Looking:
        try:
            return Looking(self._sources[name], timeout_s=LiveOptions(**self._options).stall_s)
        except VideoError as error:  # it was there when the server began
            logger.error("the live source %s: %s", name, error)
            raise ApiError(
                404, "no_source", f"The source {name} is not there now; the server's log says why."
            ) from None

    def _queries(self, name: str) -> tuple[str, ...]:
        return self._watches[name].queries if name in self._watches else ()


async def live_events(hub: LiveHub, viewer: Viewer) -> AsyncIterator[str]:
    """Yield what a viewer is told, until the source ends."""
    try:
        while True:
            while viewer.events:
                yield viewer.events.popleft()
            if viewer.ended:
                return
            viewer.news.clear()
            try:
                await asyncio.wait_for(viewer.news.wait(), KEEP_ALIVE_S)
            except asyncio.TimeoutError:
                yield KEEP_ALIVE
    finally:
        hub.leave(viewer)
