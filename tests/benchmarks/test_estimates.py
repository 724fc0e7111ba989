"""The estimator against published and measured times: efficiencies, errors, and the tables of its page."""

from __future__ import annotations

import pytest
from gpu import estimates

from bridge_stg.export.estimate.estimate import efficiency_of


@pytest.fixture(scope="module")
def rows() -> list[estimates.Row]:
    return estimates.rows()


def test_efficiencies_are_the_fitted_ones(rows: list[estimates.Row]) -> None:
    own = {row.kind: efficiency_of(row.device) for row in rows}
    assert {kind: (one.compute, one.memory) for kind, one in own.items()} == estimates.fits(rows)


def test_rows_are_within_the_bound_or_have_a_reason(rows: list[estimates.Row]) -> None:
    for kind in estimates.FITTED:
        held = [row for row in rows if row.kind == kind and not row.fitted]
        assert len(held) >= 4 and all(abs(row.error) <= estimates.BOUND or row.reason for row in held), kind
    assert sum(bool(row.reason) for row in rows) <= 5
    covered = {(row.device.name, row.model, row.metric) for row in rows}
    for device in ("agx-orin-64g", "orin-nx-16g-super", "agx-thor"):
        assert {
            (device, f"qwen3-vl-{size}", metric) for size in ("2b", "4b") for metric in ("vision", "prefill", "decode")
        } <= covered


def test_the_page_is_current() -> None:
    page = estimates.PAGE.read_text(encoding="utf-8")
    assert estimates.filled(page) == page
