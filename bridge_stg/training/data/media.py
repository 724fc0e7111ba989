"""Open the medium of a clip as the runtime's source of frames: a part of it, and a part of each frame.

Memory is bounded for a medium of any length: a source keeps its coarse frames, at most 64 MiB of decoded frames or 256
fine frames, and the fine frames that were requested.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.evaluation.media import frame_files
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.video.decoder import Decoder, check_path
from bridge_stg.runtime.video.file import VideoFile
from bridge_stg.runtime.video.frame import FrameConverter, resize
from bridge_stg.runtime.video.image import DAMAGE, Animation, StillImage, is_animation, open_image, read_image, read_rgb
from bridge_stg.runtime.video.sampling import CoarseSampler
from bridge_stg.runtime.video.source import Samples, VideoSource
from bridge_stg.runtime.video.stream import FrameStream
from bridge_stg.runtime.video.token_budget import Budget
from bridge_stg.training.data.sources import Clip

ANIMATION_FRAMES = 256  # fine frames that are kept of an animated image
Crop = tuple[int, int, int, int]  # left, top, right, bottom in pixels
EXIF_ORIENTATION, EXIF_TRANSPOSED = 0x0112, 5  # orientations from 5 on exchange width and height


@dataclass(frozen=True)
class Medium:
    """What is known of a medium before it is decoded.

    Attributes:
        kind: `video`, `image`, `frames` (a folder of them) or `animation`.
        size: width and height of its frames in pixels, as displayed.
        duration_s: seconds of the part to use, as the file states it; None: unknown.
    """

    kind: str
    size: tuple[int, int]
    duration_s: float | None


def read_medium(clip: Clip) -> Medium:
    """Return what a medium's file states; decodes at most one frame. Raises VideoError if it cannot be opened."""
    path = _path(clip)
    start, end = clip.part or (0.0, math.inf)
    if clip.frame_rate is not None:
        files = _files(Path(path))
        height, width = _read(files[0]).shape[:2]
        return Medium("frames", (width, height), max(0.0, min(end, len(files) / clip.frame_rate) - start))
    image = open_image(check_path(path))
    if image is None:
        with closing(Decoder(path, clip.stream)) as decoder:
            first = next(decoder.frames(), None)
            if first is None:
                raise decoder.no_frames()
            height, width = decoder.converter.size(first)
            return Medium("video", (width, height), _length(clip.part, decoder.duration_s))
    with image:
        if is_animation(image):
            return Medium("animation", image.size, None)
        transposed = False
        with suppress(*DAMAGE):  # the EXIF block may be damaged in an intact image
            transposed = image.getexif().get(EXIF_ORIENTATION, 1) >= EXIF_TRANSPOSED
        return Medium("image", image.size[::-1] if transposed else image.size, 0.0)


def open_clip(
    clip: Clip, spec: ModelSpec, *, budget: Budget, crop: Crop | None = None, later_s: float = 0.0
) -> tuple[VideoSource, float]:
    """Open a clip; return its source, and by how many seconds its first frame is later than that of the whole clip.

    Args:
        clip: the clip.
        spec: rules of rates and sizes.
        budget: limits of the coarse frames.
        crop: part of each frame; None: all of it.
        later_s: seconds of the clip's start to leave out; not for images.

    Raises:
        VideoError: the medium cannot be read.
    """
    path = _path(clip)
    start, end = clip.part or (0.0, math.inf)
    part = (start + later_s, end)
    if clip.frame_rate is not None:
        folder = FrameFolder(Path(path), clip.frame_rate, spec, budget=budget, part=part, crop=crop)
        return folder, folder.first_s - start if later_s else 0.0
    image = read_image(check_path(path))
    if image is None:
        file = VideoPart(path, spec, budget=budget, stream=clip.stream, part=part, crop=crop)
        return file, file.first_s - start if later_s else 0.0
    if isinstance(image, Animation):
        return FrameStream(image, spec, buffer_frames=ANIMATION_FRAMES, budget=budget, name=path), 0.0
    return StillImage(cropped(image, crop), spec, budget=budget, name=path), 0.0


def cropped(rgb: np.ndarray, crop: Crop | None) -> np.ndarray:
    """Return a part of a frame [H, W, 3]."""
    if crop is None:
        return rgb
    left, top, right, bottom = crop
    return rgb[top:bottom, left:right]


class VideoPart(VideoFile):
    """A part of a video file, and of each of its frames; its times count from the first frame of the part."""

    def __init__(
        self, path: str, spec: ModelSpec, *, budget: Budget, stream: int | None, part: tuple[float, float],
        crop: Crop | None,
    ) -> None:  # fmt: skip
        self._part, self._crop = part, crop
        super().__init__(path, spec, budget=budget, stream=stream)
        assert isinstance(self._decoder, PartDecoder)
        self.first_s = self._decoder.first_s
        """The time of the first frame of the part, in seconds from the start of the file."""

    def _open(self, path: str, stream: int | None) -> Decoder:
        return PartDecoder(path, stream, self._part, self._crop)


