"""Find the hard cuts of a video while it is read.

As in PySceneDetect's `AdaptiveDetector` (https://www.scenedetect.com/docs/latest/api/detectors.html), whose defaults
are used here, the difference of two frames must be large, also compared with those around it: motion makes no cut.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.live.shown import TOLERANCE_S, Shown

LEAST = 15.0  # least mean difference of two frames at a cut, of 255
RATIO = 3.0  # how many times the difference of the frames around it
RECENT = 4  # number of differences before a cut, whose mean counts as much as the difference after it
SHORTEST_S = 1.0  # least seconds from one cut to the next, so that a strobe light does not make many shots
BLACK = 16  # largest brightness of bars at the edges, of 255
LEAST_SHARE = 0.25  # least share of the frame inside the bars: a portrait clip in a landscape frame takes 0.32
CELLS = 32  # frames are compared by the means of at least 32 × 32 cells


class CutFinder:
    """Passes the frames of a video on, slightly delayed, each with whether a shot begins with it.

    The frames that are shown at `rate` points per second, counted from the start of the shot, are compared; these are
    the fine frames. If what was shown before a cut is back one point later, there was a flash, and no cut. With the
    `known` cuts of an earlier pass over the same video, nothing is compared.

    Attributes:
        times: times of the frames with which a shot begins, in seconds, without the first frame of the video.
    """

    def __init__(self, known: Iterable[float] | None = None) -> None:
        self.times: list[float] = []
        self._known = None if known is None else frozenset(known)
        self._start_s, self._point = 0.0, 0  # of the shot; number of the next point
        self._waiting: list[Shown] = []  # the newest frame; if a cut is possible, all frames from there on
        self._possible: tuple[np.ndarray, float] | None = None  # picture after the cut, difference from the one before
        self._before: np.ndarray | None = None
        self._recent = deque([0.0], RECENT)

    def add(self, shown: Shown, rate: float) -> Iterator[tuple[Shown, bool]]:
        """Add the next frame, and yield those that no longer wait."""
        if self._known is not None:
            yield self._passed(shown, shown.time_s in self._known)
            return
        yield from self._compared(until=shown.time_s, rate=rate)
        self._waiting.append(shown)
        if self._possible is not None:
            shown.keep()

    def finish(self, end_s: float, rate: float) -> Iterator[tuple[Shown, bool]]:
        """Yield all frames that wait; the last one is shown until `end_s`. No shot begins at the last point."""
        yield from self._compared(until=end_s, rate=rate)
        yield from self._flush()

    def _compared(self, *, until: float, rate: float) -> Iterator[tuple[Shown, bool]]:
        """Compare the newest frame, if it is shown at a point before `until`."""
        point = max(self._point, math.ceil((until - TOLERANCE_S - self._start_s) * rate))
        sampled, self._point = point > self._point, point
        if sampled and self._waiting:
            yield from self._at_point(_picture(self._waiting[-1]), until, rate)
        elif self._possible is None:
            yield from self._flush()

    def _at_point(self, picture: np.ndarray, until: float, rate: float) -> Iterator[tuple[Shown, bool]]:
        usual, before = sum(self._recent) / len(self._recent), self._before
        if self._possible is None:
            changed = 0.0 if before is None else _difference(before, picture)
            later = self._waiting[-1].time_s >= self._start_s + SHORTEST_S - TOLERANCE_S
            if later and changed >= max(LEAST, RATIO * usual / 2):
                self._possible = picture, changed
                self._waiting[-1].keep()
                return
            self._recent.append(changed)
        else:
            (after, changed), self._possible = self._possible, None
            moved = _difference(after, picture)
            assert before is not None
            if changed >= RATIO * (usual + moved) / 2 and _difference(before, picture) >= changed / 2:
                first, *others = self._waiting
                self._waiting = []
                self._start_s, self._point, self._before = first.time_s, 1, after
                self._recent = deque([0.0], RECENT)
                yield self._passed(first, True)
                for shown in others:
                    yield from self.add(shown, rate)
                yield from self._compared(until=until, rate=rate)
                return
            self._recent.append(min(changed, moved))
        self._before = picture
        yield from self._flush()

    def _flush(self) -> Iterator[tuple[Shown, bool]]:
        waiting, self._waiting, self._possible = self._waiting, [], None
        for shown in waiting:
            yield self._passed(shown, False)

    def _passed(self, shown: Shown, begins: bool) -> tuple[Shown, bool]:
        if begins:
            self.times.append(shown.time_s)
        return shown, begins


def _picture(shown: Shown) -> np.ndarray:
    """Return a frame as float32 [h, w, 3] of few cells."""
    frame = shown.fine
    factors = max(1, frame.shape[1] // CELLS), max(1, frame.shape[0] // CELLS)
    return np.asarray(load_package("PIL.Image", "pillow").fromarray(frame).reduce(factors), np.float32)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean difference of two pictures, 0 to 255, without what is black in both at the edges."""
    rows, columns = np.nonzero(np.maximum(one, other).max(axis=2) > BLACK)
    area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if len(rows) else 0
    changed = np.abs(one - other).mean(axis=2)
    return float(changed.sum() / max(area, LEAST_SHARE * changed.size))
