"""The thread that reads a live source: it samples its frames into groups, and queues these."""

from __future__ import annotations

import threading
import time

from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.live.plan import LivePlan, PlanOf
from bridge_stg.runtime.live.queue import GroupQueue
from bridge_stg.runtime.live.sampling import LiveSampler
from bridge_stg.runtime.live.source import LiveSource

JOIN_S = 2.0
"""How long closing waits for a source that is silent; its thread is left to itself then, and ends with the process."""


class LiveReader:
    """Reads one source from start to end in a thread of its own.

    Args:
        source: read once; opened and closed in the thread.
        plan_of: returns the plan for frames of (height, width).
        queue: takes the groups, and the source's end or error.
        hold_s: see `LiveSampler`.

    Attributes:
        frames: how many were read.
        newest_s: time of the newest one, as the source gives it.
        plan, origin_s: set by the first frame, so they are there when the first group is.
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
        """Begin to read."""
        self._arrived = time.monotonic()
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the last frame, or since the start."""
        return time.monotonic() - self._arrived

    def close(self) -> None:
        """Stop reading, and wait a while for the thread."""
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
        except Exception as error:  # of the caller's iterator, whatever it may be
            wrapped = VideoError(f"{self._source.name} broke off with {type(error).__name__}: {error}")
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
                self._arrived = time.monotonic()  # while the queue was full, the source could not be heard
            self.gaps = sampler.gaps
        if self._stop.is_set():
            return
        if sampler is None:
            raise VideoError(f"{self._source.name} holds no frames: expected at least one")
        for group in sampler.finish():
            if not self._queue.put(group):
                return
