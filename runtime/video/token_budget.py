"""What a video may take of the language model's prompt, and the frame rate and size that follow.

The rule, for a video of any length: the rate is kept and frames are made smaller, down to `coarse_min_pixels`; only
where that does not fit is every second sample dropped, and frames then are as large as fits again. So the choice
depends on the video's length, shape and the budget alone. Knows nothing of files, of text and of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.video.sizes import frame_sizes, smallest_size, smart_size

Size = tuple[int, int]
"""(height, width) in pixels."""
LIMITS = ("max_coarse_groups", "max_visual_tokens", "max_positions", "cache_capacity")
ROWS_MARGIN = 64
"""Positions of a cache that the padding of rows may touch behind an answer (see `decode.positions_needed`)."""


@dataclass(frozen=True)
class Budget:
    """What the coarse frames of one video may take.

    Attributes:
        visual_tokens: visual tokens of all groups together; None: no bound.
        positions: rotary positions of the whole prompt; None: no bound.
        capacity: tokens of the whole prompt, where an engine's KV cache has a fixed size; None: no bound.
        text_positions: returns how many of them are not the video's visual tokens, for groups at these times [G].
    """

    visual_tokens: int | None = None
    positions: int | None = None
    capacity: int | None = None
    text_positions: Callable[[np.ndarray], int] | None = None

    def __post_init__(self) -> None:
        tokens = self.visual_tokens
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise VideoError(f"max_visual_tokens={tokens!r}: expected a whole number, 1 or more, or None for no bound")


@dataclass(frozen=True)
class CoarseChoice:
    """How a video was read for the language model.

    Attributes:
        fps: samples a second.
        size: width and height of the samples, in pixels.
        groups: groups of samples, each with a time of its own in the prompt.
        tokens: visual tokens of all groups.
        max_visual_tokens: the budget; None where there was none.
        limited_by: what made rate or size lower than the model's own: none, one or more of `LIMITS`.
    """

    fps: float
    size: tuple[int, int]
    groups: int
    tokens: int
    max_visual_tokens: int | None
    limited_by: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "fps": round(self.fps, 6),
            "size": {"width": self.size[0], "height": self.size[1]},
            "groups": self.groups,
            "tokens": self.tokens,
            "max_visual_tokens": self.max_visual_tokens,
            "limited_by": list(self.limited_by),
        }


class CoarsePlan:
    """The sizes and numbers of groups that the coarse frames of one video may have.

    Args:
        height, width: of the video as it is shown, in pixels.

    Attributes:
        sizes: all sizes that may be chosen, largest first.
        rungs: some of them, each of at most half the pixels of the one before: sizes to keep samples at while reading.
        capacity: the most groups that can fit.
        capacity_limits: which limits set the capacity.

    Raises:
        VideoError: the budget is too small for one group, or the video's shape cannot be used.
    """

    def __init__(self, height: int, width: int, spec: ModelSpec, budget: Budget) -> None:
        self._budget = budget
        self._side = spec.vision.patch_size * spec.vision.merge_size
        largest, _ = frame_sizes(height, width, spec)
        self.sizes: list[Size] = [largest]
        if budget.visual_tokens is not None or budget.positions is not None:
            self.sizes = self._smaller(height, width, spec.frames.coarse_min_pixels)
        self.rungs = [largest]
        for size in self.sizes:
            if 2 * self._tokens(size) <= self._tokens(self.rungs[-1]):
                self.rungs.append(size)
        capacities = {"max_coarse_groups": spec.frames.max_coarse_groups}
        if budget.visual_tokens is not None:
            capacities["max_visual_tokens"] = budget.visual_tokens // self._tokens(self.smallest)
            if not capacities["max_visual_tokens"]:
                raise VideoError(
                    f"max_visual_tokens={budget.visual_tokens} is too small: one group of frames of {width} × {height} "
                    f"pixels takes at least {self._tokens(self.smallest)} tokens, so give that or more"
                )
        self.capacity = min(capacities.values())
        self.capacity_limits = [name for name, groups in capacities.items() if groups == self.capacity]

    @property
    def smallest(self) -> Size:
        """The last of the sizes."""
        return self.sizes[-1]

    def rung(self, groups: int) -> int:
        """Return the index of the smallest rung that holds the size for so many groups."""
        size = self._best(max(groups, 1), None, self._budget.visual_tokens) or self.smallest
        return max((i for i, rung in enumerate(self.rungs) if rung[0] >= size[0] and rung[1] >= size[1]), default=0)

    def size_of(self, group_times: np.ndarray, *, at_most: Size | None = None) -> Size | None:
        """Return the largest size at which groups at these times [G] fit the budget, None if they do not fit."""
        size = self._best(len(group_times), self._longest_side(group_times), self._most_tokens(group_times))
        if size is not None and at_most is not None and self._tokens(size) > self._tokens(at_most):
            return at_most
        return size

    def choice(self, group_times: np.ndarray, size: Size, *, fps: float, limits: Iterable[str]) -> CoarseChoice:
        """Describe what was chosen; `limits` are those that lowered the rate."""
        groups, side, found = len(group_times), self._longest_side(group_times), set(limits)
        by_tokens = self._best(groups, None, self._budget.visual_tokens) or self.smallest
        if by_tokens != self.sizes[0]:
            found.add("max_visual_tokens")
        if side is not None and self._cells(by_tokens) > side:
            found.add("max_positions")
        if (self._best(groups, None, self._most_tokens(group_times)) or self.smallest) != by_tokens:
            found.add("cache_capacity")
        return CoarseChoice(
            fps=fps,
            size=(size[1], size[0]),
            groups=groups,
            tokens=groups * self._tokens(size),
            max_visual_tokens=self._budget.visual_tokens,
            limited_by=tuple(name for name in LIMITS if name in found),
        )

    def _smaller(self, height: int, width: int, min_pixels: int) -> list[Size]:
        """Return all sizes from the largest down to the smallest that still has `min_pixels`."""
        largest, cell = self.sizes[0], self._side**2
        smallest = smallest_size(height, width, factor=self._side, min_pixels=min_pixels)
        if self._tokens(smallest) >= self._tokens(largest):
            return [largest]
        found = {
            smart_size(height, width, factor=self._side, min_pixels=1, max_pixels=tokens * cell)
            for tokens in range(1, self._tokens(largest))
        }
        between = [
            size
            for size in found
            if self._tokens(smallest) < self._tokens(size) < self._tokens(largest)
            and size[0] <= largest[0]
            and size[1] <= largest[1]
        ]
        return [largest, *sorted(between, key=self._tokens, reverse=True), smallest]

    def _best(self, groups: int, side: int | None, tokens: int | None) -> Size | None:
        for size in self.sizes:
            if (tokens is None or groups * self._tokens(size) <= tokens) and (
                side is None or self._cells(size) <= side
            ):
                return size
        return None

    def _most_tokens(self, group_times: np.ndarray) -> int | None:
        """Return how many visual tokens all groups may have together."""
        budget = self._budget
        if budget.capacity is None:
            return budget.visual_tokens
        text = budget.text_positions(group_times) if budget.text_positions else 0
        room = budget.capacity - text - ROWS_MARGIN
        return room if budget.visual_tokens is None else min(room, budget.visual_tokens)

    def _longest_side(self, group_times: np.ndarray) -> int | None:
        """Return how many visual tokens a group may have along its longer side, which is what positions count."""
        if self._budget.positions is None:
            return None
        text = self._budget.text_positions
        return (self._budget.positions - (text(group_times) if text else 0)) // len(group_times)

    def _cells(self, size: Size) -> int:
        return max(size) // self._side

    def _tokens(self, size: Size) -> int:
        return (size[0] // self._side) * (size[1] // self._side)
