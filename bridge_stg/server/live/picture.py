"""The newest picture of a live source: remembered as the stream passes, converted when somebody asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from bridge_stg.runtime.live.source import Frames, LiveSource, open_live


class Looking:
    """A source that remembers its newest frame.

    Attributes:
        address: as messages of the runtime show it; clients are told a name instead.
        source: what to watch instead of the address.
    """

    def __init__(self, address: str, *, timeout_s: float) -> None:
        inner = open_live(address, realtime=True, timeout_s=timeout_s)
        self._inner, self.address = inner, inner.name
        self._newest: tuple[float, Callable[[], np.ndarray]] | None = None
        self.source = LiveSource(inner.name, keeps_pace=inner.keeps_pace, read=self._read)

    def newest(self) -> tuple[np.ndarray, float] | None:
        """Return the newest picture, uint8 [H, W, 3], and its time as the source says it; None before the first."""
        if self._newest is None:
            return None
        time_s, picture = self._newest
        return picture(), time_s

    def _read(self, stop: threading.Event) -> Frames:
        for time_s, picture in self._inner.frames(stop):
            # A frame of PyAV may not be converted by two threads at a time.
            alone = partial(_one_at_a_time, threading.Lock(), picture)
            self._newest = time_s, alone
            yield time_s, alone


def _one_at_a_time(lock: threading.Lock, picture: Callable[[], np.ndarray]) -> np.ndarray:
    with lock:
        return picture()
