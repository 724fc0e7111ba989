"""Derive events from consecutive answers: a target appeared, moved, left. Knows nothing of models and streams."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.results import Grounding, span_json

KINDS = ("appeared", "moved", "left")


@dataclass(frozen=True, eq=False)
class Event:
    """A change of a standing query's target.

    Attributes:
        kind: one of `KINDS`.
        query: the standing query.
        time_s: stream time of the event, in seconds.
        box: float32 [4], the target's left, top, right, bottom at that time, in pixels.
        known_s: stream time up to which the model had seen the stream when it detected the event.
        grounding: the answer that shows the event, in stream time; for `left`, the last answer with the target.
        wall_time: when the frame of the event arrived, to the accuracy of the source's clock; of a file that is read as
            fast as possible, when the newest frame of the round was read. None outside a watch.
    """

    kind: str
    query: str
    time_s: float
    box: np.ndarray
    known_s: float
    grounding: Grounding
    wall_time: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`."""
        tube = self.grounding.tube
        return {
            "event": self.kind,
            "query": self.query,
            "wall_time": wall_json(self.wall_time),
            "time_s": round(self.time_s, 6),
            "known_s": round(self.known_s, 6),
            "box": [round(float(side), 2) for side in self.box],
            "span": span_json(self.grounding.span),
            "scores": {name: round(float(value), 6) for name, value in self.grounding.scores.items()},
            "tube": None if tube is None else tube.to_json(),
        }


def wall_json(time: datetime | None) -> str | None:
    """Return a wall-clock time as ISO 8601 in milliseconds, with its offset from UTC."""
    return None if time is None else time.isoformat(timespec="milliseconds")


class EventTracker:
    """Detects the events of one standing query.

    A target is present if its span ends less than `settle_s` before the known end of the stream. An earlier span gives
    `appeared` and `left` once; a span that extends past the reported end by more than `settle_s` is another visit.
    `moved` means that the box overlaps the last reported one by less than `moved_iou` (0: never).
    """

    def __init__(self, query: str, *, settle_s: float, moved_iou: float) -> None:
        self._query, self._settle_s, self._moved_iou = query, settle_s, moved_iou
        self._reported_until = -np.inf
        self._present: Grounding | None = None
        self._box = self._latest_box = np.zeros(4, np.float32)

    def add(self, grounding: Grounding, known_s: float) -> list[Event]:
        """Add the next answer, in stream time, and return the new events."""
        events: list[Event] = []

        def report(kind: str, time_s: float, box: np.ndarray, source: Grounding) -> None:
            events.append(Event(kind, self._query, float(time_s), box, known_s, source))

        tube = grounding.tube
        if grounding.span is not None and tube is not None and tube.visible.any():
            (start, end), boxes = grounding.span, tube.boxes[tube.visible]
            newest = max(start, self._reported_until)
            margin_s = 0.0 if start >= self._reported_until else self._settle_s
            if self._present is None and end > newest + margin_s:
                report("appeared", newest, boxes[0], grounding)
                self._present, self._box = grounding, boxes[0]
            if self._present is not None and end > self._reported_until:
                self._present, self._reported_until, self._latest_box = grounding, end, boxes[-1]
                if float(box_iou(self._box, boxes[-1])) < self._moved_iou:
                    report("moved", min(end, known_s), boxes[-1], grounding)
                    self._box = boxes[-1]
        if self._present is not None and self._reported_until < known_s - self._settle_s:
            report("left", self._reported_until, self._latest_box, self._present)
            self._present = None
        return events
