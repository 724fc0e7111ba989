"""Rates and sizes at which the frames of a live stream are sampled, and the length of its window.

They are chosen once, from the first frame, so that a window that fills up is never encoded again in smaller frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import Tokenizer, video_budget
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.parse import is_number
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import Budget, CoarseChoice, CoarsePlan, Size

PlanOf = Callable[[int, int], "LivePlan"]  # returns the plan for frames of (height, width) pixels


@dataclass(frozen=True, eq=False)
class LivePlan:
    """How the frames of one stream are sampled. Sizes are in pixels, rates in frames per second."""

    width: int
    height: int
    coarse_fps: float  # every `stride`-th point of a grid with this rate is sampled for the language model
    stride: int
    group: int  # samples per group
    groups: int  # most groups in a window
    fine_fps: float
    coarse_size: Size
    fine_size: Size
    _sizes: CoarsePlan

    @property
    def interval_s(self) -> float:
        """Seconds between two coarse samples."""
        return self.stride / self.coarse_fps

    @property
    def group_s(self) -> float:
        """Seconds of a group."""
        return self.group * self.interval_s

    def times(self, places: np.ndarray) -> np.ndarray:
        """Return the times of indices on the coarse grid, in seconds; the same values as for a video."""
        return places * self.stride / self.coarse_fps

    def choice(self, group_times: np.ndarray) -> CoarseChoice:
        """Describe the sampling of a window of groups at these times [G]."""
        return self._sizes.choice(group_times, self.coarse_size, fps=1 / self.interval_s, limits=())


def longest_window_s(spec: ModelSpec) -> float:
    """Return the seconds of a video that the model reads at its own coarse rate."""
    return spec.frames.max_coarse_groups * spec.vision.temporal_patch_size / spec.frames.coarse_fps


def window_groups(spec: ModelSpec, window_s: float) -> int:
    """Return the groups of coarse frames in a window of seconds. Raises VideoError if the model cannot read as many."""
    group_s = spec.vision.temporal_patch_size / spec.frames.coarse_fps
    groups = round(window_s / group_s) if is_number(window_s) else 0
    if not 2 <= groups <= spec.frames.max_coarse_groups:
        message = f"window_s={window_s!r}: this model reads {2 * group_s:g} to {longest_window_s(spec):g} s at once"
        raise VideoError("options.out_of_range", message)
    return groups


def plan_stream(
    height: int, width: int, spec: ModelSpec, tokenizer: Tokenizer, *, groups: int, budget: Budget | None = None
) -> LivePlan:
    """Choose rates and sizes so that a full window of groups fits the model's prompt, with room for a query.

    `budget` is that of the window's frames; None: the model's own.

    Raises VideoError if the window does not fit even with the smallest frames, or the frames' shape is unsupported.
    """
    stride, group = 1, spec.vision.temporal_patch_size
    while True:
        times = (np.arange(groups * group) * stride / spec.frames.coarse_fps).reshape(groups, group).mean(axis=1)
        if len({f"{time:.{spec.prompt.time_decimals}f}" for time in times}) == groups:
            break
        stride *= 2
    sizes = CoarsePlan(height, width, spec, budget or video_budget(tokenizer, spec, None))
    size = sizes.size_of(times)
    if size is None:
        text = f"{groups} groups of {width} × {height} pixels do not fit in {spec.language.max_positions} positions"
        raise VideoError("live.window_too_large", f"{text} of the prompt; give a shorter window")
    frames, fine_size = spec.frames, frame_sizes(height, width, spec)[1]
    return LivePlan(
        width, height, frames.coarse_fps, stride, group, groups, frames.fine_fps, size, fine_size, _sizes=sizes
    )
