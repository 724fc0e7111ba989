"""Collect samples of a video on an even grid while it is read once, in bounded memory.

Knows nothing of files and streams, which fill a sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from bridge_stg.runtime.video.frame import resize
from bridge_stg.runtime.video.token_budget import CoarsePlan

T = TypeVar("T")


def grid_places(until: float, rate: float, stride: int = 1) -> int:
    """Return how many of the times k * stride / rate are before `until` seconds, without a maximum."""
    count = max(int(until * rate / stride) - 1, 0)
    while count * stride / rate < until:
        count += 1
    return count


class GridSampler(Generic[T]):
    """The samples of a video at the times k / rate, in bounded memory and without knowing its length in advance.

    Beyond `capacity` items, every second one is dropped and the grid's stride doubles, so the rest is evenly spaced.
    """

    def __init__(self, rate: float, *, capacity: int, stride: int = 1) -> None:
        self.rate, self.capacity, self.stride = rate, capacity, stride
        self.items: list[T] = []

    @property
    def interval_s(self) -> float:
        """Seconds between two items."""
        return self.stride / self.rate

    @property
    def times(self) -> np.ndarray:
        """The time of every item's grid point in seconds, float64 [N]."""
        return np.arange(len(self.items)) * float(self.stride) / self.rate

    def fill(self, until: float, make: Callable[[], T]) -> None:
        """Fill every free grid point before `until` seconds with one item; `make` is called at most once."""
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
    """The coarse samples, whose size shrinks while the video gets longer.

    Samples are kept somewhat larger than the budget would allow if the video ended now; see `CoarsePlan.rung`. A wrong
    expected length `length_s` (None: not known) costs only sharpness or time.
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
        """Whether the samples are smaller than necessary because the expected length was wrong."""
        return self._rung > self._rung_of(len(self.items))

    def fill(self, until: float, make: Callable[[], np.ndarray]) -> None:
        """Fill every free grid point before `until` seconds with one frame, made at `size`."""
        super().fill(until, make)
        rung = self._rung_of(len(self.items))
        if rung > self._rung:
            self._rung = rung
            self.items = resize_all(self.items, self.size)

    def resume(self, items: list[np.ndarray], stride: int) -> None:
        """Continue with the samples and the stride of another sampler of the same plan."""
        self.items, self.stride = items, stride
        self._rung = self._plan.rungs.index(items[0].shape[:2])

    def _rung_of(self, samples: int) -> int:
        # When samples are dropped, half of the groups are left, and these may be larger again.
        return self._plan.rung(min(-(-samples // self._group), (self._plan.capacity + 1) // 2))


def resize_all(frames: Sequence[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    """Return all frames at (height, width) `size`; a frame that occurs several times is resized and kept once."""
    unique = {id(frame): frame for frame in frames}
    made = {key: frame if frame.shape[:2] == size else resize(frame, size) for key, frame in unique.items()}
    return [made[id(frame)] for frame in frames]
