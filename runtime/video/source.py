"""Which frames of a video are read, at which size, and what a source of frames is.

The sampling grid and the interface; the sources themselves are in video.py (files), stream.py (iterators) and images.py
(pictures). Knows nothing of prompts and graphs.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.video.sampling import CoarseSampler, resize_all
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import Budget, CoarseChoice, CoarsePlan

MAX_FINE_PLACES = 2**26
"""Of the fine grid: some months. Times that are longer are in another unit than seconds, or damaged."""


@dataclass(frozen=True, eq=False)
class Samples:
    """N frames of a video.

    Attributes:
        frames: uint8 [N, h, w, 3], RGB.
        times: float64 [N], seconds from the first frame of the video: the own time of each of these frames.
    """

    frames: Array
    times: np.ndarray


@dataclass(frozen=True, eq=False)
class CoarseFrames:
    """The whole video, sampled evenly: G groups of P consecutive samples.

    Attributes:
        frames: uint8 [G, P, h, w, 3], RGB. The last group is filled up by repeating its last sample.
        times: float64 [G, P], seconds from the first frame: the places on the sampling grid.
        interval_s: seconds between two samples.
        duration_s: length of the video.
        choice: the rate and size that the budget left.
    """

    frames: Array
    times: np.ndarray
    interval_s: float
    duration_s: float
    choice: CoarseChoice

    @property
    def group_times(self) -> np.ndarray:
        """The time of each group, float64 [G]: the mean of its samples' times."""
        return self.times.mean(axis=1)


