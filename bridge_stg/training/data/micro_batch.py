"""What the data hands to the trainer: the micro-batch of a place, and the media that could not be read for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Skipped:
    """A medium or query that is not used.

    Attributes:
        media: name of the medium, or place of the query's annotation.
        reason: why, a sentence.
    """

    media: str
    reason: str


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass computes.

    Attributes:
        batch: the argument of the task.
        media: name of its medium; empty if it has none.
        skipped: media that were tried before it and cannot be read.
    """

    batch: Any
    media: str = ""
    skipped: tuple[Skipped, ...] = ()
