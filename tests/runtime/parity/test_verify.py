"""Hashing and replaying a bundle, as an API and as the commands `verify` and `inspect`."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.cli import run
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import Manifest
from bridge_stg.runtime.bundle.reports import write_report
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.bundle.writer import BundleWriter
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.parity.golden import write_case
from bridge_stg.runtime.parity.verify import DriftError, verify_bundle
from tests.errors import raises
from tests.runtime.backends.lowerings import RUNNABLE, RUNS_STANDARD


@pytest.fixture
def recorded(tmp_path: Path, language_models: dict[str, Any], model_spec: ModelSpec) -> Path:
    """A bundle whose golden case contains the real outputs of its `primitive` graph."""
    inputs = {"input_ids": np.array([[1, 2]]), "cache_position": np.array([0])}
    primitive = language_models["primitive"]
    with OnnxRuntimeSession(primitive.path, primitive.spec, threads=1) as session:
        outputs = session.infer(inputs, cache=session.allocate_cache(batch=1, capacity=4))
    with BundleWriter(tmp_path / "recorded") as writer:
        for graph in language_models.values():
            writer.add_graph(graph.spec, graph.path)
        writer.add_file("tokenizer.json", b"{}")
        write_case(
            writer.folder / "golden" / "one", [("language_model", inputs, outputs)], kind="demo", cache_capacity=4
        )
        writer.finish(Manifest(spec=model_spec, model={"name": "tiny"}))
    return tmp_path / "recorded"


def test_both_variants_are_replayed(recorded: Path) -> None:
    lines: list[str] = []
    replayed = verify_bundle(recorded, threads=1, report=lines.append)
    assert set(replayed) == RUNNABLE
    assert all(boundaries and all(b.passed for b in boundaries) for boundaries in replayed.values())
    assert "MB hashed" in lines[0]
    assert set(verify_bundle(recorded, variant="primitive")) == {"primitive"}


def test_unknown_variant_and_backend(bundle_path: Path) -> None:
    with pytest.raises(EngineError, match="nonsense"):
        verify_bundle(bundle_path, variant="nonsense")
    lines: list[str] = []
    with pytest.raises(EngineError, match="nonsense"):
        verify_bundle(bundle_path, backend="nonsense", report=lines.append)
    assert not any("nonsense" in line for line in lines)  # only the error names it


def test_an_output_that_exceeds_its_tolerance_is_named(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(bundle_path), "--variant", "primitive"]) == 2  # its case expects zeros
    output = capsys.readouterr()
    assert "FAILED" in output.out
    assert "first/language_model_0.logits of variant primitive" in output.err and "[bundle.drift]" in output.err


def test_a_drift_error_survives_pickling(bundle_path: Path) -> None:
    with raises("bundle.drift", kind=DriftError) as caught:
        verify_bundle(bundle_path, variant="primitive")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, DriftError) and (copy.code, str(copy)) == (caught.value.code, str(caught.value))
    assert (copy.variant, copy.graph) == ("primitive", "language_model")


def test_commands(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(recorded)]) == 0
    assert "variant primitive" in capsys.readouterr().out
    assert run(["inspect", str(recorded)]) == 0
    shown = capsys.readouterr().out
    assert Bundle.load(recorded).manifest.fingerprint in shown
    for part in ("language_model / standard", "language_model / primitive", "in  input_ids int64 [B, L]", "B 1–8"):
        assert part in shown


def test_damaged_bundle(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((bundle_path / "manifest.json").read_text())
    data = bundle_path / manifest["graphs"]["language_model"]["standard"]["data"][0]["path"]
    damaged = bytearray(data.read_bytes())
    damaged[0] ^= 1
    data.chmod(0o644)
    data.write_bytes(damaged)
    for command in ("verify", "inspect"):
        assert run([command, str(bundle_path)]) == 2
        output = capsys.readouterr()
        assert output.err.startswith("Error: ") and output.err.count("\n") == 1
        assert data.name in output.err and "[bundle.hash_mismatch]" in output.err and not output.out


def test_a_changed_report_fails(recorded: Path) -> None:
    report = write_report(recorded, "parity", {"worst": 0.5}, "<p>page</p>")
    verify_bundle(recorded, threads=1)
    page = report.with_suffix(".html")
    page.write_bytes(page.read_bytes().replace(b"page", b"pagf"))
    with raises("bundle.hash_mismatch", "parity.html"):
        verify_bundle(recorded, threads=1)


def test_bf16_runs_on_other_devices_only(
    bundle_path: Path, language_models: dict[str, Any], model_spec: ModelSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    with BundleWriter(bundle_path, overwrite=True) as writer:
        for graph in language_models.values():
            writer.add_graph(dataclasses.replace(graph.spec, precision="bf16"), graph.path)
        writer.finish(Manifest(spec=model_spec))
    if RUNS_STANDARD:
        assert run(["verify", str(bundle_path)]) == 0
        output = capsys.readouterr()
        assert not output.err and "variant primitive was not replayed" in output.out
    assert run(["verify", str(bundle_path), "--variant", "primitive"]) == 2
    assert "[engine.no_variant]" in capsys.readouterr().err
