"""Work in background threads, and closing an object that several threads use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.failures import reporting_host_errors

T = TypeVar("T")
Item = TypeVar("Item")
Owner = TypeVar("Owner", bound="Closable")


def in_background(function: Callable[[], T]) -> Future[T]:
    """Start a function in another thread, and return its future result.

    It runs in parallel where the function releases the GIL for long: in hashing, decoding, resizing, engines.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="bridge-stg-background")
    try:
        return executor.submit(function)
    finally:
        executor.shutdown(wait=False)  # its thread ends after the function


def for_each(function: Callable[[Item], object], items: Iterable[Item], *, threads: int) -> None:
    """Call a function with every item, in at most `threads` threads.

    If it raises, the error of the first such item is raised here; later items may have been skipped.
    """
    todo = list(items)
    if min(threads, len(todo)) < 2:
        for item in todo:
            function(item)
        return
    with ThreadPoolExecutor(min(threads, len(todo)), thread_name_prefix="bridge-stg-background") as executor:
        list(executor.map(function, todo))


class UseCount:
    """Counts the running calls of an object that several threads use, and frees it after `close` and the last call.

    `free` is called once; calls that begin after `close` raise `closed_error`.
    """

    def __init__(self, free: Callable[[], None], *, closed_error: BridgeError) -> None:
        self._free = free
        self._closed_error = closed_error
        self._lock = threading.Lock()
        self._active = 0
        self._closed = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Keep the object open inside the block. Raises `closed_error` after `close`; HostError if the system fails."""
        with self._lock:
            if self._closed:
                raise type(self._closed_error)(*self._closed_error.args)
            self._active += 1
        try:
            with reporting_host_errors():
                yield
        finally:
            with self._lock:
                self._active -= 1
                last = self._closed and not self._active
            if last:
                self._free()

    def close(self) -> None:
        """Reject further calls; free the object now, or when the running calls have ended. Can be called repeatedly."""
        with self._lock:
            free_now = not self._closed and not self._active
            self._closed = True
        if free_now:
            self._free()


class Closable:
    """An object that several threads use: `close`, or the end of its `with` block, frees it after the running calls."""

    _usage: UseCount

    def close(self) -> None:
        """Free the resources once the running calls have ended; later calls raise. Can be called repeatedly."""
        self._usage.close()

    def __enter__(self: Owner) -> Owner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
