"""The simulation of large runs: without failures, its hours are those of the resource that limits it."""

from __future__ import annotations

import numpy as np
import pytest
from scale.simulate import Costs, Setting, simulate

COSTS = Costs(window=4.0, found=2.0, query=0.2)


@pytest.mark.parametrize(
    ("setting", "limit"),
    [
        (Setting(2, workers=4, videos=2000, failures=1e-9), "workers"),
        (Setting(2, workers=4, videos=2000, failures=1e-9, storage=1e5), "storage"),
        (Setting(100, workers=100, videos=2000, failures=1e-9, sigma=0.01), "driver"),
    ],
)
def test_a_run_takes_as_long_as_what_limits_it(setting: Setting, limit: str) -> None:
    costs = Costs(0.001, 0.0, 0.0, decode=0.0, unit=1.0) if limit == "driver" else COSTS
    found = simulate(costs, setting)
    assert found["limited_by"] == limit
    assert 1 <= found["hours"] / found["least_hours"][limit] < 1.1
    assert found["units_killed"] == found["units_lost"] == 0


def test_units_of_failed_nodes_start_again() -> None:
    setting = Setting(4, workers=4, videos=4000, failures=2.0)
    found, without = simulate(COSTS, setting), simulate(COSTS, Setting(4, workers=4, videos=4000, failures=1e-9))
    assert found["units_killed"] % 4 == 0 and found["units_killed"] > 0 == found["units_lost"]
    assert without["hours"] < found["hours"] < 1.2 * without["hours"]


def test_the_cost_of_an_hour_counts_windows_and_queries() -> None:
    (one,), (three,) = (COSTS.seconds(np.array([3600.0]), np.array([n]), 0.0) for n in (1, 3))
    assert one == pytest.approx(300 * 4.0 + 3600 * 0.035) and three - one == pytest.approx(300 * 2 * 0.2)
