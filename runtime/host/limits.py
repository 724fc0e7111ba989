"""The limits that a caller may set for one call: deadline, cancel signal, progress callback. Knows nothing of videos.

It also times the stages, since an interruption names the current stage.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, TypedDict

from bridge_stg.runtime.errors import BridgeError, Interrupted
from bridge_stg.runtime.host.parse import is_number

LOCK_POLL_S = 0.05


class Progress(Protocol):
    """Called as progress(stage, done, total); total is None where it is not known yet."""

    def __call__(self, stage: str, done: float, total: float | None) -> Any:
        """Report how much of a stage is done."""


class Signal(Protocol):
    """A cancel signal such as `threading.Event`."""

    def is_set(self) -> bool:
        """Return whether to stop."""


Cancel: TypeAlias = "Signal | Callable[[], bool]"
"""A signal that is set, or a callable that returns True, to stop a call."""


class CallKeywords(TypedDict, total=False):
    """The keyword arguments that every call takes; see `Limits`."""

    deadline_s: float | None
    cancel: Cancel | None
    progress: Progress | None


class Limits:
    """The deadline, cancel signal, progress callback and stage timings of one call, which runs in one thread.

    Args:
        deadline_s: seconds from now after which the call is stopped; None for no deadline.
        cancel: an object with `is_set()` (a `threading.Event`), or a callable that returns True to stop.
        progress: see `Progress`.

    Raises:
        BridgeError: the deadline is not a number.
    """

    def __init__(
        self, *, deadline_s: float | None = None, cancel: Cancel | None = None, progress: Progress | None = None
    ) -> None:
        if deadline_s is not None and not (is_number(deadline_s) or deadline_s == math.inf):
            message = f"deadline_s={deadline_s!r}: expected seconds from now, or None for no deadline"
            raise BridgeError("options.out_of_range", message)
        self.started = time.perf_counter()
        self.deadline_s = deadline_s
        self.timings: dict[str, float] = {}
        self.cancelled = _signal(cancel)
        self._progress = progress
        self._stage = "start"
        self._inner_s = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name what runs inside the block, check before it, and add its seconds to `timings[name]`.

        The seconds of a stage inside another count for the inner one alone.
        """
        outer, self._stage = self._stage, name
        outer_inner_s, self._inner_s = self._inner_s, 0.0
        began = time.perf_counter()
        try:
            self.check()
            yield
        finally:
            took = time.perf_counter() - began
            self.timings[name] = self.timings.get(name, 0.0) + took - self._inner_s
            self._stage, self._inner_s = outer, outer_inner_s + took

    def check(self) -> None:
        """Return if the call may go on.

        Raises:
            Interrupted: the deadline has passed or the cancel signal is set; the message names the stage.
        """
        if self.cancelled():
            message = f"the call was cancelled during {self._stage}, {self.elapsed_s:.2f} s after it began"
            raise Interrupted("call.cancelled", message)
        if self.deadline_s is not None and self.elapsed_s >= self.deadline_s:
            advice = "allow more time, or use a shorter video or fewer queries"
            raise Interrupted("call.deadline", f"deadline_s={self.deadline_s:g} passed during {self._stage}; {advice}")

    def report(self, done: float, total: float | None) -> None:
        """Report progress to the callback, then check."""
        if self._progress is not None:
            self._progress(self._stage, done, total)
        self.check()

    def report_from(self, start: float, total: float | None) -> Callable[[float, float | None], None]:
        """Return a `report` for one part of a stage: its counts begin at `start`, and `total` is the stage's."""
        return lambda done, _: self.report(start + done, total)

    @contextmanager
    def hold(self, lock: threading.Lock) -> Iterator[None]:
        """Hold `lock` inside the block; waiting for it stops at the deadline like everything else."""
        while not lock.acquire(timeout=LOCK_POLL_S):
            self.check()
        try:
            yield
        finally:
            lock.release()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self.started


def _signal(cancel: Cancel | None) -> Callable[[], bool]:
    if cancel is None:
        return lambda: False
    if not callable(is_set := getattr(cancel, "is_set", cancel)):
        raise TypeError(f"cancel must be a threading.Event or a callable, not {type(cancel).__name__}")
    signal: Callable[[], bool] = is_set
    return signal
