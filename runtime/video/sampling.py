"""What is kept of a video while it is read once: samples on an even grid, in bounded memory.

Knows nothing of files and streams: whoever reads one fills a sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from bridge_stg.runtime.video.sizes import resize
from bridge_stg.runtime.video.token_budget import CoarsePlan

T = TypeVar("T")


class GridSampler(Generic[T]):
    """What a video shows at the times k / rate, in bounded memory and without knowing the video's length beforehand.

    Beyond `capacity` items every second one is dropped and the grid's stride doubles, so that what is left is even.
    """

    def __init__(self, rate: float, *, capacity: int, stride: int = 1) -> None:
        self.rate = rate
        self.capacity = capacity
        self.stride = stride
        self.items: list[T] = []

    @property
    def interval_s(self) -> float:
        """Seconds between two items."""
        return self.stride / self.rate

    @property
    def times(self) -> np.ndarray:
        """The place of every item on the grid, float64 [N], in seconds."""
        return np.arange(len(self.items)) * self.stride / self.rate

    def fill(self, until: float, make: Callable[[], T]) -> None:
        """Put one item on every free place before `until` seconds; `make` is called at most once."""
        made: list[T] = []
        while len(self.items) * self.stride / self.rate < until:
            made = made or [make()]
            self.items.append(made[0])
            if len(self.items) > self.capacity:
                self.thin()

    def thin(self) -> None:
        """Drop every second item."""
        self.items = self.items[::2]
        self.stride *= 2


class CoarseSampler(GridSampler[np.ndarray]):
    """The coarse samples, kept at a size that shrinks while the video turns out to be long.

    A sample is kept somewhat larger than the budget would let it be if the video ended now; see `CoarsePlan.rung`.

    Args:
        plan: which sizes there are, and how many groups.
        rate: samples a second at stride 1.
        group: samples a group.
        stride: the first stride.
        length_s: the video's expected length; None where it is not known. A wrong one costs sharpness or time only.
    """

    def __init__(
        self, plan: CoarsePlan, rate: float, *, group: int, stride: int = 1, length_s: float | None = None
    ) -> None:
        super().__init__(rate, capacity=plan.capacity * group, stride=stride)
        self._plan, self._group, self._first_stride = plan, group, stride
        expected = -(-(length_s or 0) * rate // stride)
        while expected > self.capacity:
            expected = -(-expected // 2)
        self._rung = self._rung_of(int(expected))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the samples, in pixels."""
        return self._plan.rungs[self._rung]

    @property
    def thinned(self) -> bool:
        """Whether samples were dropped."""
        return self.stride > self._first_stride

    @property
    def undersized(self) -> bool:
        """Whether the samples are smaller than they had to be, since the expected length was wrong."""
        return self._rung > self._rung_of(len(self.items))

    def fill(self, until: float, make: Callable[[], np.ndarray]) -> None:
        """Put one picture, made at `size`, on every free place before `until` seconds."""
        super().fill(until, make)
        rung = self._rung_of(len(self.items))
        if rung > self._rung:
            self._rung = rung
            self.items = resize_all(self.items, self.size)

    def _rung_of(self, samples: int) -> int:
        # When samples are dropped, half of the groups are left, and these may be larger again.
        return self._plan.rung(min(-(-samples // self._group), (self._plan.capacity + 1) // 2))


def resize_all(pictures: Sequence[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    """Return all pictures at (height, width) `size`; one that occurs several times is resized and kept once."""
    made: dict[int, np.ndarray] = {}
    for picture in pictures:
        if id(picture) not in made:
            made[id(picture)] = picture if picture.shape[:2] == size else resize(picture, size)
    return [made[id(picture)] for picture in pictures]
