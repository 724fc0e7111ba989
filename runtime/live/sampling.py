"""Sample the frames of a stream into groups, in constant memory.

The samples are those of a video file with the same frames: each grid point gets the last frame at or before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.live.plan import LivePlan
from bridge_stg.runtime.video.frame import resize

TOLERANCE_S = 1e-6  # how much later than its grid point a sample may start; the same as in `FrameStream`


@dataclass(frozen=True, eq=False)
class FineSample:
    """A frame kept for the spatial pass."""

    place: int  # index on the stream's fine grid
    time_s: float  # the frame's own time, in seconds from the first frame of the stream
    frame: np.ndarray  # uint8 [h, w, 3], RGB


@dataclass(frozen=True, eq=False)
class LiveGroup:
    """P consecutive coarse samples, and the fine frames of the same time range."""

    place: int  # index of the first sample on the stream's coarse grid, a multiple of P
    frames: np.ndarray  # uint8 [P, h, w, 3], RGB
    fine: tuple[FineSample, ...]  # in order of time
    arrived_s: float = 0.0  # when its newest frame arrived, on `time.monotonic`
    # float64 [N], times of all frames of the stream in this time range
    frame_times: np.ndarray = field(default_factory=lambda: np.zeros(0))
    # float64 [P], times of the frames that the samples show
    shown_times: np.ndarray = field(default_factory=lambda: np.zeros(0))


class _Shown:
    """The current frame, shown until the next one; converted and resized once per size, and only if it is sampled."""

    def __init__(self, time_s: float, frame: Callable[[], np.ndarray], plan: LivePlan) -> None:
        self.time_s, self._frame, self._plan = time_s, frame, plan
        self._rgb: np.ndarray | None = None
        self._sizes: dict[tuple[int, int], np.ndarray] = {}

    def at(self, size: tuple[int, int]) -> np.ndarray:
        if size not in self._sizes:
            if self._rgb is None:
                self._rgb = self._frame()
                height, width = self._rgb.shape[:2]
                if (width, height) != (self._plan.width, self._plan.height):
                    sizes = f"from {self._plan.width} × {self._plan.height} to {width} × {height} pixels"
                    raise VideoError("video.size_changed", f"the stream's frames changed {sizes}; start a new watch")
            self._sizes[size] = resize(self._rgb, size)
        return self._sizes[size]


class LiveSampler:
    """Turns frames into groups.

    A frame is shown for at most `hold_s` seconds. After that the stream has a gap without samples, so that queries
    never see a frozen frame. Nothing is sampled before the point `start` of the coarse grid, a multiple of P. With
    `whole`, for files, a group has all its `frame_times`, so that it comes later, and the last group is padded.
    """

    def __init__(self, plan: LivePlan, *, hold_s: float, start: int = 0, whole: bool = False) -> None:
        self.gaps = 0  # so far
        self.end_s = 0.0  # end of the newest frame, whose length is that of the one before; set by `finish`
        self._origin_s: float | None = None
        self._plan, self._hold_s, self._whole = plan, hold_s, whole
        self._shown: _Shown | None = None
        self._frame_s = plan.interval_s
        self._coarse, self._fine = start, math.ceil(start * plan.interval_s * plan.fine_fps - TOLERANCE_S)
        self._times: list[float] = []
        self._samples: list[tuple[np.ndarray, float]] = []  # with the times of their frames
        self._fine_samples: list[FineSample] = []

    def add(self, time_s: float, frame: Callable[[], np.ndarray]) -> Iterator[LiveGroup]:
        """Add the next frame, with its own time in seconds, and yield the groups that it completes.

        `frame` returns it, uint8 [H, W, 3] in RGB, and is called at most once, within the next two calls of `add`.
        """
        if self._origin_s is None:
            self._origin_s = time_s
        time = time_s - self._origin_s
        if self._shown is not None:
            until, limit = time - TOLERANCE_S, self._shown.time_s + self._hold_s
            yield from self._fill(min(until, limit))
            if limit < until:
                self._skip(until)
            self._frame_s = time - self._shown.time_s
        self._shown = _Shown(time, frame, self._plan)
        self._times.append(time)

    def finish(self) -> Iterator[LiveGroup]:
        """Yield the groups that the last frame completes, shown as long as the frame before it."""
        if self._shown is not None:
            self.end_s = self._shown.time_s + max(min(self._frame_s, self._hold_s), 2 * TOLERANCE_S)
            yield from self._fill(self.end_s - TOLERANCE_S)
            self._shown = None
            if self._whole and self._samples:
                missing = self._plan.group - len(self._samples)
                self._samples += self._samples[-1:] * missing
                self._coarse += missing
                yield self._group()

    def _group(self) -> LiveGroup:
        """Return the samples as a group, and begin the next one."""
        plan = self._plan
        place, end = self._coarse - plan.group, self._coarse * plan.interval_s - TOLERANCE_S
        times = np.array(self._times)
        inside = (times >= place * plan.interval_s - TOLERANCE_S) & (times < end)
        pictures, shown = zip(*self._samples)
        group = LiveGroup(
            place, np.stack(pictures), tuple(self._fine_samples),
            frame_times=times[inside], shown_times=np.array(shown),
        )  # fmt: skip
        self._samples, self._fine_samples, self._times = [], [], times[times >= end].tolist()
        return group

    def _fill(self, until: float) -> Iterator[LiveGroup]:
        """Use the current frame for all free grid points before `until`."""
        plan, shown = self._plan, self._shown
        assert shown is not None
        while True:
            coarse, fine = self._coarse * plan.interval_s, self._fine / plan.fine_fps
            # Times are rounded, so grid points are compared with a tolerance far below their distance.
            if len(self._samples) == plan.group:
                if fine > coarse - TOLERANCE_S and (not self._whole or until > coarse - TOLERANCE_S):
                    yield self._group()
                else:
                    coarse = math.inf
            if min(coarse, fine) >= until:
                return
            if coarse <= fine + TOLERANCE_S:
                self._samples.append((shown.at(plan.coarse_size), shown.time_s))
                self._coarse += 1
            else:
                self._fine_samples.append(FineSample(self._fine, shown.time_s, shown.at(plan.fine_size)))
                self._fine += 1

    def _skip(self, until: float) -> None:
        """Leave the grid points before `until` empty, and continue with the next whole group."""
        plan = self._plan
        if self._coarse * plan.interval_s >= until and self._fine / plan.fine_fps >= until:
            return
        self.gaps += 1
        self._coarse = plan.group * math.ceil(until / plan.interval_s / plan.group)
        self._fine = math.ceil(self._coarse * plan.interval_s * plan.fine_fps - TOLERANCE_S)
        self._samples, self._fine_samples = [], []
