"""Speed gates of graphs, and recorded calls of a bundle that is compared with itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_stg.calibration.collect.recorded_calls import record
from bridge_stg.calibration.collect.samples import read_samples
from bridge_stg.calibration.report.assemble import drift_rows
from bridge_stg.calibration.scoring.speed_gate import Gate, measure_gate
from bridge_stg.calibration.scoring.stage_times import stage_seconds
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from tests.calibration.chain_samples import write_samples
from tests.errors import raises


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder for samples."""
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


OPTIONS = {"backend": "auto", "variant": None, "threads": 1}


def test_a_graph_that_gains_is_quantized() -> None:
    gate = Gate("language_model", 0.2, 0.1, 4_000_000, 1_000_000)
    assert gate.open and "100.0 ms" in gate.why


@pytest.mark.parametrize(
    ("seconds", "size", "faster", "smaller"),
    [
        (0.3, 1_000_000, False, True),
        (0.199, 1_000_000, False, True),  # within noise
        (0.1, 4_000_000, True, False),
        (0.3, 5_000_000, False, False),
    ],
)
def test_a_graph_that_does_not_stays_in_float(seconds: float, size: int, faster: bool, smaller: bool) -> None:
    gate = Gate("language_model", 0.2, seconds, 4_000_000, size)
    assert not gate.open and (gate.faster, gate.smaller) == (faster, smaller) and gate.why.endswith("stays in float")
    forced = Gate("language_model", 0.2, seconds, 4_000_000, size, forced=True)
    assert forced.open and forced.why.endswith("requested anyway")


def test_recorded_calls_of_a_bundle_replay_exactly_in_itself(exported: Bundle, inputs: Path, tmp_path: Path) -> None:
    samples = read_samples(write_samples(inputs)).dataset.samples[:3]
    cases = record(exported, samples, tmp_path / "cases", options=OPTIONS)
    assert len(cases) == 3
    before = [path.stat().st_mtime_ns for path in cases]
    assert [p.stat().st_mtime_ns for p in record(exported, [], tmp_path / "cases", options=OPTIONS)] == before
    for graph in GRAPHS:
        for together in (True, False):
            gate, drift = measure_gate(
                graph, exported, exported, cases, options=OPTIONS, rounds=2, side_by_side=together
            )
            assert not gate.smaller and gate.float_bytes == gate.int8_bytes > 1000
            assert gate.float_seconds > 0 and gate.int8_seconds > 0
            assert drift and all(boundary.max_abs == 0 for boundary in drift)
            rows = drift_rows(drift)
            assert {row["graph"] for row in rows} == {graph} and all(row["cosine"] > 1 - 1e-9 for row in rows)
    assert {row["tensor"] for row in rows} == {"boxes", "presence"}


def test_samples_that_fail_are_left_out(exported: Bundle, inputs: Path, tmp_path: Path) -> None:
    samples = list(read_samples(write_samples(inputs)).dataset.samples[:2])
    (inputs / "a.mp4").write_bytes(b"no video")
    assert len(record(exported, samples, tmp_path / "cases", options=OPTIONS)) == 1
    with raises("calibration.all_samples_failed", 1):
        record(exported, samples[:1], tmp_path / "others", options=OPTIONS)
    assert not (tmp_path / "others").exists()


def test_stage_times_of_two_bundles(exported: Bundle, inputs: Path) -> None:
    samples = read_samples(write_samples(inputs)).dataset.samples[:3]
    bundles = {"float": exported.path, "int8": exported.path}
    for together in (True, False):
        found = stage_seconds(bundles, samples, options=OPTIONS, side_by_side=together)
        assert found["clips"] == 2
        assert set(found["float"]) == set(found["int8"]) >= {"vision_coarse", "prefill", "answer", "total"}
        assert all(seconds >= 0 for label in bundles for seconds in found[label].values())
