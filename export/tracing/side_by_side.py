"""Compute several results side by side, so that a streamed matrix is read once for all that need it next.

Each task runs in a thread of its own until it needs a streamed matrix. One thread runs at a time, so tasks may share
what is not made for several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Result = TypeVar("Result")
Multiply = Callable[[Sequence[Tensor]], list[Tensor]]
"""Multiplies each tensor [.., K] by one matrix [N, K], transposed, which it reads once."""

_current = threading.local()


@dataclass(frozen=True)
class _Request:
    """A matrix, by its place in the model, and what is to be multiplied by it."""

    place: int
    multiply: Multiply
    x: Tensor


def multiply_together(place: int, multiply: Multiply, x: Tensor) -> Tensor:
    """Return the product of `x` and the matrix at a place in the model, in one pass with other tasks that need it."""
    task: _Task[object] | None = getattr(_current, "task", None)
    return multiply([x])[0] if task is None else task.wait(_Request(place, multiply, x))


def side_by_side(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    """Call all functions and return their results; raise what one of them raises first.

    Tasks at earlier places of the model go first, until all that are under way wait for one place.
    """
    tasks = [_Task(function) for function in functions]
    try:
        for task in tasks:
            task.go_on()
        while waiting := [(task, task.request) for task in tasks if task.request is not None]:
            place = min(request.place for _, request in waiting)
            group = [(task, request) for task, request in waiting if request.place == place]
            products = group[0][1].multiply([request.x for _, request in group])
            for (task, _), product in zip(group, products, strict=True):
                task.go_on(product)
    finally:
        for task in tasks:
            task.stop()
    return [task.results[0] for task in tasks]


class _Stopped(BaseException):
    """Ends the thread of a task whose result is no longer needed."""


class _Task(Generic[Result]):
    """A function in a thread that runs while `go_on` waits; `request` is what it needs next, None at its end."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.request: _Request | None = None
        self.results: list[Result] = []
        self._function, self._product, self._stopped = function, list[Tensor](), False
        self._error: BaseException | None = None
        self._turn, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self, *product: Tensor) -> None:
        """Run the function until it needs a matrix, or to its end; `product` is what it waited for."""
        self.request, self._product = None, list(product)
        self._turn.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread, if the function has not returned."""
        self._stopped = True
        self._turn.release()
        self._thread.join()

    def wait(self, request: _Request) -> Tensor:
        """Return what was requested: called in the task's thread."""
        self.request = request
        self._paused.release()
        self._await_turn()
        return self._product.pop()

    def _await_turn(self) -> None:
        self._turn.acquire()
        if self._stopped:
            raise _Stopped

    def _run(self) -> None:
        _current.task = self
        try:
            self._await_turn()
            self.results.append(self._function())
        except _Stopped:
            pass
        except Exception as error:  # noqa: BLE001  # raised again by `go_on`
            self._error = error
        self._paused.release()
