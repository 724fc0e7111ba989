"""Files of the work folder of a calibration: what is damaged is computed again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.scales import compute_scales
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.scoring.speed_gate import Gate
from bridge_stg.calibration.work_folder import read_arrays, read_json


def test_json_of_another_kind_is_none(tmp_path: Path) -> None:
    gate, file = Gate("vision_encoder", 1.0, 0.5, 100, 50), tmp_path / "gates.json"
    values = {"vision_encoder": dataclasses.asdict(gate)}
    file.write_text(json.dumps(values))
    assert read_json(file, Mapping[str, Gate]) == {"vision_encoder": gate}
    wrong: list[Any] = [[1], 3, {"a": 1}, {"a": {}}, {"a": {**values["vision_encoder"], "float_seconds": "x"}}]
    for text in ("", "{", "\0", *map(json.dumps, wrong)):
        file.write_text(text)
        assert read_json(file, Mapping[str, Gate]) is None
    file.unlink()
    assert read_json(file) is None


def test_arrays_that_are_damaged_are_none(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, x=np.arange(100))
    whole = file.read_bytes()
    found = read_arrays(file)
    assert found is not None and found["x"].sum() == 4950
    np.save(tmp_path / "a.npy", np.arange(3))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for damaged in (b"", b"text", whole[:-5], bytes(flipped), (tmp_path / "a.npy").read_bytes()):
        file.write_bytes(damaged)
        assert read_arrays(file) is None
    file.unlink()
    assert read_arrays(file) is None


@pytest.mark.parametrize("name", ["ranges.json", "smoothing.npz"])
def test_damaged_scales_are_computed_again(statistics: Statistics, tmp_path: Path, name: str) -> None:
    first = compute_scales(statistics, [], Recipe("w8a8", {}), folder=tmp_path)
    file = tmp_path / name
    whole = file.read_bytes()
    for damaged in (b"", b"[1]", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        again = compute_scales(statistics, [], Recipe("w8a8", {}), folder=tmp_path)
        assert again.ranges == first.ranges and file.stat().st_size == len(whole)
