"""The frame of a stream that is shown until the next one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.live.plan import LivePlan
from bridge_stg.runtime.video.frame import resize

TOLERANCE_S = 1e-6  # how much later than its grid point a sample may start; the same as in `FrameStream`


class Shown:
    """The current frame, shown until the next one; converted and resized once per size, and only if it is sampled.

    With `any_size` the frame may have another size than the first one: it is resized too, as when a file is read whole.
    """

    def __init__(
        self, time_s: float, frame: Callable[[], np.ndarray], plan: LivePlan, *, any_size: bool = False
    ) -> None:
        self.time_s, self._frame, self._plan, self._any_size = time_s, frame, plan, any_size
        self._rgb: np.ndarray | None = None
        self._sizes: dict[tuple[int, int], np.ndarray] = {}

    @property
    def fine(self) -> np.ndarray:
        """The frame in the size of the fine frames, uint8 [h, w, 3]."""
        return self.at(self._plan.fine_size)

    def keep(self) -> None:
        """Convert the frame now, since it may be sampled when its source no longer has it."""
        self.at(self._plan.coarse_size)
        self.at(self._plan.fine_size)
        self._rgb = None

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """Return the frame, uint8 [*size, 3], where size is (height, width)."""
        if size not in self._sizes:
            if self._rgb is None:
                self._rgb = self._frame()
                height, width = self._rgb.shape[:2]
                if not self._any_size and (width, height) != (self._plan.width, self._plan.height):
                    sizes = f"from {self._plan.width} × {self._plan.height} to {width} × {height} pixels"
                    raise VideoError("video.size_changed", f"the stream's frames changed {sizes}; start a new watch")
            self._sizes[size] = resize(self._rgb, size)
        return self._sizes[size]
