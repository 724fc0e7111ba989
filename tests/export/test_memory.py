"""What an export will need is told before it starts, and an export that cannot be made is not begun."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from bridge_stg.export import memory
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.export.memory import Estimate, available_bytes, estimate, gigabytes, require_room
from bridge_stg.export.tracing.precision import PRECISIONS
from bridge_stg.export.tracing.skeleton import open_skeleton
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.memory import peak_bytes

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
    ("free", "left", "message"),
    [
        (4 * 10**9, None, r"needs 5\.0 GB of disk there, and 4\.0 GB are free; make room"),
        (10**10, 10**9, r"needs about 2\.0 GB of memory, and 1\.0 GB are available"),
        (10**10, 6 * 10**9, r"beside it 5\.0 GB, but 6\.0 GB are available.*--no-verify"),
        (10**10, 11 * 10**9, False),
        (10**10, 8 * 10**9, True),
        (10**10, None, False),
    ],
)
def test_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, left: int | None, message: str | bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * free, free, free))
    monkeypatch.setattr(memory, "available_bytes", lambda: left)
    if isinstance(message, bool):  # whether the replay must be lean
        assert require_room(NEEDED, tmp_path / "far" / "bundle") is message
        return
    with pytest.raises(EngineError, match=message):
        require_room(NEEDED, tmp_path / "far" / "bundle")


def test_an_export_without_room_is_not_begun(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    stages: list[str] = []
    with pytest.raises(EngineError, match="1 MB are available"):
        export_bundle(checkpoint, tmp_path / "bundle", progress=stages.append)
    assert not any(stage.startswith("tracing") for stage in stages) and list(tmp_path.iterdir()) == []


def test_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert available_bytes() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() != 3000


def test_sizes_for_people() -> None:
    assert gigabytes(4.26e9) == "4.3 GB" and gigabytes(2**20) == "1 MB"
    assert peak_bytes() > 10**7
