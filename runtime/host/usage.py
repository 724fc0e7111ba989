"""Closing something that other threads may be using: who is inside finishes, and the last one frees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bridge_stg.runtime.errors import BridgeError


class UseCount:
    """Counts the calls under way on one object, and frees it when it is closed and none is left.

    Args:
        free: called once, by whoever is last.
        closed_error: raised by calls that come after `close`.
    """

    def __init__(self, free: Callable[[], None], *, closed_error: BridgeError) -> None:
        self._free = free
        self._closed_error = closed_error
        self._lock = threading.Lock()
        self._active = 0
        self._closed = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Hold the object open inside the block. Raises `closed_error` after `close`."""
        with self._lock:
            if self._closed:
                raise type(self._closed_error)(*self._closed_error.args)
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                last = self._closed and not self._active
            if last:
                self._free()

    def close(self) -> None:
        """Refuse further calls; free the object now, or when the calls under way have ended. May be called again."""
        with self._lock:
            free_now = not self._closed and not self._active
            self._closed = True
        if free_now:
            self._free()
