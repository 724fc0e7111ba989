"""An hour of a stream, as fast as possible: memory does not grow after the warm-up."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.fakes.live_chain import watch_for_an_hour

GROWTH_BYTES = 4 * 2**20
"""About a kilobyte per second of the stream: what the allocator keeps, and far less than one frame per group."""


@pytest.mark.slow
def test_memory_does_not_grow_in_an_hour() -> None:
    """In a process of its own, since other tests leave memory behind that is freed and taken at any time."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        measured, stats = executor.submit(watch_for_an_hour).result()
    assert stats.answers == stats.groups == 3600 and stats.rebuilds == 719 and len(measured) == 55
    assert max(measured) <= measured[0] + GROWTH_BYTES
