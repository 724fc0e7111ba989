"""What a query's truth says about a clip's frames: span, boxes, and where they are known.

The rules of spans are the runtime's own. Must not know files and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bridge_stg.evaluation.samples import Truth
from bridge_stg.runtime.chain.spans import TIME_TOLERANCE_S

NEAR_AN_END = 5  # number of consecutive fine frames around an end of a span; the others are around it or anywhere
AROUND_S = 1.0  # most of the other frames are at most this many seconds outside of the span


@dataclass(frozen=True, eq=False)
class Label:
    """The truth of one query whose target is present.

    Attributes:
        span: start and end in seconds from the first frame of the clip, half-open.
        times: float64 [N], seconds from the first frame, increasing; empty if the boxes are unknown.
        boxes: float64 [N, 4], left, top, right, bottom in 0..1 of the frame.
        known: bool [N], whether the target and its box are known at a time.
    """

    span: tuple[float, float]
    times: np.ndarray
    boxes: np.ndarray
    known: np.ndarray

    def positive(self, times: np.ndarray) -> np.ndarray:
        """Return bool [F]: whether the target is present at times [F]."""
        start, end = self.span
        return np.asarray((times >= start - TIME_TOLERANCE_S) & (times < end - TIME_TOLERANCE_S))

    def boxes_at(self, times: np.ndarray) -> np.ndarray:
        """Return boxes [F, 4] at times [F], as `boxes`, interpolated between `times`; beyond them, the nearest."""
        return np.stack([np.interp(times, self.times, self.boxes[:, i]) for i in range(4)], -1)

    def counted(self, times: np.ndarray) -> np.ndarray:
        """Return bool [F]: at which of times [F] presence, and the box where it is positive, are known."""
        positive = self.positive(times)
        if not len(self.times):
            return ~positive
        after = np.searchsorted(self.times, times).clip(1, max(len(self.times) - 1, 1))
        before = after - 1
        after = after.clip(max=len(self.times) - 1)
        nearest = np.where(times - self.times[before] <= self.times[after] - times, before, after)
        boxes = self.boxes_at(times)
        return np.asarray(self.known[nearest] & (~positive | (boxes[:, 2:] > boxes[:, :2]).all(1)))

    def shifted(self, seconds: float) -> Label:
        """Return the label of a clip that starts this much later; the target must be present after that."""
        start, end = self.span
        moved = replace(self, span=(max(0.0, start - seconds), end - seconds), times=self.times - seconds)
        if not len(self.times) or moved.times[0] >= 0:
            return moved
        first, later = np.zeros(1), moved.times > 0
        known = moved.known[[max(int(np.searchsorted(moved.times, 0, side="right")) - 1, 0)]]
        return replace(
            moved,
            times=np.concatenate([first, moved.times[later]]),
            boxes=np.concatenate([moved.boxes_at(first), moved.boxes[later]]),
            known=np.concatenate([known, moved.known[later]]),
        )


def label_of(truth: Truth, task: str, size: tuple[int, int]) -> Label | None:
    """Return the label of a truth; None if the target is absent.

    `size` is the medium's width and height in pixels, which the boxes refer to unless the truth has a size. The first
    frame of a track is known, although it is not scored. A track without a span ends after its last box.
    """
    if not truth.present:
        return None
    inside = truth.inside
    times = truth.times[inside]
    boxes = (truth.boxes[inside] / np.tile(np.asarray(truth.size or size, np.float64), 2)).clip(0, 1)
    known = truth.counted[inside].copy()
    if task == "track" and len(known):
        known[0] = True
    if task == "image":
        span = (0.0, 1.0)
    elif truth.span is not None:
        span = truth.span
    else:
        step = float(np.median(np.diff(truth.times))) if len(truth.times) > 1 else 1.0
        span = (0.0, float(times[-1]) + step)
    return Label(span, times, boxes, known)


def choose_fine_times(
    rng: np.random.Generator, grid: np.ndarray, spans: Sequence[tuple[float, float]], *, rate: float, count: int
) -> np.ndarray:
    """Return sorted times [count] of the fine grid: some around one end of one span, the others around it or anywhere.

    Without spans, all times are random. A grid of at most `count` times is returned completely.
    """
    if len(grid) <= count:
        return grid
    last = len(grid) - 1
    start, end = spans[int(rng.integers(len(spans)))] if spans else (0.0, grid[-1])
    run = min(NEAR_AN_END, count)
    first = round((start if rng.random() < 0.5 else min(end, grid[-1])) * rate) - int(rng.integers(1, run + 1))
    first = int(np.clip(first, 0, last - run + 1))
    chosen = set(range(first, first + run))
    low, high = max(0, round((start - AROUND_S) * rate)), min(last, round(min(end + AROUND_S, grid[-1]) * rate))
    while len(chosen) < count:
        inside = rng.random() < 0.8 and low < high
        chosen.add(int(rng.integers(low, high + 1)) if inside else int(rng.integers(0, last + 1)))
    return grid[sorted(chosen)]
