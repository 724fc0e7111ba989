"""Read and sample a live source in a background thread; the groups wait in a short queue for the model's thread.

Knows nothing of the model.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace

from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.live.cuts import CutFinder
from bridge_stg.runtime.live.plan import LivePlan, PlanOf
from bridge_stg.runtime.live.sampling import LiveGroup, LiveSampler
from bridge_stg.runtime.live.source import LiveSource

POLL_S = 0.05  # seconds between checks of a thread that waits for the other one
JOIN_S = 2.0  # how long closing waits for the thread of a silent source; after that it ends with the process


class GroupQueue:
    """A queue of at most `capacity` groups, for two threads.

    When it is full, a further group replaces the oldest one (`latest_wins`), counted in `dropped`, or has to wait.
    """

    def __init__(self, capacity: int, *, latest_wins: bool) -> None:
        self.dropped = 0
        self._latest_wins = latest_wins
        self._groups: queue.Queue[LiveGroup] = queue.Queue(capacity)
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, group: LiveGroup) -> bool:
        """Add a group; return False if the queue is closed."""
        while not self._closed:
            try:
                self._groups.put(group, timeout=0 if self._latest_wins else POLL_S)
                return True
            except queue.Full:
                if self._latest_wins and self._take(0) is not None:
                    self.dropped += 1
        return False

    def end(self, error: BaseException | None = None) -> None:
        """Mark the end of the stream; after the last group, `get` raises `error`."""
        self._error, self._ended = error, True

    def get(self, timeout_s: float) -> LiveGroup | None:
        """Return the oldest group; None after `timeout_s` without one, or if the stream has ended (see `ended`)."""
        group = self._take(timeout_s)
        if group is None and self._error is not None and self.ended:
            raise self._error
        return group

    def _take(self, timeout_s: float) -> LiveGroup | None:
        try:
            return self._groups.get(timeout=timeout_s)
        except queue.Empty:
            return None

    @property
    def ended(self) -> bool:
        """Whether the queue is empty and stays so."""
        return self._ended and self._groups.empty()

    def close(self) -> None:
        """Drop all groups; a waiting `put` returns False."""
        self._closed = True
        while self._take(0) is not None:
            pass


class LiveReader:
    """Reads one source from start to end in its own thread; `queue` receives the groups, and the end or the error.

    `whole` and `cuts` are those of its `LiveSampler`. Without `pixels`, the source's frames are uint8 [H, W, 0], and
    so are those of the groups.
    """

    def __init__(
        self, source: LiveSource, plan_of: PlanOf, queue: GroupQueue, *, hold_s: float,
        whole: bool = False, cuts: CutFinder | None = None, pixels: bool = True,
    ) -> None:  # fmt: skip
        self.frames, self.gaps = 0, 0
        self.newest_s: float | None = None  # time of the newest frame, on the source's clock
        self.origin_s = 0.0  # set by the first frame, as is the plan
        self.end_s: float | None = None  # end of the last frame in seconds from the first; None before the end
        self.plan: LivePlan | None = None
        self.queue = queue
        self._source, self._plan_of, self._hold_s = source, plan_of, hold_s
        self._whole, self._cuts, self._pixels = whole, cuts, pixels
        self._stop = threading.Event()
        self._arrived = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="bridge-stg live reader", daemon=True)

    def start(self) -> None:
        """Start reading."""
        self._arrived = time.monotonic()
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the last frame, or since the start."""
        return time.monotonic() - self._arrived

    def close(self) -> None:
        """Stop reading, and wait up to `JOIN_S` for the thread."""
        self._stop.set()
        self.queue.close()
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        try:
            self._read()
            self.queue.end()
        except BridgeError as error:
            self.queue.end(error)
        except Exception as error:  # noqa: BLE001 - the caller's iterator may raise anything
            wrapped = VideoError("live.connection_lost", f"{self._source.name}: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self.queue.end(wrapped)

    def _read(self) -> None:
        sampler: LiveSampler | None = None
        newest_s = 0.0  # arrival of the newest frame that a group can contain: a frame completes groups without it
        for time_s, frame in self._source.frames(self._stop):
            arrived_s = self._arrived = time.monotonic()
            if sampler is None:
                height, width = frame().shape[:2]
                self.plan, self.origin_s = self._plan_of(height, width), time_s
                sampled = self.plan
                if not self._pixels:  # there is nothing to resize
                    sampled = replace(sampled, coarse_size=(height, width), fine_size=(height, width))
                sampler = LiveSampler(sampled, hold_s=self._hold_s, whole=self._whole, cuts=self._cuts)
            self.frames, self.newest_s = self.frames + 1, time_s
            for group in sampler.add(time_s, frame):
                if not self.queue.put(replace(group, arrived_s=newest_s)):
                    return
                self._arrived = time.monotonic()  # waiting for the queue is not silence of the source
            self.gaps, newest_s = sampler.gaps, arrived_s
        if self._stop.is_set():
            return
        if sampler is None:
            raise VideoError("video.no_frames", f"{self._source.name} has no frames: expected at least one")
        for group in sampler.finish():
            self.end_s = sampler.end_s
            if not self.queue.put(replace(group, arrived_s=newest_s)):
                return
        self.end_s = sampler.end_s
