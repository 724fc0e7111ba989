"""The options of a search, the length of its windows, and which videos are longer than one."""

from __future__ import annotations

import math
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.host.parse import is_count, is_number
from bridge_stg.runtime.live.plan import longest_window_s, window_groups
from bridge_stg.runtime.live.source import LiveSource
from bridge_stg.runtime.video.decoder import Decoder, check_path
from bridge_stg.runtime.video.image import read_image


@dataclass(frozen=True)
class SearchOptions:
    """How a video is searched.

    Attributes:
        window_s: seconds of a window, rounded to whole groups of coarse frames; None: `default_window_s`.
        overlap: share of a window that it has in common with the next one, 0 to 0.9.
        top: how many occurrences of a query to return, best first; None: all.
        task: `tube` (spans and boxes) or `span` (spans only).
        cuts: whether hard cuts are found, so that no window and no occurrence crosses one.
        allow_none: whether a window may be without the target; otherwise each has a span, which is an occurrence if the
            spatial decoder sees the target in at least one of its frames.
        state: file in which finished windows are kept until the search is complete; None: no file. If it exists, these
            windows are not computed again.
    """

    window_s: float | None = None
    overlap: float = 0.25
    cuts: bool = True
    top: int | None = None
    task: str = "tube"
    allow_none: bool = True
    state: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.overlap) and 0 <= self.overlap <= 0.9):
            raise VideoError("search.bad_option", f"overlap={self.overlap!r}: expected a share from 0 to 0.9")
        if self.top is not None and not is_count(self.top):
            raise VideoError("search.bad_option", f"top={self.top!r}: expected 1 or more, or None")
        if self.task not in ("tube", "span"):
            raise VideoError("search.bad_option", f"task={self.task!r}: a search has the tasks tube and span")

    def groups(self, spec: ModelSpec) -> int:
        """Return the groups of coarse frames of a window. Raises VideoError if the model cannot read as many."""
        return window_groups(spec, default_window_s(spec) if self.window_s is None else self.window_s)


def default_window_s(spec: ModelSpec) -> float:
    """Return the seconds of a window: what the bundle states, else `longest_window_s`."""
    return min(spec.frames.window_s or math.inf, longest_window_s(spec))


def video_length_s(video: Any, stream: int | None = None) -> float | None:
    """Return the seconds of a video file without decoding it; None for images and what is no file.

    Without a length in its header, the file's packets are read. Raises VideoError as opening the video does.
    """
    if not isinstance(video, (str, os.PathLike)):
        return video.length_s if isinstance(video, LiveSource) else None
    path = check_path(os.fspath(video))
    if read_image(path) is not None:
        return None
    with closing(Decoder(path, stream)) as decoder:
        return float(decoder.duration_s) if decoder.duration_s else _packets_length_s(path, float(decoder.frame_s or 0))


def is_long(video: Any, spec: ModelSpec, *, stream: int | None = None) -> bool:
    """Return whether a video file is longer than one window of a search. Arguments and errors as `video_length_s`."""
    return is_longer(video_length_s(video, stream), spec)


def is_longer(length_s: float | None, spec: ModelSpec) -> bool:
    """Return whether a length in seconds is more than one window of a search; None, an unknown one, is not."""
    return length_s is not None and length_s > default_window_s(spec) + 1 / spec.frames.coarse_fps


def is_searched(
    video: Any, spec: ModelSpec, *, window: float | str, top: int | None = None, stream: int | None = None
) -> bool:
    """Return whether a command searches a video: on request, or because it is longer than a window.

    `window` is a length in seconds, `whole` (no search) or `auto`; with `top`, every video is searched. Errors as
    `video_length_s`.
    """
    if window == "whole":
        return False
    return window != "auto" or top is not None or is_long(video, spec, stream=stream)


def _packets_length_s(path: str, frame_s: float) -> float | None:
    av = load_package("av", "av")
    end_s, packets = 0.0, 0
    try:
        with av.open(str(Path(path))) as container:
            for packet in container.demux(container.streams.best("video")):
                packets += 1
                if packet.pts is not None and packet.time_base:
                    end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    except av.FFmpegError:  # a damaged end; what was read before it counts
        pass
    return max(end_s, packets * frame_s) or None
