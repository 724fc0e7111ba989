"""The newest frame of a live source: kept as the stream passes, converted only when a client requests it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from bridge_stg.runtime.live.source import Frames, LiveSource, open_live


class NewestFrame:
    """A live source that keeps its newest frame. Messages of the runtime contain `address`; watch `source`."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self._inner = inner = open_live(address, realtime=True, timeout_s=timeout_s)
        self.address = inner.name
        self._newest: tuple[float, Callable[[], np.ndarray]] | None = None
        self.source = LiveSource(inner.name, inner.keeps_pace, self._read)

    def read(self) -> tuple[np.ndarray, float] | None:
        """Return the newest frame, uint8 [H, W, 3], and its time in the stream; None before the first frame."""
        if self._newest is None:
            return None
        time_s, frame = self._newest
        return frame(), time_s

    def _read(self, stop: threading.Event) -> Frames:
        for time_s, frame in self._inner.frames(stop):
            self._newest = time_s, _one_at_a_time(frame)
            yield self._newest


def _one_at_a_time(frame: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """Return a function that converts a frame in one thread at a time, as PyAV requires."""
    lock = threading.Lock()

    def convert() -> np.ndarray:
        with lock:
            return frame()

    return convert
