"""The interface of a source of frames, and the grids on which its frames are sampled.

The sources are in file.py (video files), stream.py (iterators) and image.py (images). Knows nothing of prompts and
graphs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.video.sampling import CoarseSampler, resize_all
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import Budget, CoarseChoice, CoarsePlan

MAX_FINE_PLACES = 2**26  # longest fine grid, some months; longer times are not in seconds, or damaged


@dataclass(frozen=True, eq=False)
class Samples:
    """N frames of a video, with their own times in seconds from its first frame."""

    frames: Array  # uint8 [N, h, w, 3], RGB
    times: np.ndarray  # float64 [N]


@dataclass(frozen=True, eq=False)
class CoarseFrames:
    """The whole video, sampled evenly: G groups of P consecutive samples, the last one padded with its last sample."""

    frames: Array  # uint8 [G, P, h, w, 3], RGB
    times: np.ndarray  # float64 [G, P], points of the sampling grid in seconds from the first frame
    interval_s: float  # seconds between two samples
    duration_s: float
    choice: CoarseChoice  # rate and size chosen for the budget

    @property
    def group_times(self) -> np.ndarray:
        """The time of each group, float64 [G]: the mean of its samples' times."""
        return np.asarray(self.times.mean(axis=1))


@runtime_checkable
class Openable(Protocol):
    """A video that opens itself, such as one that is decoded in a subprocess."""

    def open_source(self, spec: ModelSpec, *, buffer_frames: int, budget: Budget) -> VideoSource:
        """Open the video; see `open.open_source`."""


class VideoSource(AbstractContextManager["VideoSource"]):
    """One video, image or stream. A context manager; not for use by two threads at once.

    `width` and `height` are those of the frames as displayed (upright, square pixels), `fine_size` is the
    (height, width) of fine frames, all in pixels. Messages begin with `name`: the path, or the kind of source.
    """

    is_image = False
    clock = "timestamps"  # where the times come from, one of decoder.CLOCKS; known once the video has been read
    stream: int | None = None  # index of the video stream that is read; None if the file has only one
    read_ahead = False  # whether reading fine frames releases the GIL, so that another thread should do it

    def __init__(self, spec: ModelSpec, *, width: int, height: int, name: str, budget: Budget | None = None) -> None:
        self.width, self.height, self.name = width, height, name
        self._spec = spec
        try:
            _, self.fine_size = frame_sizes(height, width, spec)
            self._plan = CoarsePlan(height, width, spec, budget or Budget(spec.frames.max_visual_tokens))
        except VideoError as error:
            raise VideoError(error.code, f"{name}: {error}") from None
        self._samples: CoarseSampler | None = None
        self._coarse: CoarseFrames | None = None
        self._times = np.zeros(0)
        self._duration_s = 0.0
        self.tolerance_s = 1e-6
        """How much later than requested a frame may start: times in files are rounded to ticks of their clock."""

    @abstractmethod
    def _scan(self, limits: Limits) -> CoarseSampler:
        """Read the whole video once: return the coarse samples; set times, duration and tolerance.

        Reports the seconds read so far and the total (None: not known) to `limits`, for each frame.
        """

    @abstractmethod
    def _fetch(self, times: np.ndarray, limits: Limits) -> Samples:
        """Return the frames shown at these times [N ≥ 1], at fine size; check `limits` for every decoded frame."""

    @property
    def frame_times(self) -> np.ndarray:
        """The times of all frames in seconds, float64, strictly increasing from 0; reads the video if necessary."""
        self.samples()
        return self._times

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last one; reads the video if necessary."""
        self.samples()
        return self._duration_s

    def samples(self, limits: Limits | None = None) -> CoarseSampler:
        """Decode the video once and return the samples that `coarse` groups; progress counts the video's seconds."""
        if self._samples is None:
            self._samples = self._scan(limits or Limits())
        return self._samples

    def coarse(self, limits: Limits | None = None) -> CoarseFrames:
        """Return the whole video at coarse rate and size; it is decoded once, with its seconds as progress.

        The samples are at k / coarse_fps. Their interval doubles until there are at most `max_coarse_groups` groups,
        these fit the budget at the smallest size (see token_budget.py), and all groups print as different times.
        """
        if self._coarse is None:
            samples = self.samples(limits)
            self._coarse = self._group(samples)
            samples.items = []
        return self._coarse

    def fine(self, times: Sequence[float] | np.ndarray, limits: Limits | None = None) -> Samples:
        """Return the frames shown at `times` (seconds from the first frame, any order), at fine size.

        Each is the last frame that starts at or before its time, within half a tick of the video's clock; the first
        frame for earlier times. `Samples.times` contains the frames' own times, which repeat for a slow video. `limits`
        stops the reading between two frames.
        """
        wanted = np.asarray(times, np.float64).reshape(-1)
        if not np.isfinite(wanted).all():
            bad = wanted[~np.isfinite(wanted)][0]
            raise VideoError("video.bad_time", f"{self.name}: no frame at the time {bad}; expected seconds")
        limits = limits or Limits()
        self.samples(limits)
        if not wanted.size:
            return Samples(frames=np.zeros((0, *self.fine_size, 3), np.uint8), times=np.zeros(0))
        return self._fetch(wanted, limits)

    def fine_grid(self) -> np.ndarray:
        """Return the times of the fine grid, float64: all k / fine_fps inside the video; an image has one."""
        rate = self._spec.frames.fine_fps
        places = 1 if self.is_image else max(1, math.ceil((self.duration_s - self.tolerance_s) * rate))
        if places > MAX_FINE_PLACES:
            raise VideoError("video.too_long", f"{self.name} lasts {self.duration_s:.3g} s; are its times in seconds?")
        return np.arange(places) / rate

    @abstractmethod
    def close(self) -> None:
        """Close files and drop buffers; the result of `coarse` stays available."""

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sampler(self, length_s: float | None = None) -> CoarseSampler:
        frames, group = self._spec.frames, self._spec.vision.temporal_patch_size
        stride = 1
        while stride * group / frames.coarse_fps < 10.0**-self._spec.prompt.time_decimals:
            stride *= 2
        return CoarseSampler(self._plan, frames.coarse_fps, group=group, stride=stride, length_s=length_s)

    def _group(self, sampler: CoarseSampler) -> CoarseFrames:
        group, decimals = self._spec.vision.temporal_patch_size, self._spec.prompt.time_decimals
        limits = list(self._plan.capacity_limits) if sampler.thinned else []
        while True:
            places = np.arange(-(-len(sampler.items) // group) * group).clip(max=len(sampler.items) - 1)
            times = sampler.times[places].reshape(-1, group)
            printed = [f"{time:.{decimals}f}" for time in times.mean(axis=1)]
            if len(set(printed)) == len(printed):  # the padded last group may be close to the previous one
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
