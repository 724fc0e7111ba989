"""Compare the occurrences of a search with expected spans."""

from __future__ import annotations

from typing import Any

from bridge_stg.runtime import SearchResult
from bridge_stg.runtime.search.occurrences import score_of

SAME_TIME = 0.5
Span = tuple[float, float]
Expected = dict[str, list[tuple[Span, Span]]]
"""By query, the expected spans, each with the part of the video to which occurrences are cut for the comparison."""


def compare(results: list[SearchResult], expected: Expected, least: float = 0.0) -> dict[str, Any]:
    """Return recall and precision of the occurrences with this score or more, and what was missed or not expected.

    An occurrence counts as found if its span has an IoU of `SAME_TIME` or more with an expected one.
    """
    compared = {result.query: _unmatched(result, expected[result.query], least) for result in results}
    wanted = sum(map(len, expected.values()))
    matched = wanted - sum(len(missed) for missed, _ in compared.values())
    found = matched + sum(len(extra) for _, extra in compared.values())
    return {
        "expected": wanted, "occurrences": found, "matched": matched,
        "recall": round(matched / wanted, 4), "precision": round(matched / max(found, 1), 4),
        "missed": {query: missed for query, (missed, _) in compared.items() if missed},
        "not_expected": {query: extra for query, (_, extra) in compared.items() if extra},
    }  # fmt: skip


def _unmatched(result: SearchResult, expected: list[tuple[Span, Span]], least: float) -> tuple[list[Span], list[Span]]:
    """Return the expected spans that no other occurrence shows, and the occurrences that were not expected."""
    left, missed = [one.span for one in result.occurrences if one.span is not None and score_of(one) >= least], []
    for span, part in expected:
        best = max(left, key=lambda other: _iou(span, _cut(other, part)), default=None)
        if best is not None and _iou(span, _cut(best, part)) >= SAME_TIME:
            left.remove(best)
        else:
            missed.append(span)
    return missed, left


def _cut(span: Span, part: Span) -> Span:
    return min(max(span[0], part[0]), part[1]), max(min(span[1], part[1]), part[0])


def _iou(one: Span, other: Span) -> float:
    common = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return common / max(max(one[1], other[1]) - min(one[0], other[0]), 1e-9)
