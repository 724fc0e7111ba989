"""Events: each change is reported once, as soon as it is known."""

from __future__ import annotations

import numpy as np

from bridge_stg.runtime.chain.results import Grounding, Tube
from bridge_stg.runtime.live.events import EventTracker
from bridge_stg.runtime.video.token_budget import CoarseChoice

HERE, THERE = (0, 0, 10, 10), (20, 0, 30, 10)


def answer(span: tuple[float, float] | None, *boxes: tuple[int, ...], visible: bool = True) -> Grounding:
    """Return a grounding whose boxes are spread evenly over its span."""
    tube = None
    if span is not None:
        times = np.linspace(*span, num=len(boxes), endpoint=False)
        presence = np.full(len(boxes), 0.9 if visible else 0.1, np.float32)
        tube = Tube(times, np.array(boxes, np.float32), presence, presence >= 0.5)
    choice = CoarseChoice(fps=2.0, size=(64, 48), groups=8, tokens=64, max_visual_tokens=None)
    return Grounding(
        query="it", found=span is not None, span=span, tube=tube, boxes=None, size=(64, 48), coarse=choice, answer="",
        named_span=span, scores={"absent": 0.1}, tokens={}, timings={},
    )  # fmt: skip


def events_of(*answers: tuple[float, Grounding], moved_iou: float = 0.5) -> list[tuple[str, float, float]]:
    tracker = EventTracker("it", settle_s=1.25, moved_iou=moved_iou)
    return [
        (event.kind, event.time_s, known) for known, grounding in answers for event in tracker.add(grounding, known)
    ]


def test_appears_moves_and_leaves() -> None:
    assert events_of(
        (1.0, answer(None)),
        (4.0, answer((2.0, 4.0), HERE)),
        (5.0, answer((2.0, 5.0), HERE, HERE)),
        (6.0, answer((2.0, 6.0), HERE, THERE)),
        (7.0, answer((2.0, 7.0), HERE, THERE)),
        (8.0, answer((2.0, 7.0), HERE, THERE)),
        (9.0, answer((2.0, 7.0), HERE, THERE)),
        (10.0, answer(None)),
    ) == [("appeared", 2.0, 4.0), ("moved", 6.0, 6.0), ("left", 7.0, 9.0)]


def test_a_visit_between_two_rounds_gives_both_events() -> None:
    assert events_of((9.0, answer((2.0, 4.0), HERE)), (10.0, answer((2.0, 4.0), HERE))) == [
        ("appeared", 2.0, 9.0),
        ("left", 4.0, 9.0),
    ]


def test_an_unstable_end_is_not_a_second_visit() -> None:
    assert [kind for kind, *_ in events_of(
        (9.0, answer((2.0, 4.0), HERE)),
        (10.0, answer((1.75, 4.25), HERE)),
        (11.0, answer((2.25, 5.0), HERE)),
        (12.0, answer((2.0, 3.5), HERE)),
    )] == ["appeared", "left"]  # fmt: skip


def test_a_second_visit_is_reported() -> None:
    events = events_of(
        (9.0, answer((2.0, 4.0), HERE)),
        (10.0, answer((8.0, 10.0), THERE)),
        (16.0, answer((6.0, 9.0), THERE)),
    )
    assert events == [("appeared", 2.0, 9.0), ("left", 4.0, 9.0), ("appeared", 8.0, 10.0), ("left", 10.0, 16.0)]


def test_a_target_that_is_missed_once_has_not_left() -> None:
    assert events_of((4.0, answer((2.0, 4.0), HERE)), (5.0, answer(None)), (6.0, answer((2.0, 6.0), HERE))) == [
        ("appeared", 2.0, 4.0)
    ]


def test_invisible_boxes_are_not_a_target() -> None:
    assert events_of((4.0, answer((2.0, 4.0), HERE, visible=False)), (9.0, answer(None))) == []


def test_moved_can_be_disabled() -> None:
    assert events_of((4.0, answer((2.0, 4.0), HERE)), (5.0, answer((2.0, 5.0), THERE)), moved_iou=0) == [
        ("appeared", 2.0, 4.0)
    ]