class PartDecoder(Decoder):
    """A decoder whose `frames` are those of a part of the video."""

    def __init__(self, path: str, stream: int | None, part: tuple[float, float], crop: Crop | None) -> None:
        super().__init__(path, stream)
        self._part, self._sought, self.first_s = part, False, 0.0
        self.converter = CroppingConverter(self._stream, crop)
        self.duration_s = _length(part, self.duration_s)

    def frames(self) -> Iterator[Any]:
        """Yield the frames of the part; after a seek, all, which the caller identifies by their time stamps."""
        if self._sought:
            yield from super().frames()
            return
        (start, end), timeline, first = self._part, self.timeline(), True
        for frame in super().frames():
            time = timeline.add(frame)
            if time >= end - timeline.tolerance_s:
                break
            if time >= start - timeline.tolerance_s:
                if first:
                    self.first_s, first = time, False
                yield frame

    def frames_from(self, pts: int) -> Iterator[Any]:
        """Seek as `Decoder.frames_from`; the frames may continue after the part."""
        self._sought = True
        yield from super().frames_from(pts)

    def no_frames(self) -> VideoError:
        """Return the error for a part without a decodable frame."""
        start, end = self._part
        if start == 0 and end == math.inf:
            return super().no_frames()
        text = f"{self._path}: has no frame between {start:.2f} s and {end:.2f} s, as annotated; download it again"
        return VideoError("video.too_short", text)


class CroppingConverter(FrameConverter):
    """Converts a part of each frame to RGB."""

    def __init__(self, stream: Any, crop: Crop | None) -> None:
        super().__init__(stream)
        self._crop = crop

    def size(self, frame: Any) -> tuple[int, int]:
        """Return (height, width) of the part."""
        if self._crop is None:
            return super().size(frame)
        left, top, right, bottom = self._crop
        return bottom - top, right - left

    def rgb(self, frame: Any) -> np.ndarray:
        """Return the part as displayed, uint8 [height, width, 3]."""
        return cropped(super().rgb(frame), self._crop)


class FrameFolder(VideoSource):
    """A folder of images as the frames of a video; only those that are shown at a requested time are read."""

    def __init__(
        self, folder: Path, frame_rate: float, spec: ModelSpec, *, budget: Budget, part: tuple[float, float],
        crop: Crop | None,
    ) -> None:  # fmt: skip
        files = _files(folder)
        times = np.arange(len(files)) / frame_rate
        inside = np.flatnonzero((times >= part[0] - 1e-6) & (times < part[1] - 1e-6))
        if not len(inside):
            text = f"{folder}: has no frame between {part[0]:.2f} s and {part[1]:.2f} s; download it again"
            raise VideoError("video.too_short", text)
        self._paths, self._rate, self._crop = [files[i] for i in inside], frame_rate, crop
        self.first_s = float(times[inside[0]])
        """The time of the first frame of the part, in seconds from the first frame of the folder."""
        first = cropped(_read(self._paths[0]), crop)
        super().__init__(spec, width=first.shape[1], height=first.shape[0], name=str(folder), budget=budget)

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _frame(self, index: int) -> np.ndarray:
        frame = cropped(_read(self._paths[index]), self._crop)
        if frame.shape[:2] != (self.height, self.width):
            sizes = f"{frame.shape[1]} × {frame.shape[0]} pixels after frames of {self.width} × {self.height}"
            raise VideoError("video.size_changed", f"{self._paths[index]} has {sizes}; download the sequence again")
        return frame

    def _scan(self, limits: Limits) -> CoarseSampler:
        count = len(self._paths)
        self._times, self._duration_s = np.arange(count) / self._rate, count / self._rate
        sampler = self._sampler(self._duration_s)
        for index in range(count):
            limits.check()
            until = (index + 1) / self._rate - self.tolerance_s
            sampler.fill(until, partial(self._resized, index, sampler))
        return sampler

    def _resized(self, index: int, sampler: CoarseSampler) -> np.ndarray:
        return resize(self._frame(index), sampler.size)

    def _fetch(self, times: np.ndarray, limits: Limits) -> Samples:
        indices = np.maximum(np.searchsorted(self._times, times + self.tolerance_s, side="right") - 1, 0)
        wanted, places = np.unique(indices, return_inverse=True)
        frames = np.stack([resize(self._frame(int(index)), self.fine_size) for index in wanted])
        return Samples(frames=frames[places.reshape(-1)], times=self._times[indices])


def _path(clip: Clip) -> str:
    if clip.media is None:
        raise VideoError("video.not_found", f"{clip.name}: was not found in the folder of media")
    return os.fspath(clip.media)


def _length(part: tuple[float, float] | None, duration_s: float | None) -> float | None:
    """Return the seconds of a part of a video; None if unknown."""
    start, end = part or (0.0, math.inf)
    end = min(end, math.inf if duration_s is None else duration_s)
    return None if end == math.inf else max(0.0, end - start)


def _files(folder: Path) -> list[Path]:
    try:
        files = frame_files(folder)
    except OSError as error:
        raise VideoError("video.not_found", f"{folder}: cannot be listed ({error.strerror})") from None
    if not files:
        raise VideoError("video.no_frames", f"{folder}: has no images; download the sequence again")
    return files


def _read(path: Path) -> np.ndarray:
    try:
        image = open_image(os.fspath(path))
    except OSError as error:
        raise VideoError("video.unreadable", f"{path}: cannot be read ({error.strerror})") from None
    if image is None:
        raise VideoError("video.unreadable", f"{path}: is not a readable image; download the sequence again")
    return read_rgb(image, os.fspath(path))
