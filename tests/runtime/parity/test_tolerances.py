"""Tolerances that are measured on a bundle: it passes with them, and twice the difference does not."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import Manifest
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.bundle.writer import BundleWriter
from bridge_stg.runtime.parity.golden import Tolerance, write_case
from bridge_stg.runtime.parity.tolerances import measure_tolerances
from bridge_stg.runtime.parity.verify import verify_bundle
from tests.errors import raises

Make = Callable[..., Bundle]


@pytest.fixture
def make(tmp_path: Path, language_models: dict[str, Any], model_spec: ModelSpec) -> Make:
    """A function that writes a bundle with another embedding table, the golden case of the real one, and tolerances."""
    graph = language_models["primitive"]
    inputs = {"input_ids": np.array([[1, 2]]), "cache_position": np.array([0])}
    with OnnxRuntimeSession(graph.path, graph.spec, threads=1) as session:
        outputs = session.infer(inputs, cache=session.allocate_cache(batch=1, capacity=4))
    table = np.fromfile(graph.path.with_name("weights.data"), np.float32)
    noise = np.random.default_rng(0).standard_normal(table.shape).astype(np.float32)

    def written(name: str, error: float, tolerance: dict[str, Tolerance], precision: str = "int8 w8a8") -> Bundle:
        folder = shutil.copytree(graph.path.parent, tmp_path / f"{name}-graph")
        (table + np.float32(error) * noise).tofile(folder / "weights.data")
        with BundleWriter(tmp_path / name) as writer:
            writer.add_graph(dataclasses.replace(graph.spec, precision=precision), folder / graph.path.name)
            calls = [("language_model", inputs, outputs)]
            write_case(writer.folder / "golden" / "one", calls, kind="demo", tolerance=tolerance, cache_capacity=4)
            writer.finish(Manifest(spec=model_spec))
        return Bundle.load(tmp_path / name)

    return written


def test_a_fresh_bundle_passes_and_drift_fails(make: Make) -> None:
    source = make("source", 0.0, {}, "fp32")
    found = measure_tolerances(make("first", 0.2, {}), source)
    (measured,) = found["one"].values()
    assert list(found["one"]) == ["language_model.logits"] and measured.rel_l2 > 0.1
    verify_bundle(make("fresh", 0.2, found["one"]).path, threads=1)
    verify_bundle(make("near", 0.25, found["one"]).path, threads=1)
    with raises("bundle.drift"):
        verify_bundle(make("far", 0.6, found["one"]).path, threads=1)


def test_float_graphs_keep_their_tolerances_and_exact_ones_get_the_least(make: Make) -> None:
    source = make("source", 0.0, {}, "fp32")
    assert measure_tolerances(make("float", 0.2, {}, "fp32"), source) == {}
    exact = measure_tolerances(make("exact", 0.0, {}), source)["one"]["language_model.logits"]
    assert exact == Tolerance(max_abs=1e-3, rel_l2=1e-4)


def test_outputs_that_are_no_numbers_are_an_error(make: Make) -> None:
    source = make("source", 0.0, {}, "fp32")
    with raises("calibration.not_finite", "language_model_0.logits"):
        measure_tolerances(make("nan", float("nan"), {}), source)
