"""Guess the rest of an entry of a list of boxes from the entries before: a box looks like the last frame's box."""

from __future__ import annotations

import re

from bridge_stg.runtime.heads.json_grammar import BOX, LABEL, TIME, JsonForm

ENTRY = re.compile(r'\{"time": ([\d.]+), "bbox_2d": \[(\d+), (\d+), (\d+), (\d+)\]')
DIGITS = re.compile(r"[\d.]*")
Box = tuple[int, int, int, int]


def draft(form: JsonForm, written: str) -> str:
    """Return a guess of the text that follows `written`, up to the first number of another box; empty: no guess.

    The time steps as before; the box is kept, or moves on, whichever was closer for the entry before.
    """
    matches = list(ENTRY.finditer(written))
    places = [form.times.index(match[1]) if match[1] in form.times else -1 for match in matches]
    if not matches or min(places) < 0:
        return ""
    boxes = [(int(m[2]), int(m[3]), int(m[4]), int(m[5])) for m in matches]
    step = max(1, places[-1] - places[-2]) if len(places) > 1 else 1
    # What stands between two boxes is as before, such as a label of the model's own.
    glue = f"{LABEL}{form.label}}}{form.spec.list_separator}"
    if len(matches) > 1:
        glue = written[matches[-2].end() : matches[-1].start()]
    expected = _entry(form.times[places[-1]], boxes[-1])
    following = form.times[places[-1] + step :: step]
    for time in following[:1]:
        expected += glue + _entry(time, predict(boxes, form.scale))
    for time in following[1:2]:
        expected += f"{glue}{TIME}{time}, {BOX}"
    return rest(expected, written[matches[-1].start() :])


def _entry(time: str, box: Box) -> str:
    """Return the beginning of an entry, up to the end of its box."""
    return f"{TIME}{time}, {BOX}{', '.join(map(str, box))}]"


def predict(boxes: list[Box], scale: tuple[int, int]) -> Box:
    """Return the box that is expected after others."""
    if len(boxes) < 2:
        return boxes[-1]
    moved = _moved(boxes[-2], boxes[-1], scale)
    if len(boxes) < 3:
        return boxes[-1]
    kept_error, moved_error = (_distance(box, boxes[-1]) for box in (boxes[-2], _moved(boxes[-3], boxes[-2], scale)))
    return moved if moved_error < kept_error else boxes[-1]


def rest(expected: str, written: str) -> str:
    """Return what is left of an expected text; the numbers of the written beginning may differ from the expected ones.

    A number that is being written goes on like the expected one. Empty if the texts differ in more than their numbers.
    """
    at = 0
    while written:
        number = DIGITS.match(written)
        assert number is not None
        if number[0]:
            planned = DIGITS.match(expected, at)
            assert planned is not None
            if number.end() == len(written):
                return expected[min(at + number.end(), planned.end()) :]
            at, written = planned.end(), written[number.end() :]
        elif expected[at : at + 1] != written[0]:
            return ""
        else:
            at, written = at + 1, written[1:]
    return expected[at:]


def _moved(before: Box, last: Box, scale: tuple[int, int]) -> Box:
    """Return the box after two others at constant speed, inside the scale."""
    left, top, right, bottom = (2 * b - a for a, b in zip(before, last, strict=True))
    left, top = min(max(left, 0), scale[0] - 1), min(max(top, 0), scale[1] - 1)
    return left, top, min(max(right, left + 1), scale[0]), min(max(bottom, top + 1), scale[1])


def _distance(box: Box, other: Box) -> int:
    return sum(abs(a - b) for a, b in zip(box, other, strict=True))
