"""A video's share of the language model's prompt, and the frame rate and size that follow from it.

The rule for a video of any length: keep the rate and make frames smaller, down to `coarse_min_pixels`; if that does not
fit, drop every second sample and make frames as large as fits again. So the choice depends only on the video's length
and shape, and on the budget. Knows nothing of files, text and graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.parse import is_count
from bridge_stg.runtime.video.sizes import frame_sizes, smallest_size, smart_size

Size = tuple[int, int]  # (height, width) in pixels
LIMITS = ("max_coarse_groups", "max_visual_tokens", "max_positions", "cache_capacity")
ROWS_MARGIN = 64  # positions of a cache after an answer that padded rows may write to (see `decode.positions_needed`)


@dataclass(frozen=True)
class Budget:
    """Limits for the coarse frames of one video; None: no limit."""

    visual_tokens: int | None = None  # of all groups together
    positions: int | None = None  # rotary positions of the whole prompt
    capacity: int | None = None  # tokens of the whole prompt, if an engine's KV cache has a fixed size
    text_positions: Callable[[np.ndarray], int] = lambda group_times: 0  # those of the text, for groups at times [G]

    def __post_init__(self) -> None:
        tokens = self.visual_tokens
        if tokens is not None and not is_count(tokens):
            raise VideoError("video.bad_option", f"max_visual_tokens={tokens!r}: expected 1 or more, or None")


@dataclass(frozen=True)
class CoarseChoice:
    """How a video was sampled for the language model."""

    fps: float  # samples per second
    size: tuple[int, int]  # width and height of the samples, in pixels
    groups: int  # groups of samples, each with its own time in the prompt
    tokens: int  # visual tokens of all groups
    max_visual_tokens: int | None  # the budget; None: no limit
    limited_by: tuple[str, ...] = ()  # the limits that reduced the model's own rate or size, from `LIMITS`

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> CoarseChoice:
        """Return what `dataclasses.asdict` gave, after lists took the place of tuples."""
        return cls(**{**values, "size": tuple(values["size"]), "limited_by": tuple(values["limited_by"])})

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        size = {"width": self.size[0], "height": self.size[1]}
        return {**asdict(self), "fps": round(self.fps, 6), "size": size, "limited_by": list(self.limited_by)}


class CoarsePlan:
    """The possible sizes and numbers of groups of the coarse frames of one video of height × width pixels.

    `sizes` are all possible sizes, largest first; `rungs` are some of them, each with at most half the pixels of the
    one before, at which samples are kept while the video is read. At most `capacity` groups can fit, because of
    `capacity_limits`. Raises VideoError if not even one group fits, or the video's shape is unsupported.
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
                text = f"a group of {width} × {height} pixels takes {self._tokens(self.smallest)} tokens or more"
                raise VideoError("video.budget_too_small", f"max_visual_tokens={budget.visual_tokens}: {text}")
        self.capacity = min(capacities.values())
        self.capacity_limits = [name for name, groups in capacities.items() if groups == self.capacity]

    @property
    def smallest(self) -> Size:
        """The last of the sizes."""
        return self.sizes[-1]

    def rung(self, groups: int) -> int:
        """Return the index of the smallest rung that is not below the size for this number of groups."""
        size = self._best(max(groups, 1), None, self._budget.visual_tokens) or self.smallest
        return max((i for i, rung in enumerate(self.rungs) if rung[0] >= size[0] and rung[1] >= size[1]), default=0)

    def size_of(self, group_times: np.ndarray, *, at_most: Size | None = None) -> Size | None:
        """Return the largest size at which groups at these times [G] fit the budget; None if they do not fit."""
        size = self._best(len(group_times), self._longest_side(group_times), self._most_tokens(group_times))
        if size is not None and at_most is not None and self._tokens(size) > self._tokens(at_most):
            return at_most
        return size

    def choice(self, group_times: np.ndarray, size: Size, *, fps: float, limits: Iterable[str]) -> CoarseChoice:
        """Describe the chosen rate and size; `limits` are the limits that lowered the rate."""
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
        """Return all sizes from the largest down to the smallest with at least `min_pixels`."""
        largest, side = self.sizes[0], self._side
        smallest = smallest_size(height, width, factor=side, min_pixels=min_pixels)
        least, most = self._tokens(smallest), self._tokens(largest)
        if least >= most:
            return [largest]
        pixels = (tokens * side**2 for tokens in range(1, most))
        found = {smart_size(height, width, factor=side, min_pixels=1, max_pixels=count) for count in pixels}
        narrower = (size for size in found if size[0] <= largest[0] and size[1] <= largest[1])
        between = (size for size in narrower if least < self._tokens(size) < most)
        return [largest, *sorted(between, key=self._tokens, reverse=True), smallest]

    def _best(self, groups: int, side: int | None, tokens: int | None) -> Size | None:
        most_cells, most_tokens = math.inf if side is None else side, math.inf if tokens is None else tokens
        fits = (s for s in self.sizes if groups * self._tokens(s) <= most_tokens and self._cells(s) <= most_cells)
        return next(fits, None)

    def _most_tokens(self, group_times: np.ndarray) -> int | None:
        """Return the most visual tokens for all groups together."""
        budget = self._budget
        if budget.capacity is None:
            return budget.visual_tokens
        room = budget.capacity - budget.text_positions(group_times) - ROWS_MARGIN
        return room if budget.visual_tokens is None else min(room, budget.visual_tokens)

    def _longest_side(self, group_times: np.ndarray) -> int | None:
        """Return the most visual tokens along a group's longer side, which determines its positions."""
        if self._budget.positions is None:
            return None
        return (self._budget.positions - self._budget.text_positions(group_times)) // len(group_times)

    def _cells(self, size: Size) -> int:
        return max(size) // self._side

    def _tokens(self, size: Size) -> int:
        return (size[0] // self._side) * (size[1] // self._side)
