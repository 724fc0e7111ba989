"""Compare two records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normalize import DROPPED, DROPPED_REPORT, normal

TOLERANCE = 2e-4
"""Of floats, which are rounded to four decimals: two that are nearly equal may be rounded apart."""
WORDING = re.compile(r"/wording|/command|\S*/error: \"")
"""Places in a step that hold texts for people; an error that is null in one record is a difference."""


def differences(one: Any, two: Any, place: str = "") -> Iterator[str]:
    """Yield a line for every place in which two values differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}):
            if key in one and key in two:
                yield from differences(one[key], two[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}: only in the {'first' if key in one else 'second'}"
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for index, (left, right) in enumerate(zip(one, two)):
            yield from differences(left, right, f"{place}[{index}]")
    elif isinstance(one, float) and isinstance(two, (int, float)) and abs(one - two) <= TOLERANCE:
        return
    elif one != two:
        yield f"{place}: {json.dumps(one)[:200]} → {json.dumps(two)[:200]}"


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Read a record; what is dropped today is dropped from one that was written before."""
    steps: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for step in steps.values():
        for name, content in step["written"].items():
            dropped = DROPPED_REPORT if "/reports/" in name else DROPPED
            step["written"][name] = normal(content, str, dropped)
    return steps


def compare(first: Path, second: Path) -> int:
    """Print how two records differ, and return the exit code: 1 if in more than wording."""
    one, two = load(first), load(second)
    counts = {"DIFFERENT": 0, "wording": 0}
    for step in dict.fromkeys([*one, *two]):
        if step not in one:
            print(f"not compared  {step}: only in the second")
            continue
        found = list(differences(one[step], two[step])) if step in two else [": only in the first"]
        for line in found:
            kind = "wording" if WORDING.match(line) else "DIFFERENT"
            counts[kind] += 1
            print(f"{kind}  {step}{line}")
    print(f"{len(one)} and {len(two)} steps; {counts['DIFFERENT']} differences, {counts['wording']} of wording")
    return 1 if counts["DIFFERENT"] else 0
