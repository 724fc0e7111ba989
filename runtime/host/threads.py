"""Work in background threads, and closing an object that several threads use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.failures import reporting_host_errors

T = TypeVar("T")
Item = TypeVar("Item")
Owner = TypeVar("Owner", bound="Closable")


class Background(Generic[T]):
    """A function's result, computed in a thread that starts immediately.

    It runs in parallel where the function releases the GIL for long: in hashing, decoding, resizing, engines.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._made: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bridge-stg-background")
        self._thread.start()

    def result(self) -> T:
        """Wait for the function; return what it returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made[0]

    def wait(self) -> None:
        """Wait until the function has ended, with or without an error."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._made.append(self._function())
        except BaseException as error:  # noqa: BLE001 - `result` raises it in the caller's thread
            self._error = error


def for_each(function: Callable[[Item], object], items: Iterable[Item], *, threads: int) -> None:
    """Call a function with every item, in at most `threads` threads including this one.

    If it raises, the error of the first such item is raised here; later items may have been skipped.
    """
    todo = list(enumerate(items))[::-1]
    errors: list[tuple[int, BaseException]] = []

    def work() -> None:
        while not errors:
            try:
                place, item = todo.pop()
            except IndexError:
                return
            try:
                function(item)
            except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                errors.append((place, error))

    helpers = [Background(work) for _ in range(min(threads, len(todo)) - 1)]
    work()
    for helper in helpers:
        helper.wait()
    if errors:
        raise min(errors, key=lambda failed: failed[0])[1]


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
        """Keep the object open inside the block. Raises `closed_error` after `close`, and HostError."""
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
