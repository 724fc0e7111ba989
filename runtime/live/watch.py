"""Standing queries on a live stream: a window moves along with it, and they are asked about it again and again.

One thread reads and samples the source (`live_reader`); the caller's own thread, which iterates over the watch, runs
the model. What a frame costs does not grow with time: see `live_window`.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.chain.opened_video import Chain
from bridge_stg.runtime.chain.prompt import check_query
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.errors import BridgeError, Interrupted, QueryError, VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.live.events import Event, EventTracker
from bridge_stg.runtime.live.plan import check_window, plan_stream
from bridge_stg.runtime.live.queue import GroupQueue
from bridge_stg.runtime.live.reader import LiveReader
from bridge_stg.runtime.live.source import LiveSource
from bridge_stg.runtime.live.stats import LiveStats
from bridge_stg.runtime.live.window import LiveWindow, in_stream_time

POLL_S = 0.05
"""How often a watch that waits for frames looks whether it should stop."""


@dataclass(frozen=True)
class LiveOptions:
    """How a stream is watched.

    Attributes:
        every_s: stream time between two rounds of the standing queries.
        window: most coarse frames that the model looks back at.
        allow_none: whether the answer may be that the target is not there.
        deadline_s: seconds after which a round is given up (counted, not raised); None: never.
        duration_s: stream time after which the watch ends; None: with the source.
        stall_s: seconds without a frame after which the source is given up.
        hold_s: how long a frame stands for missing ones after it.
        queue_groups: groups of samples that may wait for the model.
        moved_iou: overlap with the box told last below which a target has moved; 0: `moved` is never told.
    """

    every_s: float = 1.0
    window: int = 32
    allow_none: bool = True
    deadline_s: float | None = None
    duration_s: float | None = None
    stall_s: float = 10.0
    hold_s: float = 2.0
    queue_groups: int = 2
    moved_iou: float = 0.5

    def __post_init__(self) -> None:
        for name in ("every_s", "stall_s", "hold_s", "deadline_s", "duration_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise VideoError(f"{name}={value!r}: expected seconds, more than 0")
        if isinstance(self.queue_groups, bool) or not isinstance(self.queue_groups, int) or self.queue_groups < 1:
            raise VideoError(f"queue_groups={self.queue_groups!r}: expected a whole number, 1 or more")
        if not 0 <= self.moved_iou <= 1:
            raise VideoError(f"moved_iou={self.moved_iou!r}: expected an overlap between 0 and 1")


@dataclass(frozen=True, eq=False)
class LiveUpdate:
    """One round of the standing queries. All times are stream time: what the source says of its frames.

    Attributes:
        known_s: how far the model had seen the stream.
        window: start and end of what it looked at.
        groundings: the answers, in the order of the queries; the texts of `answer` count from the window's start.
        events: what is new, in order of time.
        behind_s: how much stream time had been read beyond `known_s` when the round ended.
        took_s: seconds that the round took.
    """

    known_s: float
    window: tuple[float, float]
    groundings: tuple[Grounding, ...]
    events: tuple[Event, ...]
    behind_s: float
    took_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`."""
        start, end = self.window
        return {
            "known_s": round(self.known_s, 6),
            "window": {"start_s": round(start, 6), "end_s": round(end, 6)},
            "behind_s": round(self.behind_s, 6),
            "took_s": round(self.took_s, 6),
            "groundings": [grounding.to_json() for grounding in self.groundings],
            "events": [event.to_json() for event in self.events],
        }


