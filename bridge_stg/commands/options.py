"""Types of options that several commands share."""

from __future__ import annotations

import math
from typing import Any

import click

from bridge_stg.runtime.host.cpus import MAX_THREADS

THREADS = click.IntRange(min=1, max=MAX_THREADS)
"""CPU threads of an engine."""


class Number(click.FloatRange):
    """A number in a range. NaN, which click finds in every range, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


SECONDS = Number(min=0, min_open=True)
