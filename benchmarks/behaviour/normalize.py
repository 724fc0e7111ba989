"""Remove from JSON what differs from run to run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

DROPPED = re.compile(
    r"timings|timings_s|seconds|seconds_\w+|.*_seconds|.*rss_bytes|.*_ms|host|machine|date|created|"
    r"(cost|encode|extend|rebuild|answer)_s|longest_\w+|age_s|stage_seconds|about_sha256"
)
"""Keys of JSON whose values are measured, or belong to a machine."""

DROPPED_REPORT = re.compile(DROPPED.pattern + r"|(html_)?sha256")
"""In reports of a bundle: their hashes cover what was measured."""

DROPPED_HTTP = re.compile(DROPPED.pattern + r"|id|video|expires_at|uptime_s|open_\w*bytes|finished_at|created_at")


def normal(value: Any, shorten: Callable[[str], str], dropped: re.Pattern[str] = DROPPED) -> Any:
    """Return JSON without what differs from run to run: floats to four decimals, no times, short paths."""
    if isinstance(value, dict):
        return {k: normal(v, shorten, dropped) for k, v in value.items() if not dropped.fullmatch(k)}
    if isinstance(value, list):
        return [normal(item, shorten, dropped) for item in value]
    if isinstance(value, str):
        return shorten(value)
    return round(value, 4) if isinstance(value, float) else value


def shape(value: Any) -> Any:
    """Return the keys of JSON and the types of its values: what a machine's own facts leave to compare."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return type(value).__name__
