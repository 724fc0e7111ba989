"""Seconds of the stages of several calls, and their median and 95th percentile."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class StageTimes:
    """Collects the `timings` of groundings, so that they can be summarized by stage."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    def add(self, timings: Mapping[str, float]) -> None:
        """Add the seconds per stage of one call."""
        for stage, seconds in timings.items():
            self._taken.setdefault(stage, []).append(seconds)

    def percentile(self, percent: float) -> dict[str, float]:
        """Return a percentile of the seconds of each stage, interpolated between calls."""
        return {stage: float(np.percentile(seconds, percent)) for stage, seconds in self._taken.items()}
