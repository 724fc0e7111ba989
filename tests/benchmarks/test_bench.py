"""benchmarks/bench.py: order of the measurements, files written, and grouping of runners by memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pytest
from click.testing import CliRunner
from speed.measure import REFERENCE
from speed.runners import RunnerSpec
from speed.workload.bundles import Model


def spec(name: str, precision: str = "fp32") -> RunnerSpec:
    return RunnerSpec(name, precision, ("true",))


def test_every_group_of_runners_contains_ours() -> None:
    own = [spec("torch_eager"), spec("ours"), spec("ours", "int8")]
    peers = [spec("rival"), spec("rival", "int8"), spec("rival", "int4")]
    assert bench.grouped([*own, *peers], 10**9, 1e12) == [[*own, *peers]]
    # With 1 GB of weights a runner is estimated at 3.6 GB in fp32, 2.4 GB in int8 and 2.2 GB in int4.
    first, second, third = bench.grouped([*own, *peers], 10**9, 1e10)
    assert [one.label for one in first] == ["torch_eager_fp32", "ours_fp32", "ours_int8"]
    assert [one.label for one in second] == ["ours@2_fp32", "rival_fp32"]
    assert [one.label for one in third] == ["ours@3_int8", "rival_int8", "rival_int4"]
    assert second[1].compared_with == "ours@2" and third[1].compared_with == "ours@3" and own[1].compared_with == "ours"


def test_how_many_turns_and_frames() -> None:
    assert bench.frames_of("qwen3_vl_2b", (32, 8, 128)) == (32, 8)
    assert bench.rounds_of(3, 32) == 3 and bench.rounds_of(3, 128) == 1
    names = [
        one.name for one in bench.affordable([spec("ours"), spec("torch_compile"), spec("torch_eager")], "x", False)
    ]
    assert names == ["torch_eager", "ours"]


@pytest.fixture
def faked(fake_runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace everything in the command except runners, turns and the result."""

    class Toy(Model):
        spec = None  # type: ignore[assignment]

    def own(precisions: tuple[str, ...], engines: tuple[str, ...]) -> list[RunnerSpec]:
        command = (sys.executable, str(fake_runner), "good", str(tmp_path / "log"))
        kinds = (("torch_eager", "fp32"), ("ours", "fp32"), ("ours", "int8"))
        return [RunnerSpec(name, precision, command) for name, precision in kinds]

    def prepared(name: str, folder: Path, precisions: Any, given: Any) -> Model:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return Toy(name, tmp_path, {"fp32": tmp_path}, folder / name)

    text = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 100,
    }  # fmt: skip
    sizes = {"groups": 5, "rows": 4, "columns": 6, "length": 4}
    gemm = {name: {"flops": 1e9, "shape": []} for name in ("onnxruntime_fp32", "torch_fp32", "onnxruntime_int8")}
    np.savez(tmp_path / "decode.npz", step_ids=np.arange(1, 5))
    monkeypatch.setattr(bench, "prepare", prepared)
    monkeypatch.setattr(bench, "own_runners", own)
    monkeypatch.setattr(bench, "make_inputs", lambda *arguments: tmp_path)
    monkeypatch.setattr(bench, "facts", lambda *arguments: {"text_config": text, "vision_config": {}, "sizes": sizes})
    monkeypatch.setattr(
        bench, "limits_of_now", lambda results, *rest: results.limits.append({"bandwidth": 1e9, "gemm": gemm})
    )
    return tmp_path


def test_the_command_measures_and_prints_ratios(faked: Path) -> None:
    arguments = [
        "--model",
        "qwen3_vl_0_5b",
        "--folder",
        str(faked / "work"),
        "--rounds",
        "1",
        "--peers",
        "no_such_peer",
    ]
    done = CliRunner().invoke(bench.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "decode_int8_of_bandwidth" in done.output and "not measured: no_such_peer: unknown peer" in done.output
    result = json.loads((faked / "work" / "quick.json").read_text())
    assert {row["runner"] for row in result["rows"]} == {"torch_eager", "ours"} and result["machine"]["cpu"]
    assert 0 < result["ratios"]["decode_int8_of_bandwidth"] < 1
    assert result["ratios"]["fp32_vs_best_peer"] == result["ratios"]["torch_eager"] > 0
    assert result["ratios"]["end_to_end_int8_vs_torch_fp32"] is None and len(result["limits"]["samples"]) == 2
    before = (faked / "log").read_text()
    CliRunner().invoke(bench.main, arguments, catch_exceptions=False)
    assert (faked / "log").read_text() == before  # resumed after the last measurement
    CliRunner().invoke(bench.main, [*arguments, "--again"], catch_exceptions=False)
    assert (faked / "log").read_text().count("load") == 2 * before.count("load") == 6
    state = json.loads((faked / "work" / "quick_state.json").read_text())
    assert f"qwen3_vl_0_5b/32/{REFERENCE}" in state["rows"]
