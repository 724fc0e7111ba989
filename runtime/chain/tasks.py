"""The tasks of the chain: which answers are allowed, and whether boxes are computed.

A task determines the query's prompt, the grammar of its answer and the spatial pass. Knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.errors import QueryError

TASKS = ("tube", "span", "image", "track")
TRACKED = "the object"
"""The query of a track without one."""


@dataclass(frozen=True)
class Task:
    """One of `TASKS`.

    Attributes:
        name: `tube` (when and where), `span` (only when), `image` (where, in an image) or `track` (from a first box).
        allow_none: whether the answer may be that the target is absent.
        first_box: box to track: left, top, right, bottom in pixels; None for the other tasks.
    """

    name: str = "tube"
    allow_none: bool = True
    first_box: tuple[float, float, float, float] | None = None

    @property
    def grammar_key(self) -> tuple[bool, int | None]:
        """`allow_none` and `first_start` of the answer's grammar: a track begins with the video."""
        return self.allow_none, 0 if self.name == "track" else None

    def relative_box(self, size: tuple[int, int]) -> tuple[float, ...] | None:
        """Return the first box in 0..1 of a frame of `size` (width, height) in pixels; QueryError if it is outside."""
        if self.first_box is None:
            return None
        width, height = size
        left, top, right, bottom = self.first_box
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            message = f"the first box {_text(self.first_box)} lies outside the frames of {width} × {height} pixels"
            raise QueryError("query.bad_box", message)
        return left / width, top / height, right / width, bottom / height


def track_from(first_box: Sequence[float] | np.ndarray) -> Task:
    """Return the task that tracks the target in a box: left, top, right, bottom in pixels of the first frame.

    Raises QueryError if these are not four finite numbers, or the box has no area.
    """
    try:
        box = np.asarray(first_box, np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        box = np.zeros(0)
    if len(box) != 4 or not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
        found = _text(box) if len(box) else repr(first_box)
        message = f"the first box is {found}; expected left, top, right, bottom with left < right and top < bottom"
        raise QueryError("query.bad_box", message)
    left, top, right, bottom = map(float, box)
    return Task("track", allow_none=False, first_box=(left, top, right, bottom))


def _text(box: Sequence[float] | np.ndarray) -> str:
    return "[" + ", ".join(f"{side:g}" for side in box) + "]"