class LiveWatch:
    """Iterates over the rounds of standing queries on one stream; a context manager. `Grounder.watch` makes it.

    The model runs in the thread that iterates: who takes updates slowly makes the queue drop frames, or the source
    wait. `stop` and `set_queries` may be called from other threads.
    """

    def __init__(
        self,
        chain: Chain,
        source: LiveSource,
        queries: Sequence[str],
        options: LiveOptions,
        *,
        cancel: Any = None,
        feature_budget_bytes: int,
    ) -> None:
        check_window(options.window, chain.spec)
        self.options = options
        self._chain, self._source = chain, source
        self._feature_budget_bytes = feature_budget_bytes
        self._stop = threading.Event()
        self._cancelled = Limits(cancel=cancel).cancelled
        self._lock = threading.Lock()
        self._queries: tuple[str, ...] = ()
        self._stats = LiveStats()
        self._queue = GroupQueue(options.queue_groups, latest_wins=source.keeps_pace)
        self._reader = LiveReader(
            source,
            lambda height, width: plan_stream(height, width, chain.spec, chain.tokenizer, window=options.window),
            self._queue,
            hold_s=options.hold_s,
        )
        self._trackers: dict[str, EventTracker] = {}
        self.set_queries(queries)
        self._updates = self._run()

    @property
    def queries(self) -> tuple[str, ...]:
        """The standing queries."""
        with self._lock:
            return self._queries

    def set_queries(self, queries: Sequence[str]) -> None:
        """Replace the standing queries from the next round on; those that stay keep what is known of them.

        Raises:
            QueryError: one is empty or too long, or two are the same; of several, its place is named.
        """
        if isinstance(queries, str):
            raise QueryError("watch takes a list of queries, but was given one string; put it into a list")
        for i, query in enumerate(queries):
            try:
                check_query(self._chain.spec.prompt, query)
            except QueryError as error:
                raise QueryError(f"query {i} (of 0 to {len(queries) - 1}): {error}") from error
        if len(set(queries)) < len(queries):
            raise QueryError("two of the standing queries are the same; give each once")
        with self._lock:
            self._queries = tuple(queries)

    @property
    def stats(self) -> LiveStats:
        """What has been done so far: a copy."""
        dropped, group = self._queue.dropped, self._chain.spec.vision.temporal_patch_size
        return dataclasses.replace(
            self._stats,
            frames=self._reader.frames,
            gaps=self._reader.gaps,
            coarse_frames=self._stats.groups * group,
            dropped_groups=dropped,
            dropped_coarse_frames=dropped * group,
        )

    def stop(self) -> None:
        """End the watch; the iteration stops, at the latest behind the call of an engine that is under way."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and let go of the source and the window. May be called again."""
        self.stop()
        try:
            self._updates.close()  # type: ignore[attr-defined]
        except ValueError:  # another thread iterates: it closes everything when it gets there
            return
        self._reader.close()

    def __iter__(self) -> Iterator[LiveUpdate]:
        return self

    def __next__(self) -> LiveUpdate:
        return next(self._updates)

    def __enter__(self) -> LiveWatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stopped(self) -> bool:
        return self._stop.is_set() or self._cancelled()

    def _run(self) -> Iterator[LiveUpdate]:
        window: LiveWindow | None = None
        ended = "error"
        try:
            self._reader.start()
            due, answered = 0.0, 0.0
            while True:
                group = self._next_group()
                if group is None:
                    ended = "stopped" if self._stopped() else "source"
                    if window is not None and ended == "source" and answered < window.end_s:
                        yield from self._round(window)
                    return
                with self._chain.usage.call():
                    plan = self._reader.plan
                    assert plan is not None
                    window = window or LiveWindow(self._chain, plan, feature_budget_bytes=self._feature_budget_bytes)
                    limits = Limits(cancel=self._stopped)
                    rebuilt = window.add(group, limits)
                self._stats.add_step(limits.timings, rebuilt=rebuilt)
                self._stats.prefilled_tokens = window.prefilled
                known = window.end_s
                last = self.options.duration_s is not None and known >= self.options.duration_s
                if known >= due or last:
                    every = self.options.every_s
                    self._stats.skipped_answers += max(0, math.floor((known - due) / every + 1e-9)) if due else 0
                    due = every * (math.floor(known / every + 1e-9) + 1)
                    answered = known
                    yield from self._round(window)
                if last:
                    ended = "duration"
                    return
        except Interrupted:
            if not self._stopped():
                raise
            ended = "stopped"
        except GeneratorExit:
            ended = "stopped"
            raise
        finally:
            self._stats.ended = ended
            self._reader.close()
            if window is not None:
                window.close()

    def _next_group(self) -> Any:
        """Return the next group; None if the source has ended or the watch is to stop."""
        while not self._stopped():
            try:
                group = self._queue.get(POLL_S)
            except BridgeError:
                if self._stopped():  # then what the source says no longer matters
                    return None
                raise
            if group is not None or self._queue.ended:
                return group
            if self._reader.silent_s > self.options.stall_s:
                raise VideoError(
                    f"{self._source.name}: no frame came for {self.options.stall_s:g} s; is the source still running? "
                    "Watch it again, or give it more time with stall_s"
                )
        return None

    def _round(self, window: LiveWindow) -> Iterator[LiveUpdate]:
        """Ask the standing queries about the window; nothing comes of a round that is too late."""
        queries, options = self.queries, self.options
        limits = Limits(deadline_s=options.deadline_s, cancel=self._stopped)
        try:
            with self._chain.usage.call():
                asked = window.view().ground_within(limits, list(queries), Task(allow_none=options.allow_none))
        except Interrupted:
            if self._stopped():
                raise
            self._stats.late_answers += 1
            return
        finally:
            self._stats.add_answers(limits.elapsed_s)
        origin = self._reader.origin_s
        known = origin + window.end_s
        shift = origin + window.start_s
        groundings = [in_stream_time(grounding, shift) for grounding in asked]
        self._trackers = {query: self._trackers.get(query) or self._tracker(query) for query in queries}
        events = [
            event
            for query, grounding in zip(queries, groundings, strict=True)
            for event in self._trackers[query].add(grounding, known)
        ]
        newest = self._reader.newest_s
        yield LiveUpdate(
            known_s=known,
            window=(shift, known),
            groundings=tuple(groundings),
            events=tuple(sorted(events, key=lambda event: event.time_s)),
            behind_s=max(0.0, (known if newest is None else newest) - known),
            took_s=limits.elapsed_s,
        )

    def _tracker(self, query: str) -> EventTracker:
        plan = self._reader.plan
        assert plan is not None
        settle_s = plan.group * plan.interval_s + 1 / plan.fine_fps
        return EventTracker(query, settle_s=settle_s, moved_iou=self.options.moved_iou)
