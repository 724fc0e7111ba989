"""The estimator against published and measured times: efficiencies, errors, and the tables of its page."""

from __future__ import annotations

import pytest
from gpu import estimates
from speed import flops

from bridge_stg.export.estimate.estimate import efficiency_of
from bridge_stg.export.estimate.known import KNOWN
from bridge_stg.export.estimate.work import STORAGE, language_work, vision_work


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
    assert sum(abs(row.error) > estimates.BOUND for row in rows) <= len(rows) / 5
    covered = {(row.device.name, row.model, row.metric) for row in rows}
    for device in ("agx-orin-64g", "orin-nx-16g-super", "agx-thor"):
        assert {
            (device, f"qwen3-vl-{size}", metric) for size in ("2b", "4b") for metric in ("vision", "prefill", "decode")
        } <= covered


def test_counts_are_those_of_the_speed_benchmark() -> None:
    shape, config, fp32 = estimates.shape_of("qwen3-vl-4b"), KNOWN["qwen3-vl-4b"], STORAGE["fp32"]
    vision, expected = (
        vision_work(shape, fp32, groups=3, patches=24 * 14),
        flops.vision_work(config["vision_config"], 3, 24, 14),
    )
    assert (vision.matmuls, vision.attention) == (expected.matmuls, expected.attention)
    text = language_work(shape, fp32, length=500)
    expected = flops.prefill_work(config["text_config"], 500)
    assert (text.matmuls, text.attention) == (expected.matmuls, expected.attention)
    step = language_work(shape, fp32, length=1, past=900)
    assert step.weights == pytest.approx(flops.decode_bytes(config["text_config"], 0, "fp32"), rel=1e-4)


def test_the_page_is_current() -> None:
    page = estimates.PAGE.read_text(encoding="utf-8")
    assert estimates.filled(page) == page
