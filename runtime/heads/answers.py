"""Read spans and boxes from text answers, written under a grammar or freely. Knows text and numbers only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import EngineError

CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
Box = tuple[float, float, float, float]


def read_span(text: str) -> tuple[float, float] | None:
    """Return start and end in seconds of `{"start": …, "end": …}`; None: the answer is that the target is absent.

    Raises EngineError if the text names no two times.
    """
    for value in objects(text):
        start, end = seconds(value.get("start")), seconds(value.get("end"))
        if start is not None and end is not None:
            return min(start, end), max(start, end)
    if is_absent(text):
        return None
    raise unreadable(text, '{"start": 1.0, "end": 2.0}, or null')


def read_boxes(text: str) -> list[tuple[float | None, Box]]:
    """Return time in seconds (None: not given) and box of each entry of a list; boxes without an area are left out.

    The last entry of a list that was cut is left out. Raises EngineError if the text is no list.
    """
    entries, found = [], objects(text)
    for value in found:
        box = value.get("bbox_2d", value.get("bbox"))
        numbers = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
        if numbers and all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]:
            entries.append((seconds(value.get("time")), (box[0], box[1], box[2], box[3])))
    if not found and not is_absent(text):
        raise unreadable(text, 'a list of {"bbox_2d": [x1, y1, x2, y2], …}')
    return entries


def objects(text: str) -> list[Mapping[str, Any]]:
    """Return the complete JSON objects in a text, those inside of others included."""
    found: list[Mapping[str, Any]] = []
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found += _inside(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def _inside(value: Any) -> list[Mapping[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict) else []) + [found for part in inner for found in _inside(part)]


def seconds(value: Any) -> float | None:
    """Return a time in seconds from a number or a text such as `1.5 seconds`, `01:02.5` or `1:00:02`, else None."""
    if isinstance(value, str):
        if clock := CLOCK.search(value):
            return 3600 * float(clock[1] or 0) + 60 * float(clock[2]) + float(clock[3])
        value = float(number[0]) if (number := NUMBER.search(value)) else None
    is_number = type(value) in (int, float) and math.isfinite(value)
    return float(value) if is_number else None


def is_absent(text: str) -> bool:
    """Return whether a text says, in JSON, that nothing was found."""
    return re.sub(r"^```(?:json)?|```$|\s", "", text.strip()) in ("[]", "{}", "null", "none", "None")


def nearest(time_s: float, times: Sequence[float] | np.ndarray) -> int:
    """Return the index of the nearest of the times [N] in seconds."""
    return int(np.abs(np.asarray(times) - time_s).argmin())


def unreadable(text: str, expected: str) -> EngineError:
    """Return the error for an answer that cannot be read."""
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    advice = "use the grammar (without --no-grammar), which makes every answer readable"
    return EngineError("engine.unreadable_answer", f"the model answered {shown!r}, expected {expected}; {advice}")
