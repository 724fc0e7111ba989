"""Draft the text that continues a list of boxes. The box of a target usually resembles the one of the frame before."""

from __future__ import annotations

import re

from bridge_stg.runtime.heads.json_grammar import BOX, LABEL, TIME, JsonForm

ENTRY = re.compile(r'\{"time": ([\d.]+), "bbox_2d": \[(\d{1,9}), (\d{1,9}), (\d{1,9}), (\d{1,9})\]')
DIGITS = re.compile(r"[\d.]*")
Box = tuple[int, int, int, int]


def draft(form: JsonForm, written: str) -> str:
    """Return a draft of the text after `written`: the rest of the last entry, and the next entry; empty: no draft.

    It ends where the box of the entry after the next begins. The step between two times is that of the last two
    entries; boxes are those of `predict`.
    """
    matches = list(ENTRY.finditer(written))
    indices = [form.times.index(match[1]) if match[1] in form.times else -1 for match in matches]
    if not matches or min(indices) < 0:
        return ""
    boxes = [(int(m[2]), int(m[3]), int(m[4]), int(m[5])) for m in matches]
    step = max(1, indices[-1] - indices[-2]) if len(indices) > 1 else 1
    # The text between two boxes repeats: without a grammar, the model may write another label or other spaces.
    between = f"{LABEL}{form.label}}}{form.spec.list_separator}"
    if len(matches) > 1:
        between = written[matches[-2].end() : matches[-1].start()]
    expected = _entry(form.times[indices[-1]], boxes[-1])
    later = form.times[indices[-1] + step :: step]
    if later:
        expected += between + _entry(later[0], predict(boxes, form.scale))
    if len(later) > 1:
        expected += f"{between}{TIME}{later[1]}, {BOX}"
    return remainder(expected, written[matches[-1].start() :])


def _entry(time: str, box: Box) -> str:
    """Return the beginning of an entry, up to the end of its box."""
    return f"{TIME}{time}, {BOX}{', '.join(map(str, box))}]"


def predict(boxes: list[Box], scale: tuple[int, int]) -> Box:
    """Return the box that is expected after at least one other, in units of `scale` (width, height).

    It is the last box, or the last box moved at constant speed: whichever was closer for the last box itself.
    """
    if len(boxes) < 3:
        return boxes[-1]
    kept_error, moved_error = (_distance(box, boxes[-1]) for box in (boxes[-2], _moved(boxes[-3], boxes[-2], scale)))
    return _moved(boxes[-2], boxes[-1], scale) if moved_error < kept_error else boxes[-1]


def remainder(expected: str, written: str) -> str:
    """Return the part of an expected text that follows `written`, whose numbers may differ from the expected ones.

    A last number that may be incomplete is continued with the further digits of the expected one. Empty if the texts
    differ in more than their numbers.
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
    """Return the box after two others at constant speed, clipped to `scale`."""
    left, top, right, bottom = (2 * b - a for a, b in zip(before, last, strict=True))
    left, top = min(max(left, 0), scale[0] - 1), min(max(top, 0), scale[1] - 1)
    return left, top, min(max(right, left + 1), scale[0]), min(max(bottom, top + 1), scale[1])


def _distance(box: Box, other: Box) -> int:
    return sum(abs(a - b) for a, b in zip(box, other, strict=True))
