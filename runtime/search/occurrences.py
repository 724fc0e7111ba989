"""The occurrences of a query in a long video: merge those of overlapping windows, and rank them.

Knows nothing of models and files. All times are seconds from the first frame of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from typing import Any, TypeVar

import numpy as np

from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.results import Boxes, FrameBoxes, Grounding
from bridge_stg.runtime.chain.spans import TIME_TOLERANCE_S, Span

AnyBoxes = TypeVar("AnyBoxes", bound=Boxes)

SAME_IOU = 0.25
"""Least mean overlap, at common times, of the boxes of two windows that show one target."""


def score_of(grounding: Grounding) -> float:
    """Return the score of an occurrence, (1 − absent) · answer · presence; without boxes, presence counts as 1.

    `absent`, `answer` and `presence` are those of `Grounding.scores`. Not found: 0.
    """
    if not grounding.found:
        return 0.0
    presence = 1.0 if grounding.tube is None else float(grounding.scores["presence"])
    return (1 - float(grounding.scores.get("absent", 0.0))) * float(grounding.scores["answer"]) * presence


@dataclass(frozen=True)
class SearchedWindows:
    """The windows of a search.

    Attributes:
        count: how many there were.
        length_s: seconds of a window.
        overlap_s: seconds that a window has in common with the next one.
        absent: windows without the query's target.
        shots: how many shots the video has; each window is within one. Without `cuts`, 1.
    """

    count: int
    length_s: float
    overlap_s: float
    absent: int
    shots: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`."""
        return {
            "count": self.count,
            "length_s": round(self.length_s, 6),
            "overlap_s": round(self.overlap_s, 6),
            "absent": self.absent,
            "shots": self.shots,
        }


@dataclass(frozen=True, eq=False)
class SearchResult:
    """All occurrences of one query in a video.

    Attributes:
        best: the best occurrence; if there is none, a grounding that is not found, from the window in which `absent`
            was least probable.
        occurrences: the occurrences, best first by `score_of`. Each is a `Grounding` whose times count from the first
            frame of the video, except those in the text `answer`, which count from its window.
        windows: the windows.
    """

    best: Grounding
    occurrences: tuple[Grounding, ...]
    windows: SearchedWindows

    @property
    def query(self) -> str:
        """The query."""
        return self.best.query

    @property
    def found(self) -> bool:
        """Whether the target is in the video."""
        return self.best.found

    @property
    def drawn(self) -> Grounding:
        """The best occurrence with the boxes of all; at a common time, those of the better one."""
        boxes = [one.boxes for one in self.occurrences if one.boxes is not None]
        if len(boxes) < 2:
            return self.best
        fields = {
            field.name: np.concatenate([getattr(one, field.name) for one in boxes]) for field in fields_of(boxes[0])
        }
        _, places = np.unique(fields["times"], return_index=True)  # the first of equal times
        return replace(self.best, boxes=FrameBoxes(**{name: values[places] for name, values in fields.items()}))

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `Grounding.to_json` for the best occurrence, and `score`, `occurrences` and `windows`.

        An occurrence has the fields `score`, `span`, `named_span`, `answer`, `scores`, `tube` and `boxes`.
        """
        fields = ("span", "named_span", "answer", "scores", "tube", "boxes")
        rows = [(score_of(occurrence), occurrence.to_json()) for occurrence in self.occurrences]
        return {
            **self.best.to_json(),
            "score": round(score_of(self.best), 6),
            "occurrences": [
                {"score": round(score, 6), **{name: row[name] for name in fields}} for score, row in rows
            ],
            "windows": self.windows.to_json(),
        }  # fmt: skip


class Occurrences:
    """The occurrences of one query so far; each is within one shot. Windows are added in order of time."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s  # most seconds between two parts of one occurrence
        self._earlier: list[Grounding] = []  # those of earlier shots
        self._found: list[Grounding] = []  # those of this shot
        self._nowhere: Grounding | None = None  # of the answers that are not found, the one with the least `absent`
        self._windows = self._absent = self._shots = 0
        self._shot_s = -1.0

    def add(self, groundings: Sequence[Grounding], frame_times: np.ndarray, shot_s: float) -> None:
        """Add the answers of one window of the shot that starts at `shot_s`; it has frames at `frame_times` [N]."""
        self._windows += 1
        if shot_s > self._shot_s:
            self._earlier, self._found = self._earlier + self._found, []
            self._shot_s, self._shots = shot_s, self._shots + 1
        found = [grounding for grounding in groundings if is_seen(grounding)]
        self._absent += not found
        for grounding in groundings:
            if is_seen(grounding):
                self._merge(grounding, frame_times)
            elif self._nowhere is None or grounding.scores["absent"] < self._nowhere.scores["absent"]:
                self._nowhere = _not_found(grounding)

    def result(self, *, top: int | None, length_s: float, overlap_s: float, **fields: Any) -> SearchResult:
        """Return the occurrences of all windows added so far, at most the `top` best ones.

        `fields` are those of a `Grounding` that follow from the whole search: `timings`, `clock` and `stream`.
        """
        ranked = sorted(
            self._earlier + self._found, key=lambda grounding: (-score_of(grounding), grounding.span or (0.0, 0.0))
        )
        ranked = [replace(grounding, **fields) for grounding in ranked[:top]]
        windows = SearchedWindows(self._windows, length_s, overlap_s, self._absent, self._shots)
        if ranked:
            return SearchResult(ranked[0], tuple(ranked), windows)
        assert self._nowhere is not None
        return SearchResult(replace(self._nowhere, **fields), (), windows)

    def _merge(self, grounding: Grounding, frame_times: np.ndarray) -> None:
        for place in range(len(self._found) - 1, -1, -1):
            if is_same(self._found[place], grounding, gap_s=self._gap_s):
                # The joined occurrence may now touch another one.
                self._merge(join(self._found.pop(place), grounding, frame_times), frame_times)
                return
        self._found.append(grounding)


