"""Work that is done in a thread of its own while the caller goes on with other work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


class Background(Generic[T]):
    """A function's result, computed in a thread that starts at once.

    The thread pays where the function leaves Python for long: in hashing, decoding, resizing, engines.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._made: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bridge-stg-ahead")
        self._thread.start()

    def result(self) -> T:
        """Wait for the function; return what it returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made[0]

    def wait(self) -> None:
        """Wait for the function, whatever came of it."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._made.append(self._function())
        except BaseException as error:
            self._error = error


def for_each(function: Callable[[Item], object], items: Iterable[Item], *, threads: int) -> None:
    """Call a function with every item, in up to `threads` threads, this one included.

    Raises:
        Whatever the function raised first, in the order of the items; items behind it may not have been touched.
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
            except BaseException as error:
                errors.append((place, error))

    helpers = [Background(work) for _ in range(min(threads, len(todo)) - 1)]
    work()
    for helper in helpers:
        helper.wait()
    if errors:
        raise min(errors, key=lambda failed: failed[0])[1]
