"""Videos whose prefix has been computed, kept for the next query on them: the least recently used go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.chain.opened_video import OpenedVideo
from bridge_stg.runtime.host.limits import Progress


class OpenVideos:
    """Opened videos by the key of their file. Safe to use from many threads, one at a time for each key.

    Args:
        grounder: opens them.
        most: how many are kept.
        most_bytes: what they may hold in memory. A video that is being asked is kept whatever it holds.
    """

    def __init__(self, grounder: Grounder, *, most: int, most_bytes: int) -> None:
        self._grounder, self._most, self._most_bytes = grounder, most, most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, OpenedVideo] = OrderedDict()
        self._leased: dict[str, OpenedVideo] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept) + len(self._leased)

    @property
    def nbytes(self) -> int:
        """What all of them hold now."""
        with self._lock:
            return sum(video.nbytes for video in [*self._kept.values(), *self._leased.values()])

    @contextmanager
    def lease(
        self, key: str, path: str, *, cancel: Callable[[], bool], progress: Progress
    ) -> Iterator[tuple[OpenedVideo, bool]]:
        """Give a video, and whether it was opened for this.

        Raises:
            BridgeError: as of `Grounder.open`.
        """
        with self._lock:
            video = self._kept.pop(key, None)
            if video is not None:
                self._leased[key] = video
        opened = video is None
        if video is None:
            video = self._grounder.open(path, cancel=cancel, progress=progress)
            with self._lock:
                self._leased[key] = video
        try:
            yield video, opened
        finally:
            with self._lock:
                del self._leased[key]
                self._kept[key] = video
                closing = self._surplus()
            for old in closing:
                old.close()

    def close(self, key: str) -> None:
        """Close a video whose file goes. It is not leased: whoever works on a video holds its file."""
        with self._lock:
            video = self._kept.pop(key, None)
        if video is not None:
            video.close()

    def clear(self) -> None:
        """Close all that are not leased."""
        with self._lock:
            videos = list(self._kept.values())
            self._kept.clear()
        for video in videos:
            video.close()

    def _surplus(self) -> list[OpenedVideo]:
        """Take out what is too much; the newest stays if it fits alone."""
        surplus = []
        held = sum(video.nbytes for video in self._kept.values())
        while self._kept and (len(self._kept) > self._most or held > self._most_bytes):
            _, video = self._kept.popitem(last=False)
            held -= video.nbytes
            surplus.append(video)
        return surplus
