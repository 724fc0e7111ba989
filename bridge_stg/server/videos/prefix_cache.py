"""Opened videos, whose prefix is computed, kept for the next query; the least recently used are closed first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.chain.opened_video import ChatMessage, OpenedVideo
from bridge_stg.runtime.heads.chat import with_context
from bridge_stg.runtime.host.limits import Progress
from bridge_stg.server.videos.isolated import IsolatedMedia

Key: TypeAlias = "tuple[str, int | None, str]"
"""File, index of the video stream, and text before the video."""


class OpenVideos:
    """At most `most` opened videos by file, video stream and the text of the prompt before the video.

    Besides the leased ones, they are kept within `most_bytes` of memory.

    Safe to use from many threads, one at a time per key.
    """

    def __init__(self, grounder: Grounder, *, most: int, most_bytes: int) -> None:
        self.grounder, self._most, self._most_bytes = grounder, most, most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, OpenedVideo] = OrderedDict()
        self._leased: dict[Key, OpenedVideo] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept) + len(self._leased)

    @property
    def nbytes(self) -> int:
        """Memory of all videos in bytes."""
        with self._lock:
            return sum(video.nbytes for video in [*self._kept.values(), *self._leased.values()])

    @contextmanager
    def lease(
        self,
        file: str,
        media: IsolatedMedia,
        *,
        context: Sequence[ChatMessage],
        cancel: Callable[[], bool],
        progress: Progress,
        image_only: bool = False,
    ) -> Iterator[tuple[OpenedVideo, bool]]:
        """Yield a video, and whether it was opened by this call. Arguments and errors as of `Grounder.open`."""
        key = file, media.stream, with_context(self.grounder.spec, context).prompt.head
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is not None:
                self._leased[key] = kept
        video = kept or self.grounder.open(
            media, context=context, cancel=cancel, progress=progress, image_only=image_only
        )
        with self._lock:
            self._leased[key] = video
        try:
            yield video, kept is None
        finally:
            surplus = []
            with self._lock:
                del self._leased[key]
                self._kept[key] = video
                nbytes = sum(one.nbytes for one in self._kept.values())
                while self._kept and (len(self._kept) > self._most or nbytes > self._most_bytes):
                    surplus.append(self._kept.popitem(last=False)[1])
                    nbytes -= surplus[-1].nbytes
            for old in surplus:
                old.close()

    def close(self, file: str) -> None:
        """Close the videos of a file that is about to be deleted. None is leased: a lease keeps its file."""
        with self._lock:
            videos = [self._kept.pop(key) for key in list(self._kept) if key[0] == file]
        for video in videos:
            video.close()

    def clear(self) -> None:
        """Close all videos that are not leased."""
        for file, *_ in list(self._kept):
            self.close(file)
