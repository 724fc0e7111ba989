"""The sampling of a live stream: at which rates and sizes its frames are taken, and how many a window holds.

It is chosen once, from the first frame: a window that fills up must not have to be encoded again in smaller frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import Tokenizer, video_budget
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import Budget, CoarseChoice, CoarsePlan, Size

PlanOf = Callable[[int, int], "LivePlan"]
"""Returns the plan for frames of (height, width) pixels."""


@dataclass(frozen=True, eq=False)
class LivePlan:
    """How the frames of one stream are sampled.

    Attributes:
        width, height: of the stream's frames, in pixels.
        coarse_fps, stride: every `stride`-th place of this rate is sampled for the language model.
        group: samples of a group.
        groups: most groups that a window holds.
        fine_fps: rate of the fine grid.
        coarse_size, fine_size: (height, width) of the samples, in pixels.
    """

    width: int
    height: int
    coarse_fps: float
    stride: int
    group: int
    groups: int
    fine_fps: float
    coarse_size: Size
    fine_size: Size
    _sizes: CoarsePlan

    @property
    def interval_s(self) -> float:
        """Seconds between two coarse samples."""
        return self.stride / self.coarse_fps

    def times(self, places: np.ndarray) -> np.ndarray:
        """Return the seconds of places on the coarse grid, as a video's sampler has them."""
        return places * self.stride / self.coarse_fps

    def choice(self, group_times: np.ndarray) -> CoarseChoice:
        """Describe a window of groups at these times [G]."""
        return self._sizes.choice(group_times, self.coarse_size, fps=1 / self.interval_s, limits=())


def check_window(window: int, spec: ModelSpec) -> int:
    """Return how many groups a window of so many coarse frames holds.

    Raises:
        VideoError: it is no whole number, or the model cannot read so few or so many.
    """
    group = spec.vision.temporal_patch_size
    least, most = 2 * group, spec.frames.max_coarse_groups * group
    if isinstance(window, bool) or not isinstance(window, int) or not least <= window <= most:
        raise VideoError(
            f"window={window!r}: expected a whole number of coarse frames, {least} to {most} of this model"
        )
    return window // group


def plan_stream(height: int, width: int, spec: ModelSpec, tokenizer: Tokenizer, *, window: int) -> LivePlan:
    """Choose rates and sizes so that a full window fits the model's prompt, with a query behind it.

    Args:
        window: most coarse frames of a window.

    Raises:
        VideoError: it does not fit even in the smallest frames, or the frames' shape cannot be used.
    """
    groups, group = check_window(window, spec), spec.vision.temporal_patch_size
    stride = 1
    while True:
        times = (np.arange(groups * group) * stride / spec.frames.coarse_fps).reshape(groups, group).mean(axis=1)
        if len({f"{time:.{spec.prompt.time_decimals}f}" for time in times}) == groups:
            break
        stride *= 2
    budget: Budget = video_budget(tokenizer, spec, None)
    sizes = CoarsePlan(height, width, spec, budget)
    size = sizes.size_of(times)
    if size is None:
        raise VideoError(
            f"window={window}: {groups} groups of the smallest frames of {width} × {height} pixels do not fit the "
            f"model's {spec.language.max_positions} positions; give a smaller window"
        )
    return LivePlan(
        width=width,
        height=height,
        coarse_fps=spec.frames.coarse_fps,
        stride=stride,
        group=group,
        groups=groups,
        fine_fps=spec.frames.fine_fps,
        coarse_size=size,
        fine_size=frame_sizes(height, width, spec)[1],
        _sizes=sizes,
    )
