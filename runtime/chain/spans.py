"""Conversion between named groups, seconds and fine frames. Numbers only: no video, no model, no text.

The labels of training and the spans of the runtime come from the same functions. A span is half-open, [start, end),
in seconds from the first frame of the video.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Span = tuple[float, float]

TIME_TOLERANCE_S = 5e-4
"""Times that differ by less are equal: containers round frame times, often to a millisecond."""


@dataclass(frozen=True, eq=False)
class FineFrames:
    """The frames of one video's fine grid that the spatial pass uses for one span.

    Attributes:
        indices: int64 [F], indices on the grid, by which the queries of one video share frames.
        times: float64 [F], seconds, increasing.
        interval_s: seconds between two neighbours on the grid as thinned for this span.
    """

    indices: np.ndarray
    times: np.ndarray
    interval_s: float


def span_of_groups(
    groups: tuple[int, int], sample_times: np.ndarray, *, interval_s: float, duration_s: float
) -> tuple[float, float]:
    """Return the span of a named pair of groups, clipped to the video.

    It lasts from the first sample of the first group to the last sample of the second, plus one sample interval.
    `sample_times` float64 [G, P] are the times of every sample of every group.
    """
    first, last = groups
    start = min(max(float(sample_times[first, 0]), 0.0), duration_s)
    end = min(float(sample_times[last, -1]) + interval_s, duration_s)
    return start, max(start, end)


def groups_of_span(start_s: float, end_s: float, sample_times: np.ndarray) -> tuple[int, int]:
    """Return the groups (a, b) that name a true span: the inverse of `span_of_groups`, used for training labels.

    The result is the smallest range of groups that contains every sample in [start, end), or the group of the nearest
    sample if the span lies between two.
    `sample_times` float64 [G, P] are the times of every sample of every group.
    """
    inside = (sample_times >= start_s - TIME_TOLERANCE_S) & (sample_times < end_s - TIME_TOLERANCE_S)
    groups = np.flatnonzero(inside.any(axis=1))
    if groups.size:
        return int(groups[0]), int(groups[-1])
    distance = np.maximum(np.maximum(start_s - sample_times, sample_times - end_s), 0).min(axis=1)
    nearest = int(distance.argmin())
    return nearest, nearest


def fine_frames(
    span: tuple[float, float], grid: np.ndarray, *, fine_fps: float, margin_s: float, max_frames: int
) -> FineFrames:
    """Choose the frames of the fine grid that lie in the span widened by a margin on both sides.

    If they are more than `max_frames`, only every second, fourth, ... frame of the *video's* grid is used, so that two
    queries still share frames. If none is left, the result is the one nearest to the span's middle.
    `grid` float64 [K] is the fine grid of the whole video: k / fine_fps.
    """
    low, high = span[0] - margin_s - TIME_TOLERANCE_S, span[1] + margin_s - TIME_TOLERANCE_S
    inside = np.flatnonzero((grid >= low) & (grid < high))
    stride = 1
    while np.count_nonzero(inside % stride == 0) > max_frames:
        stride *= 2
    indices = inside[inside % stride == 0]
    if not indices.size:
        indices = np.abs(grid - (span[0] + span[1]) / 2).argmin(axis=0, keepdims=True)
    return FineFrames(indices=indices.astype(np.int64), times=grid[indices], interval_s=stride / fine_fps)


def refine_span(
    span: tuple[float, float], frames: FineFrames, presence: np.ndarray, *, threshold: float, duration_s: float
) -> tuple[float, float]:
    """Move each end of the span to the first and last fine frame in which the target is present.

    The last such frame still shows it, so the half-open end is one fine interval later. If the target is present in
    no frame, the span is returned unchanged.
    `presence` float [F] in 0..1 is the probability that each frame lies in the tube; the target is present from
    `threshold` on.
    """
    present = np.flatnonzero(presence >= threshold)
    if not present.size:
        return span
    start = float(frames.times[present[0]])
    end = min(float(frames.times[present[-1]]) + frames.interval_s, duration_s)
    return start, max(start, end)


def in_span(times: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Return bool [N]: which of the times [N] lie in the half-open span; if none does, the last one up to its start."""
    inside = (times >= span[0] - TIME_TOLERANCE_S) & (times < span[1] - TIME_TOLERANCE_S)
    if not inside.any():
        inside[max(int(np.searchsorted(times, span[0] + TIME_TOLERANCE_S, side="right")) - 1, 0)] = True
    return inside
