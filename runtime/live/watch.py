"""Standing queries on a live stream, answered repeatedly for a window that moves with the stream.

A background thread reads and samples the source (`reader`); the caller's thread, which iterates over the watch, runs
the model. The cost per frame is constant (`window`).
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.opened_video import Chain
from bridge_stg.runtime.chain.prompt import check_query
from bridge_stg.runtime.chain.results import Grounding, span_json
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.errors import BridgeError, Interrupted, QueryError, VideoError
from bridge_stg.runtime.host.limits import Cancel, Limits
from bridge_stg.runtime.host.parse import is_count, is_number
from bridge_stg.runtime.live.events import Event, EventTracker, wall_json
from bridge_stg.runtime.live.plan import LivePlan, longest_window_s, plan_stream, window_groups
from bridge_stg.runtime.live.reader import POLL_S, GroupQueue, LiveReader
from bridge_stg.runtime.live.sampling import LiveGroup
from bridge_stg.runtime.live.source import LiveSource
from bridge_stg.runtime.live.stats import LiveStats
from bridge_stg.runtime.live.window import LiveWindow, in_stream_time

WINDOW_S = 16.0  # default of `LiveOptions.window_s`
LATENCIES = 1000  # newest rounds whose latency is kept


@dataclass(frozen=True)
class LiveOptions:
    """How a stream is watched.

    Attributes:
        every_s: stream time between two rounds of the standing queries, in seconds.
        window_s: seconds of the window, rounded to whole groups of coarse frames; None: `WINDOW_S`, or what the model
            reads at once if that is shorter.
        allow_none: whether the answer may be that the target is absent.
        deadline_s: seconds after which a round is stopped (counted, no error); None: never.
        duration_s: stream time after which the watch ends; None: at the end of the source.
        stall_s: seconds without a frame after which the watch fails.
        hold_s: seconds for which a frame stays the current one if no other follows.
        queue_groups: maximum number of groups of samples that wait for the model.
        moved_iou: overlap with the last reported box below which a target has moved; 0 disables `moved`.
    """

    every_s: float = 1.0
    window_s: float | None = None
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
            if value is not None and not (is_number(value) and value > 0):
                raise VideoError("live.bad_option", f"{name}={value!r}: expected a finite number of seconds above 0")
        if not is_count(self.queue_groups):
            raise VideoError("live.bad_option", f"queue_groups={self.queue_groups!r}: expected 1 or more groups")
        if not (is_number(self.moved_iou) and 0 <= self.moved_iou <= 1):
            raise VideoError("live.bad_option", f"moved_iou={self.moved_iou!r}: expected an overlap from 0 to 1")

    def groups(self, spec: ModelSpec) -> int:
        """Return the groups of coarse frames of a window. Raises VideoError if the model cannot read as many."""
        return window_groups(spec, min(WINDOW_S, longest_window_s(spec)) if self.window_s is None else self.window_s)


@dataclass(frozen=True, eq=False)
class LiveUpdate:
    """One round of the standing queries. All times are stream time, as given by the source.

    Attributes:
        known_s: stream time up to which the model has seen the stream.
        window: start and end of the window.
        groundings: the answers, in the order of the queries; times in the text `answer` count from the window's start.
        events: the new events in order of time.
        behind_s: stream time read after `known_s` by the end of the round, in seconds.
        took_s: duration of the round, in seconds.
        latency_s: seconds from the arrival of the newest frame of the window to the answers.
        wall_time: when that frame arrived, in UTC.
    """

    known_s: float
    window: tuple[float, float]
    groundings: tuple[Grounding, ...]
    events: tuple[Event, ...]
    behind_s: float
    took_s: float
    latency_s: float
    wall_time: datetime

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`."""
        return {
            "wall_time": wall_json(self.wall_time),
            "known_s": round(self.known_s, 6),
            "window": span_json(self.window),
            "behind_s": round(self.behind_s, 6),
            "took_s": round(self.took_s, 6),
            "latency_s": round(self.latency_s, 6),
            "groundings": [grounding.to_json() for grounding in self.groundings],
            "events": [event.to_json() for event in self.events],
        }


