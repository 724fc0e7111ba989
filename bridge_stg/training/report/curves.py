"""The lines, ticks and labels of a chart of one figure over steps, in the coordinates of its SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Point: TypeAlias = tuple[int, float]
"""A step and a value, which may be NaN."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 52, 14, 10, 26
MOST_POINTS = 300
"""Longer curves are shown as means of neighbours."""
SMOOTHED = 30
"""Points from which on a curve has a smoothed line."""
LOG_RATIO = 20.0
"""Ratio of the largest to the last value from which on an axis is logarithmic."""


@dataclass(frozen=True)
class Curve:
    """A chart of `WIDTH` × `HEIGHT`.

    Attributes:
        name: of the figure.
        last: its last finite value; None: it has none.
        logarithmic: whether the axis of the values is.
        lines: attributes `points` of polylines; a value that is not finite interrupts a line.
        smoothed: the same of a moving average.
        marks: x, y, label and whether it is the best, of each point of a curve with few.
        x_ticks: x and label.
        y_ticks: y and label.
    """

    name: str
    last: float | None
    logarithmic: bool
    lines: tuple[str, ...]
    smoothed: tuple[str, ...]
    marks: tuple[tuple[float, float, str, bool], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def curve(name: str, points: Sequence[Point], *, marks: bool = False, best: int | None = None) -> Curve:
    """Return the chart of a figure at increasing steps; `best` is the step of the point to emphasise."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    shown = [] if not finite else _thinned(points)
    values = np.asarray([value for _, value in shown if math.isfinite(value)])
    if not len(values):
        return Curve(name, None, False, (), (), (), (), ())
    low, high = float(values.min()), float(values.max())
    rate = name.startswith("learning_rate")
    logarithmic = low > 0 and high >= LOG_RATIO * finite[-1][1] and not rate
    smoothed = len(shown) >= SMOOTHED and not rate
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    if not logarithmic:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    steps = [0, points[-1][0]]

    def scaled(value: float) -> float:
        return math.log(value) if logarithmic else value

    def x(step: float) -> float:
        share = (step - steps[0]) / ((steps[1] - steps[0]) or 1)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)

    def y(value: float) -> float:
        share = (scaled(value) - scaled(low)) / ((scaled(high) - scaled(low)) or 1)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    def lines(of: Sequence[tuple[float, float]]) -> tuple[str, ...]:
        parts: list[list[str]] = [[]]
        for step, value in of:
            if math.isfinite(value):
                parts[-1].append(f"{x(step)},{y(value)}")
            elif parts[-1]:
                parts.append([])
        return tuple(" ".join(part if part[1:] else part * 2) for part in parts if part)  # a dot is a line to itself

    return Curve(
        name, finite[-1][1], logarithmic, lines(shown), lines(_smooth(shown)) if smoothed else (),
        tuple((x(s), y(v), f"step {s:,}: {v:.4g}", s == best) for s, v in finite) if marks else (),
        tuple((x(step), f"{step:,.0f}") for step in _ticks(*steps) if steps[0] <= step <= steps[1]),
        tuple((y(tick), f"{tick:.4g}") for tick in ticks),
    )  # fmt: skip


def _thinned(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS`: the means of equal parts, NaN where no value of a part is finite."""
    if len(points) <= MOST_POINTS:
        return [(float(step), value) for step, value in points]
    found = []
    for part in np.array_split(np.asarray(points, np.float64), MOST_POINTS):
        known = part[np.isfinite(part[:, 1]), 1]
        found.append((float(part[:, 0].mean()), float(known.mean()) if len(known) else math.nan))
    return found


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the centred moving average over a twentieth of the points; NaN where a value is not finite."""
    values = np.asarray([value for _, value in points], np.float64)
    known = np.isfinite(values)
    window = np.ones(2 * (len(points) // 40) + 1)
    sums, counts = (np.convolve(part, window, "same") for part in (np.where(known, values, 0.0), known))
    means = np.where(known, sums / np.maximum(counts, 1), math.nan)
    return [(step, float(mean)) for (step, _), mean in zip(points, means)]


def _ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers that include the range."""
    if high <= low:
        low, high = (0.0, 1.0) if 0 <= low <= 1 else (low - abs(low) / 10, high + abs(low) / 10)
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (5, 2, 1, 0.5) if (high - low) / (step * factor) >= 2 or factor == 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * count, 12) if step > 1e-9 else step * count for count in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten in a range, every n-th of many; of few, also twice and five times these."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) <= 2 else (1,)
    ticks = [
        factor * 10.0**exponent for exponent in exponents[:: max(1, -(-len(exponents) // 6))] for factor in factors
    ]
    return [tick for tick in ticks if low <= tick <= high]
