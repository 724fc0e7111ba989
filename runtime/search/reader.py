"""Read a video file for a search with an index: all frames in order, or single ones of a file that has been read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.live.source import LiveSource
from bridge_stg.runtime.video.decoder import Decoder
from bridge_stg.runtime.video.file import FileFacts, FrameLog, VideoFile

AllFrames: TypeAlias = "Generator[tuple[float, Callable[[], np.ndarray]], None, FileFacts | None]"
"""Time in seconds and function that returns the RGB frame, of each frame; then what was found out, None if stopped."""


class FileReader:
    """Reads a file in this process.

    Args:
        path: the file.
        stream: see `CallOptions`.
    """

    def __init__(self, path: str, stream: int | None) -> None:
        self.path, self.stream = path, stream
        self._file: VideoFile | None = None

    def frames(self, stop: threading.Event) -> AllFrames:
        """Yield all frames in order, until `stop` is set. Raises VideoError."""
        with closing(Decoder(self.path, self.stream)) as decoder:
            log = FrameLog(decoder)
            for frame in decoder.frames():
                if stop.is_set():
                    return None
                yield log.add(frame), partial(decoder.converter.rgb, frame)
            return log.facts()

    def pictures(
        self, facts: FileFacts, spec: ModelSpec, indices: np.ndarray, size: tuple[int, int], limits: Limits
    ) -> np.ndarray:
        """Return frames by index, uint8 [N, *size, 3]; see `VideoFile.pictures`. `facts` are those of `frames`."""
        self._file = self._file or VideoFile(self.path, spec, known=(facts, None))
        return self._file.pictures(indices, size, limits)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class FileSource(LiveSource):
    """A video file that a `reader` of the caller reads, so that a search can use its index."""

    reader: FileReader | None = None
