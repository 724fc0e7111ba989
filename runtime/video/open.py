"""Open a video, an image or a stream of frames as the `VideoSource` for its kind."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.video.decoder import check_path
from bridge_stg.runtime.video.file import VideoFile
from bridge_stg.runtime.video.image import StillImage, read_image
from bridge_stg.runtime.video.source import Openable, VideoSource
from bridge_stg.runtime.video.stream import FrameStream, check_frame
from bridge_stg.runtime.video.token_budget import Budget


def open_source(
    video: str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]] | Openable,
    spec: ModelSpec,
    *,
    buffer_frames: int = 256,
    budget: Budget | None = None,
    device: DeviceContext | None = None,
) -> VideoSource:
    """Open a video, an image or a stream of frames. Raises VideoError if it cannot be read.

    `video` is the path of a video or image; an image, uint8 [H, W, 3] in RGB; or an iterable of (time in seconds, such
    an image), with strictly increasing times and one size. An iterable is read once, and at most `buffer_frames` of its
    frames are kept, at fine size; they may also be DLPack arrays on `device`, and stay there. Without a budget for the
    coarse frames, the spec's `max_visual_tokens` applies.
    """
    if isinstance(video, Openable):
        return video.open_source(
            spec, buffer_frames=buffer_frames, budget=budget or Budget(spec.frames.max_visual_tokens)
        )
    if isinstance(video, (str, os.PathLike)):
        path = check_path(os.fspath(video))
        image = read_image(path)
        if image is None:
            return VideoFile(path, spec, budget=budget)
        if isinstance(image, np.ndarray):
            return StillImage(image, spec, budget=budget, name=path)
        return FrameStream(image, spec, buffer_frames=buffer_frames, budget=budget, name=path)
    if isinstance(video, np.ndarray):
        return StillImage(check_frame(video, "the image"), spec, budget=budget, name="the image")
    if isinstance(video, Iterable) and not isinstance(video, (bytes, dict)):
        return FrameStream(video, spec, buffer_frames=buffer_frames, budget=budget, device=device)
    expected = "expected a path, a uint8 array [height, width, 3], or an iterator of (time in seconds, such an array)"
    raise VideoError("video.bad_type", f"cannot read a video from a {type(video).__name__}: {expected}")
