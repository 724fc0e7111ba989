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
from bridge_stg.runtime.video.stream import STREAM, FrameStream, check_frame
from bridge_stg.runtime.video.token_budget import Budget


def open_source(
    video: str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]] | Openable,
    spec: ModelSpec,
    *,
    buffer_frames: int = 256,
    budget: Budget | None = None,
    device: DeviceContext | None = None,
    stream: int | None = None,
) -> VideoSource:
    """Open a video, an image or a stream of frames. Raises VideoError if it cannot be read.

    `video` is the path of a video or image; an image, uint8 [H, W, 3] in RGB; or an iterable of (time in seconds, such
    an image), with strictly increasing times and one size. An iterable is read once, and at most `buffer_frames` of its
    frames are kept, at fine size; they may also be DLPack arrays on `device`, and stay there. Without a budget for the
    coarse frames, the spec's `max_visual_tokens` applies. `stream` is the video stream of a file, see `CallOptions`.
    """
    name = None
    if isinstance(video, (str, os.PathLike)):
        name = check_path(os.fspath(video))
        image = read_image(name)
        if image is None:
            return VideoFile(name, spec, budget=budget, stream=stream)
        video = image
    check_no_stream(stream, name or "this video")
    if isinstance(video, Openable):
        budget = budget or Budget(spec.frames.max_visual_tokens)
        return video.open_source(spec, buffer_frames=buffer_frames, budget=budget)
    if isinstance(video, np.ndarray):
        return StillImage(check_frame(video, "the image"), spec, budget=budget, name=name or "the image")
    if isinstance(video, Iterable) and not isinstance(video, (bytes, dict)):
        name = name or STREAM
        return FrameStream(video, spec, buffer_frames=buffer_frames, budget=budget, device=device, name=name)
    expected = "expected a path, a uint8 array [height, width, 3], or an iterator of (time in seconds, such an array)"
    raise VideoError("video.bad_type", f"cannot read a video from a {type(video).__name__}: {expected}")


def check_no_stream(stream: int | None, name: str) -> None:
    """Raise VideoError if a stream was chosen for something other than a video file."""
    if stream is not None:
        text = f"stream {stream}: {name} has no streams to choose from, since it is not a video file; omit the stream"
        raise VideoError("video.bad_stream", text)
