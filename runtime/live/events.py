"""From one answer after the other to events: a target appeared, moved, left. Knows nothing of models and streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.results import Grounding

KINDS = ("appeared", "moved", "left")


@dataclass(frozen=True, eq=False)
class Event:
    """Something that a standing query's target did.

    Attributes:
        kind: one of `KINDS`.
        query: as it was asked.
        time_s: when it happened, in stream time.
        box: float32 [4], left, top, right, bottom in pixels: where the target was then.
        known_s: stream time up to which the model had seen the stream when it said so.
        grounding: the answer that the event was read from, in stream time; of `left`, the last one that held the target
            if the window does not hold it any more.
    """

    kind: str
    query: str
    time_s: float
    box: np.ndarray
    known_s: float
    grounding: Grounding

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`."""
        tube, span = self.grounding.tube, self.grounding.span
        return {
            "event": self.kind,
            "query": self.query,
            "time_s": round(self.time_s, 6),
            "known_s": round(self.known_s, 6),
            "box": [round(float(side), 2) for side in self.box],
            "span": None if span is None else {"start_s": round(span[0], 6), "end_s": round(span[1], 6)},
            "scores": {name: round(float(value), 6) for name, value in self.grounding.scores.items()},
            "tube": None if tube is None else tube.to_json(),
        }


class EventTracker:
    """Follows one standing query.

    A target is present if its span reaches the end of what is known, `settle_s` allowed for. A span that ended before
    is told once, as `appeared` and `left`. `moved` is told where its box overlaps the one told last by less than
    `moved_iou`.

    Args:
        settle_s: how far a span may end before what is known and still count as reaching it, and by how much a span
            must be newer than one that was told to be another: one coarse group and one fine frame, usually.
        moved_iou: overlap below which a box has moved; 0: `moved` is never told.
    """

    def __init__(self, query: str, *, settle_s: float, moved_iou: float) -> None:
        self._query, self._settle_s, self._moved_iou = query, settle_s, moved_iou
        self._told_until = -np.inf
        self._last: Grounding | None = None
        self._box: np.ndarray | None = None

    @property
    def present(self) -> bool:
        """Whether the target was there when it was last looked for."""
        return self._last is not None

    def add(self, grounding: Grounding, known_s: float) -> list[Event]:
        """Take the next answer, in stream time, and return what is new in it."""
        events: list[Event] = []

        def tell(kind: str, time_s: float, box: np.ndarray, source: Grounding) -> None:
            events.append(Event(kind, self._query, float(time_s), box, known_s, source))

        shown = _shown(grounding)
        if shown is not None:
            start, end, first, latest = shown
            if self._last is None and end > max(start, self._told_until) + self._new_s(start):
                tell("appeared", max(start, self._told_until), first, grounding)
                self._last, self._box = grounding, first
            if self._last is not None and end > self._told_until:
                self._last, self._told_until = grounding, end
                assert self._box is not None
                if float(box_iou(self._box, latest)) < self._moved_iou:
                    tell("moved", end if end < known_s else known_s, latest, grounding)
                    self._box = latest
        if self._last is not None and self._told_until < known_s - self._settle_s:
            tell("left", self._told_until, _latest(self._last), self._last)
            self._last = self._box = None
        return events

    def _new_s(self, start: float) -> float:
        """How much must be new of a span: something of one that began behind what was told, more of one before it."""
        return 0.0 if start >= self._told_until else self._settle_s


def _shown(grounding: Grounding) -> tuple[float, float, np.ndarray, np.ndarray] | None:
    """Return the span's start and end, and the boxes there; None if the target is in no frame."""
    tube = grounding.tube
    if grounding.span is None or tube is None or not tube.visible.any():
        return None
    visible = np.flatnonzero(tube.visible)
    return (*grounding.span, tube.boxes[visible[0]], tube.boxes[visible[-1]])


def _latest(grounding: Grounding) -> np.ndarray:
    shown = _shown(grounding)
    assert shown is not None
    return shown[3]
