"""Ranges and statistics of the tiny bundle's activations."""

from __future__ import annotations

import pytest

from bridge_stg.calibration.collect.collect import collect
from bridge_stg.calibration.collect.samples import CalibrationSet, read_samples
from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.ranges import TensorRange
from bridge_stg.runtime.bundle.bundle import Bundle
from tests.calibration.chain_samples import write_samples
from tests.calibration.golden_ranges import golden_ranges

Ranges = dict[str, dict[str, TensorRange]]


@pytest.fixture(scope="session")
def ranges(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Ranges:
    """Min-max ranges of the tiny bundle by graph and node, and by past_key_0 …"""
    return golden_ranges(exported, tmp_path_factory.mktemp("ranges"))


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """One sample of every kind."""
    return read_samples(write_samples(tmp_path_factory.mktemp("samples")))


@pytest.fixture(scope="session")
def statistics(exported: Bundle, samples: CalibrationSet, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Activation statistics of the tiny bundle on these samples."""
    return collect(exported, samples, folder=tmp_path_factory.mktemp("statistics") / "s", rows=96, threads=1)
