"""Every frame of a video at full size, one after the other, at the times that groundings use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.video.decoder import Decoder, Timeline, check_path, shown_rgb
from bridge_stg.runtime.video.image import animation_frames, is_animation, open_image, read_rgb
from bridge_stg.runtime.video.stream import check_picture


@dataclass(frozen=True, eq=False)
class Playback:
    """Frames to be read once.

    Attributes:
        frames: yields (seconds from the first frame, RGB uint8 [H, W, 3], rotation applied).
        duration_s: length as far as it is known before reading; 0 for an image.
        is_image: whether there is one frame only, and no time.
    """

    frames: Iterator[tuple[float, np.ndarray]]
    duration_s: float | None
    is_image: bool = False


@contextmanager
def play(video: Any) -> Iterator[Playback]:
    """Open whatever `Grounder.ground` takes: a path, a picture, or an iterable of (time_s, picture).

    Raises:
        VideoError: it cannot be read.
    """
    if isinstance(video, np.ndarray):
        yield Playback(iter([(0.0, check_picture(video, "the image"))]), 0.0, is_image=True)
        return
    if not isinstance(video, (str, os.PathLike)):
        yield Playback(_from_zero(iter(video)), None)
        return
    path = check_path(os.fspath(video))
    picture = open_image(path)
    if picture is not None and is_animation(picture):
        yield Playback(_from_zero(animation_frames(picture, path)), None)
    elif picture is not None:
        yield Playback(iter([(0.0, read_rgb(picture, path))]), 0.0, is_image=True)
    else:
        decoder = Decoder(path)
        try:
            yield Playback(_decoded(decoder), decoder.duration_s and float(decoder.duration_s))
        finally:
            decoder.close()


def _decoded(decoder: Decoder) -> Iterator[tuple[float, np.ndarray]]:
    timeline = Timeline(decoder.time_base, decoder.frame_s)
    for frame in decoder.frames():
        yield timeline.add(frame), shown_rgb(frame)
    if not timeline.times:
        raise decoder.no_frames()


def _from_zero(frames: Iterator[tuple[float, np.ndarray]]) -> Iterator[tuple[float, np.ndarray]]:
    origin: float | None = None
    for time_s, picture in frames:
        origin = time_s if origin is None else origin
        yield time_s - origin, picture
