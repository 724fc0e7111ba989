"""Read spans and boxes from the text of answers, under a grammar or free. Must not know models and videos."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import QueryError

CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
Box = tuple[float, float, float, float]


def read_span(text: str) -> tuple[float, float] | None:
    """Return start and end in seconds of `{"start": …, "end": …}`; None if the answer says that the target is absent.

    Raises QueryError if the text has no span.
    """
    for value in json_objects(text):
        start, end = read_seconds(value.get("start")), read_seconds(value.get("end"))
        if start is not None and end is not None:
            return min(start, end), max(start, end)
    if is_absent(text):
        return None
    raise unreadable_answer(text, '{"start": 1.0, "end": 2.0}, or null')


def read_boxes(text: str, scale: tuple[int, int]) -> list[tuple[float | None, Box]]:
    """Return the time in seconds (None: not given) and the box of each entry of a list.

    Boxes are clipped to `scale`, the right and bottom sides of a frame. Entries without a box of positive width and
    height in the frame are left out, and so is an incomplete last entry. Raises QueryError if the text has no JSON
    object and does not say that the target is absent.
    """
    entries, found = [], json_objects(text)
    for value in found:
        box = value.get("bbox_2d", value.get("bbox"))
        if isinstance(box, list) and len(box) == 4 and all(isinstance(side, float) for side in box):
            left, top, right, bottom = (
                min(max(side, 0.0), float(most)) for side, most in zip(box, 2 * scale, strict=True)
            )
            if left < right and top < bottom and all(map(math.isfinite, box)):
                entries.append((read_seconds(value.get("time")), (left, top, right, bottom)))
    if not found and not is_absent(text):
        raise unreadable_answer(text, 'a list of {"bbox_2d": [x1, y1, x2, y2], …}')
    return entries


def json_objects(text: str) -> list[Mapping[str, Any]]:
    """Return the complete JSON objects in a text, including those inside of others."""
    found: list[Mapping[str, Any]] = []
    decoder, at = json.JSONDecoder(parse_int=float), text.find("{")  # the float of an integer too large is infinite
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found += _objects_in(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def _objects_in(value: Any) -> list[Mapping[str, Any]]:
    """Return a JSON value if it is an object, and all objects inside of it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict) else []) + [found for part in inner for found in _objects_in(part)]


def read_seconds(value: Any) -> float | None:
    """Return the seconds that a number or a text names (`1.5 seconds`, `01:02.5`, `1:00:02`); None if it names none."""
    if isinstance(value, str):
        if clock := CLOCK.search(value):
            value = 3600 * float(clock[1] or 0) + 60 * float(clock[2]) + float(clock[3])
        else:
            value = float(number[0]) if (number := NUMBER.search(value)) else None
    return value if isinstance(value, float) and math.isfinite(value) else None


def is_absent(text: str) -> bool:
    """Return whether a text says, in JSON, that nothing was found."""
    return re.sub(r"^```(?:json)?|```$|\s", "", text.strip()) in ("[]", "{}", "null", "none", "None")


def nearest_index(time_s: float, times: Sequence[float] | np.ndarray) -> int:
    """Return the index of the one of N times in seconds that is nearest to `time_s`."""
    return int(np.abs(np.asarray(times) - time_s).argmin())


def unreadable_answer(text: str, expected: str) -> QueryError:
    """Return the error for an answer that cannot be read; `expected` describes the form."""
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    advice = "keep the grammar on (no --no-grammar), and allow a larger --max-tokens if the answer was cut"
    return QueryError("query.unreadable_answer", f"the model answered {shown!r}, expected {expected}; {advice}")
