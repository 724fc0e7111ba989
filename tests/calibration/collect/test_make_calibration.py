"""The demo's calibration samples: of every kind, readable, and without any held-out clip."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bridge_stg.calibration.collect.samples import overlap, read_samples
from bridge_stg.demo.held_out import HELD_OUT_SEED, clip_path, held_out_clips

DEMO = Path(__file__).parents[3] / "assets" / "demo"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEMO))
    for name, kinds in (("CALIBRATION", {"named": 2, "motion": 1, "absent": 1}), ("SELECT", {"named": 2, "absent": 1})):
        monkeypatch.setattr(f"make_calibration.{name}", kinds)
    monkeypatch.setattr("make_calibration.IMAGES", 1)
    monkeypatch.setattr("make_calibration.TRACKS", 1)
    return importlib.import_module("make_calibration")


def test_samples(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_calibration.py", str(tmp_path)])
    script.main()
    calibration, select = (read_samples(tmp_path / f"{name}.jsonl") for name in ("calibration", "select"))
    assert len(calibration.entries) == 6 and len(select.entries) == 3
    assert calibration.labelled and select.labelled
    assert {"image", "track"} < set(calibration.kinds) and len(calibration.kinds) >= 3
    lines = [json.loads(line) for line in (tmp_path / "calibration.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(line.get("span", ()) is None for line in lines) == 1

    held_out = tmp_path / "held_out.jsonl"
    clips = [clip_path(clip, tmp_path / "held_out") for clip in held_out_clips(2)]
    rows = [{"id": f"h{place}", "video": str(clip), "query": "a", "span": None} for place, clip in enumerate(clips)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = read_samples(held_out)
    assert not overlap(calibration.entries, select.entries)
    assert not overlap(calibration.entries, evaluation.entries) and not overlap(select.entries, evaluation.entries)


def test_seeds_are_those_of_nothing_else(script: ModuleType) -> None:
    seeds = [script.CALIBRATION_SEED, script.SELECT_SEED, script.IMAGE_SEED, script.TRACK_SEED]
    assert len(set(seeds)) == 4 and not set(seeds) & {HELD_OUT_SEED + place for place in range(5)}
