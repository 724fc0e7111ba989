"""Sample the frames of a stream into groups, in constant memory.

The samples are those of a video file with the same frames: each grid point gets the last frame at or before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from bridge_stg.runtime.live.cuts import CutFinder
from bridge_stg.runtime.live.plan import LivePlan
from bridge_stg.runtime.live.shown import TOLERANCE_S, Shown


@dataclass(frozen=True, eq=False)
class FineSample:
    """A frame kept for the spatial pass."""

    place: int  # index on the fine grid, which begins with the shot
    time_s: float  # the frame's own time, in seconds from the first frame of the stream
    frame: np.ndarray  # uint8 [h, w, 3], RGB


@dataclass(frozen=True, eq=False)
class LiveGroup:
    """P consecutive coarse samples, and the fine frames of the same time range.

    All times are in seconds from the first frame of the stream.
    """

    place: int  # index of the first sample on the coarse grid, which begins with the shot; a multiple of P
    frames: np.ndarray  # uint8 [P, h, w, 3], RGB
    fine: tuple[FineSample, ...]  # in order of time
    arrived_s: float = 0.0  # when its newest frame arrived, on `time.monotonic`
    # float64 [N], times of all frames of the stream in this time range
    frame_times: np.ndarray = field(default_factory=lambda: np.zeros(0))
    # float64 [P], times of the frames that the samples show
    shown_times: np.ndarray = field(default_factory=lambda: np.zeros(0))
    shot_s: float = 0.0  # start of the shot; of a stream without cuts, 0
    end_s: float = math.inf  # end of the shot, if this is its last group


class LiveSampler:
    """Turns frames into groups.

    A frame is shown for at most `hold_s` seconds. After that the stream has a gap without samples, so that queries
    never see a frozen frame. With `whole`, for files, a group has all its `frame_times`, so that it comes later, the
    last group is padded, and frames may change their size. With `cuts`, so is the last group of each shot, and the
    grids begin again after it.
    """

    def __init__(self, plan: LivePlan, *, hold_s: float, whole: bool = False, cuts: CutFinder | None = None) -> None:
        self.gaps = 0  # so far
        self.end_s = 0.0  # end of the newest frame, whose length is that of the one before; set by `finish`
        self._origin_s: float | None = None
        self._plan, self._hold_s, self._whole, self._cuts = plan, hold_s, whole, cuts
        self._shown: Shown | None = None
        self._newest_s, self._frame_s = 0.0, plan.interval_s
        self._shot_s = 0.0
        self._coarse = self._fine = 0  # next points of the grids, which begin with the shot
        self._times: list[float] = []
        self._samples: list[tuple[np.ndarray, float]] = []  # with the times of their frames
        self._fine_samples: list[FineSample] = []

    def add(self, time_s: float, frame: Callable[[], np.ndarray]) -> Iterator[LiveGroup]:
        """Add the next frame, with its own time in seconds, and yield the groups that it completes.

        `frame` returns it, uint8 [H, W, 3] in RGB, and is called at most once, within the next two calls of `add`.
        """
        if self._origin_s is None:
            self._origin_s = time_s
        else:
            self._frame_s = time_s - self._origin_s - self._newest_s
        self._newest_s = time_s - self._origin_s
        shown = Shown(self._newest_s, frame, self._plan, any_size=self._whole)
        passed = iter([(shown, False)]) if self._cuts is None else self._cuts.add(shown, self._plan.fine_fps)
        yield from self._show(passed)

    def finish(self) -> Iterator[LiveGroup]:
        """Yield the groups that the last frame completes, shown as long as the frame before it."""
        if self._origin_s is not None:
            self.end_s = self._newest_s + max(min(self._frame_s, self._hold_s), 2 * TOLERANCE_S)
            if self._cuts is not None:
                yield from self._show(self._cuts.finish(self.end_s, self._plan.fine_fps))
            yield from self._end_shot(self.end_s)

    def _show(self, frames: Iterable[tuple[Shown, bool]]) -> Iterator[LiveGroup]:
        """Show these frames, one after the other, each with whether it begins a shot."""
        for shown, begins in frames:
            if begins:
                yield from self._end_shot(shown.time_s)
                self._shot_s, self._coarse, self._fine, self._times = shown.time_s, 0, 0, []
            elif self._shown is not None:
                until, limit = shown.time_s - TOLERANCE_S, self._shown.time_s + self._hold_s
                yield from self._fill(min(until, limit))
                if limit < until:
                    self._skip(until)
            self._shown = shown
            self._times.append(shown.time_s)

    def _end_shot(self, end_s: float) -> Iterator[LiveGroup]:
        """Show the current frame until the shot ends, and yield the last groups."""
        yield from self._fill(end_s - TOLERANCE_S)
        self._shown = None
        if self._whole and self._samples:
            missing = self._plan.group - len(self._samples)
            self._samples += self._samples[-1:] * missing
            self._coarse += missing
            yield replace(self._group(), end_s=end_s)

    def _group(self) -> LiveGroup:
        """Return the samples as a group, and begin the next one."""
        plan = self._plan
        place = self._coarse - plan.group
        start, end = self._coarse_s(place) - TOLERANCE_S, self._coarse_s(self._coarse) - TOLERANCE_S
        times = np.array(self._times)
        pictures, shown = zip(*self._samples)
        group = LiveGroup(
            place, np.stack(pictures), tuple(self._fine_samples),
            frame_times=times[(times >= start) & (times < end)], shown_times=np.array(shown), shot_s=self._shot_s,
        )  # fmt: skip
        self._samples, self._fine_samples, self._times = [], [], times[times >= end].tolist()
        return group

    def _coarse_s(self, place: int) -> float:
        return self._shot_s + place * self._plan.interval_s

    def _fine_s(self, place: int) -> float:
        return self._shot_s + place / self._plan.fine_fps

    def _fill(self, until: float) -> Iterator[LiveGroup]:
        """Use the current frame for all free grid points before `until`."""
        plan, shown = self._plan, self._shown
        assert shown is not None
        while True:
            coarse, fine = self._coarse_s(self._coarse), self._fine_s(self._fine)
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
                self._fine_samples.append(FineSample(self._fine, shown.time_s, shown.fine))
                self._fine += 1

    def _skip(self, until: float) -> None:
        """Leave the grid points before `until` empty, and continue with the next whole group."""
        plan = self._plan
        if min(self._coarse_s(self._coarse), self._fine_s(self._fine)) >= until:
            return
        self.gaps += 1
        self._coarse = plan.group * math.ceil((until - self._shot_s) / plan.interval_s / plan.group)
        self._fine = math.ceil(self._coarse * plan.interval_s * plan.fine_fps - TOLERANCE_S)
        self._samples, self._fine_samples = [], []
