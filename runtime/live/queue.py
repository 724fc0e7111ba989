"""Between the thread that reads a stream and the one that asks the model: a short queue, and what it drops."""

from __future__ import annotations

import threading
from collections import deque

from bridge_stg.runtime.live.sampling import LiveGroup


class GroupQueue:
    """Holds a few groups. Safe to use from two threads.

    Args:
        capacity: how many groups may wait.
        latest_wins: what happens to one more: it takes the place of the oldest, or (False) the reader waits.

    Attributes:
        dropped: groups that were never taken.
    """

    def __init__(self, capacity: int, *, latest_wins: bool) -> None:
        self.dropped = 0
        self._capacity, self._latest_wins = capacity, latest_wins
        self._groups: deque[LiveGroup] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, group: LiveGroup) -> bool:
        """Add a group; return False if nobody will take it any more."""
        with self._changed:
            if self._latest_wins and len(self._groups) == self._capacity:
                self._groups.popleft()
                self.dropped += 1
            self._changed.wait_for(lambda: self._closed or len(self._groups) < self._capacity)
            if not self._closed:
                self._groups.append(group)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None = None) -> None:
        """Say that no group comes any more; `error` is raised where the next one would be taken."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def get(self, timeout_s: float) -> LiveGroup | None:
        """Return the oldest group; None if there was none so long, or if the stream has ended (see `ended`)."""
        with self._changed:
            self._changed.wait_for(lambda: self._groups or self._ended, timeout_s)
            if self._groups:
                self._changed.notify_all()
                return self._groups.popleft()
            if self._error is not None:
                raise self._error
            return None

    @property
    def ended(self) -> bool:
        """Whether there is and will be nothing to take."""
        with self._changed:
            return self._ended and not self._groups

    def close(self) -> None:
        """Let go of everything; a reader that waits goes on, and its `put` returns False."""
        with self._changed:
            self._closed = True
            self._groups.clear()
            self._changed.notify_all()
