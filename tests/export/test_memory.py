"""An export reports its estimate before it starts, and does not start without the memory and disk for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from bridge_stg.export import memory
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.export.memory import Estimate, estimate, require_room
from bridge_stg.export.tracing.precision import PRECISIONS
from bridge_stg.export.tracing.skeleton import open_skeleton
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises

NEEDED = Estimate(weights=4 * 10**9, disk=5 * 10**9, export=2 * 10**9, replay=8 * 10**9, lean_replay=5 * 10**9)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_estimates_follow_the_checkpoint(checkpoint: Path) -> None:
    model, store = open_skeleton(checkpoint)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    by_dtype = {name: estimate(store, model.spec, precision, verify=True) for name, precision in PRECISIONS.items()}
    assert {name: found.weights for name, found in by_dtype.items()} == {
        "fp32": 4 * parameters, "fp16": 2 * parameters, "bf16": 2 * parameters,
    }  # fmt: skip
    for found in by_dtype.values():
        assert found.disk > found.weights and found.replay > found.weights
    unverified = estimate(store, model.spec, PRECISIONS["fp16"], verify=False)
    assert unverified.replay == 0 and unverified.disk < by_dtype["fp16"].disk
    assert "for the replay" in str(by_dtype["fp16"]) and "for the replay" not in str(unverified)


@pytest.mark.slow
def test_the_estimate_is_not_below_what_it_took(exported: Bundle) -> None:
    report = read_report(exported.path, "export")
    assert report["estimate"]["weights"] >= 0.95 * report["weight_bytes"]
    written = sum(file.stat().st_size for file in exported.path.rglob("*") if file.is_file())
    assert report["estimate"]["disk"] >= written
    assert report["estimate"]["replay"] >= report["replay_peak_rss_bytes"]


@pytest.mark.parametrize(
    ("free", "left", "code", "values"),
    [
        (4 * 10**9, None, "output.disk_full", ("5.0 GB", "4.0 GB")),
        (10**10, 10**9, "export.out_of_memory", ("2.0 GB", "1.0 GB")),
        (10**10, 6 * 10**9, "export.out_of_memory", ("5.0 GB", "6.0 GB", "--no-verify")),
    ],
)
def test_too_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, free: int, left: int | None, code: str, values: tuple[str, ...]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * free, free, free))
    monkeypatch.setattr(memory, "available_bytes", lambda: left)
    with raises(code, *values):
        require_room(NEEDED, tmp_path / "far" / "bundle")


@pytest.mark.parametrize(("left", "low_memory"), [(11 * 10**9, False), (8 * 10**9, True), (None, False)])
def test_the_replay_saves_memory_where_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int | None, low_memory: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * 10**10, 10**10, 10**10))
    monkeypatch.setattr(memory, "available_bytes", lambda: left)
    assert require_room(NEEDED, tmp_path / "far" / "bundle") is low_memory


def test_too_little_memory_for_an_export(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    stages: list[str] = []
    with raises("export.out_of_memory", "1 MB", kind=EngineError):
        export_bundle(checkpoint, tmp_path / "bundle", progress=stages.append)
    assert not any(stage.startswith("tracing") for stage in stages) and list(tmp_path.iterdir()) == []
