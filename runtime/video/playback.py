"""Play every frame of a video in order and at full size, with the times that groundings use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.video.decoder import CLOCKS, DEFAULT_FRAME_S, Decoder, Timeline, check_path
from bridge_stg.runtime.video.image import read_image
from bridge_stg.runtime.video.stream import check_frame

Picture: TypeAlias = Callable[[], np.ndarray]  # returns a frame, RGB uint8 [H, W, 3], as displayed
SAME_TIME_S = 1e-6


@dataclass(eq=False)
class Playback:
    """Frames that can be read once, each as (seconds from the first frame, function that returns it)."""

    pictures: Iterator[tuple[float, Picture]]
    duration_s: float | None  # None if not known before reading; 0 for an image
    is_image: bool = False
    last_end_s: Callable[[], float | None] = lambda: None  # end of the newest frame; None if it is unknown
    clock: Callable[[], str] = lambda: CLOCKS[0]  # where the times so far come from, one of `CLOCKS`
    stream: int | None = None  # index of the video stream; None if the file has only one, or is no video file
    end_s: float = 0.0  # end of the frames that `intervals` has yielded

    @property
    def frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yield (seconds from the first frame, RGB uint8 [H, W, 3])."""
        return ((time_s, picture()) for time_s, picture in self.pictures)

    def intervals(self) -> Iterator[tuple[float, Picture]]:
        """Yield the start in seconds of each frame and the function that returns it, once its end is known."""
        last_s, gap, last = 0.0, float(DEFAULT_FRAME_S), None
        for time_s, picture in self.pictures:
            if last is not None:
                gap, self.end_s = time_s - last_s, time_s
                yield last_s, last
            last_s, last = time_s, picture
        if last is None:
            raise VideoError("video.no_frames", "the video has no frames; expected at least one (time_s, RGB frame)")
        self.end_s = self.last_end_s() or last_s + gap
        yield last_s, last

    def frames_at(self, times: Sequence[float] | np.ndarray) -> list[np.ndarray]:
        """Return the frames shown at increasing times; those after the end of the video are its last frame.

        Reads to the end of the video if its length is not known.
        """
        found: list[np.ndarray] = []
        for _, picture in self.intervals():
            last = picture
            while len(found) < len(times) and times[len(found)] < self.end_s - SAME_TIME_S:
                found.append(picture())
            if len(found) == len(times) and self.duration_s is not None:
                return found
        return found + [last()] * (len(times) - len(found))


@contextmanager
def play(
    video: str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]], stream: int | None = None
) -> Iterator[Playback]:
    """Open any video that `Grounder.ground` takes; `stream` chooses one of a file. Raises VideoError as it does."""
    source: np.ndarray | Iterable[tuple[float, np.ndarray]] | None
    if isinstance(video, (str, os.PathLike)):
        path = check_path(os.fspath(video))
        source = read_image(path)
    else:
        source = check_frame(video, "the image") if isinstance(video, np.ndarray) else video
    if isinstance(source, np.ndarray):
        yield Playback(iter([(0.0, partial(np.asarray, source))]), 0.0, is_image=True)
    elif source is not None:
        yield Playback(_from_zero(source), None, last_end_s=lambda: getattr(source, "end_s", None))
    else:
        with closing(Decoder(path, stream)) as decoder:
            timeline, length_s = decoder.timeline(), decoder.duration_s and float(decoder.duration_s)
            yield Playback(
                _decoded(decoder, timeline), length_s, last_end_s=lambda: timeline.end_s, clock=lambda: timeline.clock,
                stream=decoder.stream,
            )  # fmt: skip


def _decoded(decoder: Decoder, timeline: Timeline) -> Iterator[tuple[float, Picture]]:
    for frame in decoder.frames():
        yield timeline.add(frame), partial(decoder.converter.rgb, frame)
    if not timeline.times:
        raise decoder.no_frames()


def _from_zero(frames: Iterable[tuple[float, np.ndarray]]) -> Iterator[tuple[float, Picture]]:
    origin: float | None = None
    for time_s, picture in frames:
        origin = time_s if origin is None else origin
        yield time_s - origin, partial(np.asarray, np.array(picture))  # a copy: the caller may reuse its buffer
