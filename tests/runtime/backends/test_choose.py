"""Which backend and which variants a machine gets, and what it says where nothing fits."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.runtime.backends import choose as targets
from bridge_stg.runtime.backends.choose import BACKENDS, choose, open_sessions
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host import packages as runtime_packages
from bridge_stg.runtime.host.packages import install_command
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages of these versions are installed."""

    def pretend(**versions: str) -> None:
        monkeypatch.setattr(runtime_packages, "installed_version", versions.get)

    return pretend


@pytest.mark.parametrize(
    ("version", "variant"),
    [
        ("1.32.0", "standard"),
        ("1.33.0rc1", "standard"),
        ("2.0", "standard"),
        ("1.23.2", "primitive"),
        ("1.9", "primitive"),
    ],
)
def test_the_variant_follows_the_version_of_onnxruntime(bundle_path, installed, version, variant):
    installed(onnxruntime=version)
    target = choose(Bundle.load(bundle_path).manifest)
    assert (target.backend, target.version, target.variants) == ("onnxruntime", version, {"language_model": variant})


CPU = BACKENDS[-1]


def test_the_gpu_package_counts_and_a_variant_can_be_requested(bundle_path, installed):
    installed(**{"onnxruntime-gpu": "1.32.0"})
    manifest = Bundle.load(bundle_path).manifest
    assert choose(manifest, backend="onnxruntime", variant="primitive").variants == {"language_model": "primitive"}


def test_backends_and_variants_that_are_not_available(bundle_path, installed):
    manifest = Bundle.load(bundle_path).manifest
    installed(onnxruntime="1.23.2")
    with raises("engine.unknown_backend", "'tensorflow'", "auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, "):
        choose(manifest, backend="tensorflow")
    with raises("engine.no_backend", "'standard'", "onnxruntime 1.23.2", "primitive"):
        choose(manifest, variant="standard")
    installed()
    with raises("engine.no_backend", "'onnxruntime' is not installed", install_command("cpu")):
        choose(manifest)


def test_backends_are_tried_in_order_of_preference(bundle_path, installed, monkeypatch):
    faster = dataclasses.replace(
        CPU, name="faster", distributions=("faster",), extra="gpu", variants=lambda version: ("engine",)
    )
    monkeypatch.setattr(targets, "BACKENDS", (faster, CPU))
    manifest = Bundle.load(bundle_path).manifest
    installed(onnxruntime="1.32.0")
    assert choose(manifest).backend == "onnxruntime"
    installed(onnxruntime="1.32.0", faster="1.0")
    assert choose(manifest).backend == "onnxruntime"  # faster runs no variant of this bundle
    installed(faster="1.0")
    with raises("engine.no_backend", "faster 1.0", "engine", "'onnxruntime' is not installed"):
        choose(manifest)
    installed(onnxruntime="1.32.0", faster="1.0")
    able = dataclasses.replace(faster, variants=lambda version: ("primitive",))
    monkeypatch.setattr(targets, "BACKENDS", (able, CPU))
    assert choose(manifest).backend == "faster"


def test_sessions_of_a_bundle_run(bundle_path):
    sessions = open_sessions(Bundle.load(bundle_path), threads=1)
    session = sessions["language_model"]
    cache = session.allocate_cache(batch=1, capacity=4)
    outputs = session.infer({"input_ids": np.array([[1]]), "cache_position": np.array([0])}, cache=cache)
    assert outputs["logits"].shape == (1, 2, 1, 4)
    session.close()


def test_sessions_opened_before_a_failure_are_closed(bundle_path, monkeypatch):
    closed = []

    class Opened:
        def close(self) -> None:
            closed.append(self)

    def open_or_fail(bundle, graph, threads):
        if graph.name == "b":
            raise EngineError("engine.rejected_graph", "b: rejected")
        return Opened()

    bundle = Bundle.load(bundle_path)
    variants = bundle.manifest.graphs["language_model"]
    graphs = {n: {v: dataclasses.replace(g, name=n) for v, g in variants.items()} for n in ("a", "b")}
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs))
    monkeypatch.setattr(targets, "BACKENDS", (dataclasses.replace(CPU, open=open_or_fail),))
    with raises("engine.rejected_graph"):
        open_sessions(bundle)
    assert len(closed) == 1


def test_loading_and_choosing_import_no_engine_and_no_exporter(bundle_path):
    code = f"""
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
    sys.modules[name] = None
from bridge_stg.runtime.bundle import writer as bundle_writer, reports
from bridge_stg.runtime.parity import compare
from bridge_stg.runtime.backends import onnxruntime_cpu as onnxruntime_session, session, choose as targets
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import EngineError
bundle = Bundle.load({str(bundle_path)!r}, check="all")
print(targets.choose(bundle.manifest).backend)
try:
    targets.open_sessions(bundle)
except EngineError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "onnxruntime" and install_command("cpu") in second
