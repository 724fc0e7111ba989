"""An hour of a stream, as fast as possible: memory does not grow after the warm-up."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from bridge_stg.runtime.host.memory import peak_bytes
from tests.fakes.live_chain import live_grounder, stream

HOUR_S, WARM_UP_S = 3600, 360
STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    gc.collect()
    if not STATM.exists():  # not Linux
        return peak_bytes()
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_grows_less_than_one_per_cent_in_an_hour() -> None:
    measured: list[int] = []
    grounder = live_grounder(seeing=False)
    with grounder.watch(stream(HOUR_S, fps=4.0), ["the car", "a dog"], window=16) as watch:
        for update in watch:
            if update.known_s >= WARM_UP_S and update.known_s % 60 == 0:
                measured.append(resident_bytes())
    stats = watch.stats
    assert stats.answers == stats.groups == HOUR_S and stats.rebuilds == 719 and len(measured) == 55
    assert max(measured) <= 1.01 * measured[0]
