"""Play every frame of a video in order and at full size, with the times that groundings use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.video.decoder import Decoder, Timeline, check_path, shown_rgb
from bridge_stg.runtime.video.image import read_image
from bridge_stg.runtime.video.stream import check_picture

Frames = Iterator[tuple[float, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Playback:
    """Frames that can be read once.

    Attributes:
        frames: yields (seconds from the first frame, RGB uint8 [H, W, 3], rotation applied).
        duration_s: length if known before reading, else None; 0 for an image.
        is_image: whether this is one frame without a time.
    """

    frames: Frames
    duration_s: float | None
    is_image: bool = False


@contextmanager
def play(video: str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]]) -> Iterator[Playback]:
    """Open any video that `Grounder.ground` takes: a path, an image, or an iterable of (time_s, RGB frame).

    Raises:
        VideoError: the video cannot be read.
    """
    source: np.ndarray | Iterable[tuple[float, np.ndarray]] | None
    if isinstance(video, (str, os.PathLike)):
        path = check_path(os.fspath(video))
        source = read_image(path)
    else:
        source = check_picture(video, "the image") if isinstance(video, np.ndarray) else video
    if isinstance(source, np.ndarray):
        yield Playback(iter([(0.0, source)]), 0.0, is_image=True)
    elif source is not None:
        yield Playback(_from_zero(source), None)
    else:
        decoder = Decoder(path)
        try:
            yield Playback(_decoded(decoder), decoder.duration_s and float(decoder.duration_s))
        finally:
            decoder.close()


def _decoded(decoder: Decoder) -> Frames:
    timeline = Timeline(decoder.time_base, decoder.frame_s)
    for frame in decoder.frames():
        yield timeline.add(frame), shown_rgb(frame)
    if not timeline.times:
        raise decoder.no_frames()


def _from_zero(frames: Iterable[tuple[float, np.ndarray]]) -> Frames:
    origin: float | None = None
    for time_s, picture in frames:
        origin = time_s if origin is None else origin
        yield time_s - origin, picture
