"""Read and sample a live source in a background thread; the groups wait in a short queue for the model's thread.

Knows nothing of the model.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.live.plan import LivePlan, PlanOf
from bridge_stg.runtime.live.sampling import LiveGroup, LiveSampler
from bridge_stg.runtime.live.source import LiveSource

JOIN_S = 2.0
"""How long closing waits for the thread of a silent source; after that it ends with the process."""


class GroupQueue:
    """A queue of a few groups, for two threads.

    Args:
        capacity: most waiting groups.
        latest_wins: what happens to a further group: True replaces the oldest one, False makes the reader wait.

    Attributes:
        dropped: groups that were replaced.
    """

    def __init__(self, capacity: int, *, latest_wins: bool) -> None:
        self.dropped = 0
        self._capacity, self._latest_wins = capacity, latest_wins
        self._groups: deque[LiveGroup] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, group: LiveGroup) -> bool:
        """Add a group; return False if the queue is closed."""
        with self._changed:
            if self._latest_wins and len(self._groups) == self._capacity:
                self._groups.popleft()
                self.dropped += 1
            self._changed.wait_for(lambda: self._closed or len(self._groups) < self._capacity)
            if not self._closed:
                self._groups.append(group)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None = None) -> None:
        """Mark the end of the stream; after the last group, `get` raises `error`."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def get(self, timeout_s: float) -> LiveGroup | None:
        """Return the oldest group; None after `timeout_s` without one, or if the stream has ended (see `ended`)."""
        with self._changed:
            self._changed.wait_for(lambda: self._groups or self._ended, timeout_s)
            if self._groups:
                self._changed.notify_all()
                return self._groups.popleft()
            if self._error is not None:
                raise self._error
            return None

    @property
    def ended(self) -> bool:
        """Whether the queue is empty and stays so."""
        with self._changed:
            return self._ended and not self._groups

    def close(self) -> None:
        """Drop all groups; a waiting `put` returns False."""
        with self._changed:
            self._closed = True
            self._groups.clear()
            self._changed.notify_all()


class LiveReader:
    """Reads one source from start to end in its own thread.

    Args:
        source: read once; opened and closed in the thread.
        plan_of: returns the plan for frames of (height, width).
        queue: receives the groups, and the source's end or error.
        hold_s: see `LiveSampler`.

    Attributes:
        frames: number of frames read.
        newest_s: time of the newest frame, on the source's clock.
        plan, origin_s: set by the first frame, before the first group.
        gaps: see `LiveSampler`.
    """

    def __init__(self, source: LiveSource, plan_of: PlanOf, queue: GroupQueue, *, hold_s: float) -> None:
        self.frames, self.gaps = 0, 0
        self.newest_s: float | None = None
        self.origin_s = 0.0
        self.plan: LivePlan | None = None
        self._source, self._plan_of, self._queue, self._hold_s = source, plan_of, queue, hold_s
        self._stop = threading.Event()
        self._arrived = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="bridge-stg live reader", daemon=True)

    def start(self) -> None:
        """Start to read."""
        self._arrived = time.monotonic()
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the last frame, or since the start."""
        return time.monotonic() - self._arrived

    def close(self) -> None:
        """Stop reading, and wait up to `JOIN_S` for the thread."""
        self._stop.set()
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        try:
            self._read()
            self._queue.end()
        except BridgeError as error:
            self._queue.end(error)
        except Exception as error:  # noqa: BLE001 - the caller's iterator may raise anything
            text = f"{self._source.name} broke off with {type(error).__name__}: {error}"
            wrapped = VideoError("live.connection_lost", text)
            wrapped.__cause__ = error
            self._queue.end(wrapped)

    def _read(self) -> None:
        sampler: LiveSampler | None = None
        for time_s, picture in self._source.frames(self._stop):
            self._arrived = time.monotonic()
            if sampler is None:
                height, width = picture().shape[:2]
                self.plan, self.origin_s = self._plan_of(height, width), time_s
                sampler = LiveSampler(self.plan, hold_s=self._hold_s)
            self.frames, self.newest_s = self.frames + 1, time_s
            for group in sampler.add(time_s, picture):
                if not self._queue.put(group):
                    return
                self._arrived = time.monotonic()  # waiting for the queue is not silence of the source
            self.gaps = sampler.gaps
        if self._stop.is_set():
            return
        if sampler is None:
            raise VideoError("video.no_frames", f"{self._source.name} has no frames: expected at least one")
        for group in sampler.finish():
            if not self._queue.put(group):
                return