def is_seen(grounding: Grounding) -> bool:
    """Return whether a target was found, and the spatial decoder sees it in at least one frame."""
    return grounding.span is not None and (grounding.tube is None or bool(grounding.tube.visible.any()))


def is_same(first: Grounding, second: Grounding, *, gap_s: float) -> bool:
    """Return whether two answers show one occurrence: their spans meet, and their boxes at common times overlap."""
    assert first.span is not None and second.span is not None
    if max(first.span[0], second.span[0]) > min(first.span[1], second.span[1]) + gap_s + TIME_TOLERANCE_S:
        return False
    if first.tube is None or second.tube is None:
        return True
    common = second.tube.times[_inside(second.tube.times, first.span)]
    if not len(common):
        return True
    one, two = first.tube.at(common), second.tube.at(common)
    visible = one.visible & two.visible
    return not visible.any() or float(box_iou(one.boxes, two.boxes)[visible].mean()) >= SAME_IOU


def join(first: Grounding, second: Grounding, frame_times: np.ndarray) -> Grounding:
    """Return one occurrence from two parts, of which the better one gives all that is no span, score or box.

    Of the boxes at common times, the first half is from the earlier part: near its border, a window shows less.
    """
    assert first.span is not None and second.span is not None
    early, late = sorted((first, second), key=lambda one: one.span or (0.0, 0.0))
    better = max((early, late), key=score_of)
    span = _union(early.span, late.span)
    assert span is not None and early.span is not None and late.span is not None
    scores = {
        "absent": min(float(one.scores.get("absent", 0.0)) for one in (early, late)),
        "answer": max(float(one.scores["answer"]) for one in (early, late)),
        "presence": float(better.scores["presence"]),
    }
    tube, boxes = None, None
    if early.tube is not None and late.tube is not None:
        middle = (late.span[0] + min(early.span[1], late.span[1])) / 2
        tube = _joined(early.tube, late.tube, middle)
        scores["presence"] = float(tube.presence.mean())
        assert early.boxes is not None and late.boxes is not None
        between = tube.at(frame_times[_inside(frame_times, (early.span[1], late.span[0]))])
        boxes = _joined(_joined(early.boxes, between, middle), late.boxes, middle)
    return replace(
        better, span=span, named_span=_union(early.named_span, late.named_span), scores=scores, tube=tube, boxes=boxes
    )


def _joined(early: AnyBoxes, late: AnyBoxes, middle: float) -> AnyBoxes:
    """Return the boxes of one part before `middle` and those of another after it; the first may end later."""
    before, after = early.times < middle, late.times >= middle
    rest = ~before & (early.times > late.times[after].max(initial=-np.inf))
    parts = [(early, before), (late, after), (early, rest)]
    names = [field.name for field in fields_of(early)]
    return type(early)(
        **{name: np.concatenate([getattr(part, name)[chosen] for part, chosen in parts]) for name in names}
    )


def _inside(times: np.ndarray, span: Span) -> np.ndarray:
    inside: np.ndarray = (times >= span[0] - TIME_TOLERANCE_S) & (times < span[1] - TIME_TOLERANCE_S)
    return inside


def _union(first: Span | None, second: Span | None) -> Span | None:
    if first is None or second is None:
        return first or second
    return min(first[0], second[0]), max(first[1], second[1])


def _not_found(grounding: Grounding) -> Grounding:
    return replace(
        grounding, found=False, span=None, named_span=None, tube=None, boxes=None, taps=None
    )  # fmt: skip