class VideoSource(ABC):
    """One video, image or stream. A context manager; not for use by two threads at once.

    Attributes:
        width, height: of the picture as it is shown (rotation applied), in pixels.
        is_image: whether it is a single picture: one frame at time 0 that lasts one coarse sample interval.
        read_ahead: whether reading fine frames is work that leaves Python, so that another thread should do it.
    """

    is_image = False
    read_ahead = False

    def __init__(
        self,
        spec: ModelSpec,
        *,
        width: int,
        height: int,
        name: str,
        budget: Budget | None = None,
    ) -> None:
        self.width, self.height = width, height
        self._spec, self._name = spec, name
        try:
            _, self._fine_size = frame_sizes(height, width, spec)
            self._plan = CoarsePlan(height, width, spec, budget or Budget(spec.frames.max_visual_tokens))
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from None
        self._coarse: CoarseFrames | None = None
        self._times = np.zeros(0)
        self._duration_s = 0.0
        self._tolerance_s = 1e-6
        """How much later than asked for a frame may be shown: times of files are rounded to their clock's ticks."""

    @abstractmethod
    def _scan(self, limits: Limits) -> CoarseSampler:
        """Read everything once: return the coarse samples, set the times, the duration and the tolerance.

        Reports each frame to `limits`: the seconds read so far, and the seconds in all (None where not known).
        """

    @abstractmethod
    def _fetch(self, times: np.ndarray, limits: Limits) -> Samples:
        """Return the frames shown at these times [N ≥ 1], at fine size; check `limits` for every decoded frame."""

    @property
    def name(self) -> str:
        """How messages call it: a path, or what it is."""
        return self._name

    @property
    def fine_size(self) -> tuple[int, int]:
        """Height and width of the fine frames, in pixels."""
        return self._fine_size

    @property
    def frame_times(self) -> np.ndarray:
        """The times of all frames, float64, strictly increasing from 0, in seconds; reads the video if need be."""
        self.coarse()
        return self._times

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last one; reads the video if need be."""
        self.coarse()
        return self._duration_s

    def coarse(self, limits: Limits | None = None) -> CoarseFrames:
        """Return the whole video at coarse rate and size: decoded once, kept for later calls.

        The samples lie at k / coarse_fps. Their interval doubles until there are at most `max_coarse_groups` groups,
        until these fit the budget at the smallest size (see token_budget.py), and until no two print as the same time.

        Args:
            limits: stops the reading, and reports the seconds read so far and the seconds in all (None: not known).
        """
        if self._coarse is None:
            self._coarse = self._group(self._scan(limits or Limits()))
        return self._coarse

    def fine(self, times: Sequence[float] | np.ndarray, limits: Limits | None = None) -> Samples:
        """Return, in their order, the frames shown at `times` (seconds from the first frame), at fine size.

        Each is the last frame that starts at or before that time, give or take half a tick of the video's clock.
        `Samples.times` holds the frames' own times, so a slow video gives the same one several times. Times before the
        first and after the last frame give that frame. `limits` stops the reading between two frames.
        """
        asked = np.asarray(times, np.float64).reshape(-1)
        if not np.isfinite(asked).all():
            raise VideoError(f"{self._name}: cannot show the time {asked[~np.isfinite(asked)][0]}; expected seconds")
        limits = limits or Limits()
        self.coarse(limits)
        if not asked.size:
            return Samples(frames=np.zeros((0, *self._fine_size, 3), np.uint8), times=np.zeros(0))
        return self._fetch(asked, limits)

    def fine_grid(self) -> np.ndarray:
        """Return the times of the fine grid, float64: all k / fine_fps inside the video; an image has one."""
        rate = self._spec.frames.fine_fps
        places = 1 if self.is_image else max(1, math.ceil((self.duration_s - self._tolerance_s) * rate))
        if places > MAX_FINE_PLACES:
            raise VideoError(
                f"{self._name} lasts {self.duration_s:.3g} s by the times of its frames, more than can be sampled; "
                "expected times in seconds, so check their unit"
            )
        return np.arange(places) / rate

    @abstractmethod
    def close(self) -> None:
        """Let go of files and buffers. What `coarse` has read stays available."""

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sampler(self, length_s: float | None = None) -> CoarseSampler:
        frames, group = self._spec.frames, self._spec.vision.temporal_patch_size
        stride = 1
        while stride * group / frames.coarse_fps < 10.0**-self._spec.prompt.time_decimals:
            stride *= 2
        return CoarseSampler(self._plan, frames.coarse_fps, group=group, stride=stride, length_s=length_s)

    def _shown(self, times: np.ndarray) -> np.ndarray:
        """Return the index of the frame shown at each time, int64 [N]."""
        return np.maximum(np.searchsorted(self._times, times + self._tolerance_s, side="right") - 1, 0)

    def _group(self, sampler: CoarseSampler) -> CoarseFrames:
        group, decimals = self._spec.vision.temporal_patch_size, self._spec.prompt.time_decimals
        limits = list(self._plan.capacity_limits) if sampler.thinned else []
        while True:
            places = np.arange(-(-len(sampler.items) // group) * group).clip(max=len(sampler.items) - 1)
            times = sampler.times[places].reshape(-1, group)
            printed = [f"{time:.{decimals}f}" for time in times.mean(axis=1)]
            if len(set(printed)) == len(printed):  # the filled-up last group may come close to the one before it
                size = self._plan.size_of(times.mean(axis=1), at_most=sampler.size)
                if size is not None or len(times) == 1:
                    break
                limits.append("max_positions")
            sampler.thin()
        size = size or self._plan.smallest
        frames = arrays.stack(resize_all([sampler.items[place] for place in places], size))
        return CoarseFrames(
            frames=frames.reshape(*times.shape, *size, 3),
            times=times,
            interval_s=sampler.interval_s,
            duration_s=self._duration_s,
            choice=self._plan.choice(times.mean(axis=1), size, fps=1 / sampler.interval_s, limits=limits),
        )


def open_source(
    video: str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]],
    spec: ModelSpec,
    *,
    buffer_frames: int = 256,
    budget: Budget | None = None,
    device: DeviceContext | None = None,
) -> VideoSource:
    """Open a video, an image or a stream of frames.

    Args:
        video: the path of a video or image; or a picture, uint8 [H, W, 3] in RGB; or an iterable of (time in seconds,
            such a picture), with strictly increasing times and one size, which is read once.
        spec: rates, sizes and limits of the model.
        buffer_frames: how many frames of an iterable are kept, at fine size.
        budget: what the coarse frames may take of the prompt; None: the spec's `max_visual_tokens`.
        device: where frames of an iterable may lie too, in arrays that speak DLPack; they stay there.

    Raises:
        VideoError: it cannot be read; the message says what was found and what to do.
    """
    from bridge_stg.runtime.video import decoder as container
    from bridge_stg.runtime.video import file as files
    from bridge_stg.runtime.video import image as images
    from bridge_stg.runtime.video import stream

    if isinstance(video, (str, os.PathLike)):
        path = container.check_path(os.fspath(video))
        picture = images.open_image(path)
        if picture is None:
            return files.VideoFile(path, spec, budget=budget)
        if not images.is_animation(picture):
            return images.StillImage(images.read_rgb(picture, path), spec, budget=budget, name=path)
        frames = images.animation_frames(picture, path)
        return stream.FrameStream(frames, spec, buffer_frames=buffer_frames, budget=budget, name=path)
    if isinstance(video, np.ndarray):
        return images.StillImage(stream.check_picture(video, "the image"), spec, budget=budget, name="the image")
    if isinstance(video, Iterable) and not isinstance(video, (bytes, dict)):
        return stream.FrameStream(video, spec, buffer_frames=buffer_frames, budget=budget, device=device)
    raise VideoError(
        f"cannot read a video from a {type(video).__name__}: expected a path, a uint8 array [height, width, 3], or an "
        "iterator of (time in seconds, such an array)"
    )