class LiveWatch(Iterator[LiveUpdate], AbstractContextManager["LiveWatch"]):
    """Iterates over the rounds of standing queries on one stream; a context manager. `Grounder.watch` makes it.

    The model runs in the thread that iterates; a slow consumer makes the queue drop frames, or the source wait.
    `stop` and `set_queries` may be called from other threads.
    """

    def __init__(
        self,
        chain: Chain,
        source: LiveSource,
        queries: Sequence[str],
        options: LiveOptions,
        *,
        cancel: Cancel | None = None,
        feature_budget_bytes: int,
    ) -> None:
        groups = options.groups(chain.spec)
        self.options = options
        self.source = source
        self._chain = chain
        self._feature_budget_bytes = feature_budget_bytes
        self._stop = threading.Event()
        self._cancelled = Limits(cancel=cancel).cancelled
        self._stats = LiveStats()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._queue = GroupQueue(options.queue_groups, latest_wins=source.keeps_pace)
        self._reader = LiveReader(
            source,
            lambda height, width: plan_stream(height, width, chain.spec, chain.tokenizer, groups=groups),
            self._queue,
            hold_s=options.hold_s,
        )
        self._trackers: dict[str, EventTracker] = {}
        self.set_queries(queries)
        self._updates = self._run()

    def set_queries(self, queries: Sequence[str]) -> None:
        """Replace the standing queries from the next round on; queries that stay keep their event state.

        Raises:
            QueryError: a query is empty or too long, or two are equal; the message gives the query's index.
        """
        if isinstance(queries, str):
            raise QueryError("query.not_a_list", "watch takes a list of queries, but got one string; put it in a list")
        for i, query in enumerate(queries):
            try:
                check_query(self._chain.spec.prompt, query)
            except QueryError as error:
                raise QueryError(error.code, f"query {i} (of 0 to {len(queries) - 1}): {error}") from error
        if len(set(queries)) < len(queries):
            raise QueryError("query.duplicate", "two of the standing queries are the same; give each once")
        self.queries = tuple(queries)

    @property
    def stats(self) -> LiveStats:
        """A copy of the counts and times so far."""
        dropped, group = self._queue.dropped, self._chain.spec.vision.temporal_patch_size
        median, p95 = np.percentile(list(self._latencies) or [0.0], (50, 95))
        return dataclasses.replace(
            self._stats,
            frames=self._reader.frames,
            gaps=self._reader.gaps,
            coarse_frames=self._stats.groups * group,
            dropped_groups=dropped,
            dropped_coarse_frames=dropped * group,
            latency_median_s=float(median),
            latency_p95_s=float(p95),
        )

    def stop(self) -> None:
        """End the watch; the iteration stops, at the latest after the current call of a backend."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and close the source and the window. Can be called repeatedly."""
        self.stop()
        try:
            self._updates.close()  # type: ignore[attr-defined]
        except ValueError:  # another thread iterates, and closes everything when it stops
            return
        self._reader.close()

    def __next__(self) -> LiveUpdate:
        return next(self._updates)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stopped(self) -> bool:
        return self._stop.is_set() or self._cancelled()

    def _run(self) -> Iterator[LiveUpdate]:
        window: LiveWindow | None = None
        ended, due, answered, arrived_s, before = "error", 0.0, 0.0, 0.0, 0
        try:
            self._reader.start()
            for group, plan in self._groups():
                dropped = self._queue.dropped
                with self._chain.usage.call():
                    window = window or LiveWindow(self._chain, plan, feature_budget_bytes=self._feature_budget_bytes)
                    limits = Limits(cancel=self._stopped)
                    rebuilt = window.add(group, limits)
                self._stats.add_step(limits.timings, rebuilt=rebuilt)
                self._stats.prefilled_tokens = window.prefilled
                known, arrived_s = window.end_s, group.arrived_s
                group_s = plan.group_s
                every = self._stats.round_s = max(self.options.every_s, group_s)
                last = self.options.duration_s is not None and known >= self.options.duration_s
                if known >= due or last:
                    missed = math.floor((known - due) / every + 1e-9) if due else 0
                    # A gap of the stream leaves out rounds too, but not because of this machine.
                    self._stats.skipped_answers += max(0, min(missed, math.ceil((dropped - before) * group_s / every)))
                    before = dropped
                    due = every * (math.floor(known / every + 1e-9) + 1)
                    answered = known
                    yield from self._round(window, arrived_s)
                if last:
                    ended = "duration"
                    return
            ended = "stopped" if self._stopped() else "source"
            if window is not None and ended == "source" and answered < window.end_s:
                yield from self._round(window, arrived_s)
        except (Interrupted, GeneratorExit) as error:
            if isinstance(error, Interrupted) and not self._stopped():
                raise
            ended = "stopped"
        finally:
            self._stats.ended = ended
            self._reader.close()
            if window is not None:
                window.close()

    def _groups(self) -> Iterator[tuple[LiveGroup, LivePlan]]:
        """Yield the groups until the source ends or the watch is stopped."""
        while not self._stopped():
            try:
                group = self._queue.get(POLL_S)
            except BridgeError:
                if self._stopped():  # then an error of the source no longer matters
                    return
                raise
            if group is not None and self._reader.plan is not None:
                yield group, self._reader.plan
            elif self._queue.ended:
                return
            elif self._reader.silent_s > self.options.stall_s:
                text = f"{self.source.name}: no frame for {self.options.stall_s:g} s; watch it again, or raise stall_s"
                raise VideoError("live.stalled", text)

    def _round(self, window: LiveWindow, arrived_s: float) -> Iterator[LiveUpdate]:
        """Answer the standing queries for the window, whose newest frame arrived at `arrived_s`.

        A round that passes its deadline yields nothing.
        """
        queries, options = self.queries, self.options
        limits = Limits(deadline_s=options.deadline_s, cancel=self._stopped)
        try:
            with self._chain.usage.call():
                answers = window.view().ground_within(limits, list(queries), Task(allow_none=options.allow_none))
        except Interrupted:
            if self._stopped():
                raise
            self._stats.late_answers += 1
            return
        finally:
            self._stats.add_answers(limits.elapsed_s)
        known, start = self._reader.origin_s + window.end_s, self._reader.origin_s + window.start_s
        groundings = tuple(in_stream_time(grounding, start) for grounding in answers)
        settings = {"settle_s": window.settle_s, "moved_iou": options.moved_iou}
        self._trackers = {query: self._trackers.get(query) or EventTracker(query, **settings) for query in queries}
        pairs = zip(queries, groundings, strict=True)
        events = [event for query, grounding in pairs for event in self._trackers[query].add(grounding, known)]
        latency_s = time.monotonic() - arrived_s
        self._latencies.append(latency_s)
        arrived = datetime.now(timezone.utc) - timedelta(seconds=latency_s)
        for i, event in enumerate(events):
            before_s = known - event.time_s if self.source.keeps_pace else 0.0
            events[i] = dataclasses.replace(event, wall_time=arrived - timedelta(seconds=before_s))
        yield LiveUpdate(
            known_s=known,
            window=(start, known),
            groundings=groundings,
            events=tuple(sorted(events, key=lambda event: event.time_s)),
            behind_s=max(0.0, (self._reader.newest_s or known) - known),
            took_s=limits.elapsed_s,
            latency_s=latency_s,
            wall_time=arrived,
        )
