"""benchmarks/bench.py: order of the measurements, files written, and grouping of runners by memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pytest
from click import ClickException
from click.testing import CliRunner
from speed.measure import REFERENCE, Results
from speed.results.regression import Ratio, check_demo, ratios_of
from speed.runners import RunnerSpec, disk_to_build, grouped
from speed.workload import bundles
from speed.workload.bundles import Model, code_hash


def spec(name: str, precision: str = "fp32") -> RunnerSpec:
    return RunnerSpec(name, precision, ("true",))


def test_every_group_of_peers_contains_ours() -> None:
    own = [spec("torch_eager"), spec("ours"), spec("ours", "int8")]
    peers = [spec("rival"), spec("other"), spec("rival", "int8"), spec("other", "auto")]
    anchors = {one.precision: one for one in own[1:]}
    assert grouped(own, 10**9, 1e12, {}) == [own]
    together = grouped(peers, 10**9, 1e12, anchors)
    labels = ["ours@rival_fp32", "rival_fp32", "other_fp32", "ours@rival_int8", "rival_int8", "other_auto"]
    assert [[one.label for one in group] for group in together] == [labels]
    # With 1 GB of weights a runner is estimated at 3.8 GB in fp32 and 1.6 GB in int8.
    apart = grouped(peers, 10**9, 1e10, anchors)
    assert [one.label for one in apart[0]] == ["ours@rival_fp32", "rival_fp32"]
    assert [one.label for one in apart[1]] == ["ours@other_fp32", "other_fp32"]
    assert [one.label for one in apart[2]] == ["ours@rival_int8", "rival_int8", "other_auto"]
    assert apart[1][1].compared_with == "ours@other" and apart[2][2].compared_with == "ours"


def test_a_run_begins_with_what_says_most() -> None:
    parts = bench.parts_of(bench.MODELS, (32, 8, 128), growth=True, full=True)
    assert parts[:3] == [
        bench.Part("own", "qwen3_vl_0_5b", 32), bench.Part("peers", "qwen3_vl_0_5b", 32),
        bench.Part("growth", "qwen3_vl_0_5b"),
    ]  # fmt: skip
    assert {(part.model, part.frames) for part in parts if part.kind == "peers"} == {
        (model, frames) for model in bench.MODELS for frames in (8, 32, 128)
    }
    assert len(parts) == len(set(parts)) and parts[-1].kind == "compiled"
    quick = bench.parts_of(("qwen3_vl_0_5b", "demo"), (32,), growth=False, full=False)
    assert {part.kind for part in quick} == {"own", "peers", "cold start"} and len(quick) == 5


@pytest.fixture
def faked(fake_runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace everything in the command except runners, turns and the result."""

    class Toy(Model):
        spec = None  # type: ignore[assignment]

    def own(precisions: tuple[str, ...], engines: tuple[str, ...]) -> list[RunnerSpec]:
        command = (sys.executable, str(fake_runner), "good", str(tmp_path / "log"))
        kinds = (("torch_eager", "fp32"), ("ours", "fp32"), ("ours", "int8"))
        return [RunnerSpec(name, precision, command) for name, precision in kinds]

    def prepared(name: str, folder: Path, precisions: Any, given: Any, *, fresh: bool) -> Model:
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


def test_the_command_measures_and_prints_ratios(faked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(bench, "code_hash", lambda folders: "of other code")
    done = CliRunner().invoke(bench.main, [*arguments, "--minutes", "1e-9"], catch_exceptions=False)
    assert "the code has changed" in done.output
    assert (faked / "log").read_text().count("load") == 6  # nothing was begun
    assert "qwen3_vl_0_5b/ours_int8, 32 frames: all rows: the run's time ended before its turn" in done.output


def test_runners_without_room_are_left_out(faked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "weight_bytes", lambda model: 10**13)
    arguments = ["--model", "qwen3_vl_0_5b", "--folder", str(faked / "work")]
    done = CliRunner().invoke(bench.main, arguments, catch_exceptions=False)
    assert "qwen3_vl_0_5b/ours_int8: takes about 9001 GB" in done.output and not (faked / "log").exists()
    rival = spec("rival", "int8")
    assert disk_to_build(rival, 10**9, faked) == pytest.approx(6.6e9)
    (faked / "rival-int8").mkdir()
    assert disk_to_build(rival, 10**9, faked) == 0


def test_bundles_of_other_code_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(precision: str, checkpoint: Path, folders: dict[str, Path], work: Path) -> None:
        made.append(precision)
        folders[precision].mkdir(parents=True, exist_ok=True)
        (folders[precision] / "manifest.json").touch()

    monkeypatch.setattr(bundles, "make", make)
    monkeypatch.setattr(bundles, "code_hash", lambda folders: f"{code} of {len(folders)}")
    code = "first"
    for expected, fresh in ((["fp32", "int8"], False), ([], False), (["fp32", "int8"], True)):
        bundles.prepare("demo", tmp_path, ("fp32", "int8"), fresh=fresh)
        assert made == expected
        made.clear()
    code = "second"
    bundles.prepare("demo", tmp_path, ("fp32", "int8"), {"fp32": tmp_path / "demo" / "fp32"})
    assert made == ["int8"]  # a given bundle is used as it is
    (tmp_path / "a.py").write_text("1")
    before = code_hash([str(tmp_path)])
    (tmp_path / "a.py").write_text("2")
    assert code_hash([str(tmp_path)]) != before


def test_a_ratio_that_is_worse_than_noise_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speed.results import regression

    quiet, noisy = [0.50, 0.51, 0.49, 0.50, 0.50], [0.4, 0.6, 0.5, 0.45, 0.55]
    assert Ratio.of(quiet) == Ratio(0.5, 0.0) and Ratio.of(noisy).noise > 0.1
    measurements = [{"a": quiet, "b": noisy}]
    monkeypatch.setattr(regression, "measured", lambda *options: measurements.pop(0))

    def check(*now: dict[str, list[float]], update: bool = False) -> int:
        measurements[:] = now
        return check_demo(None, rounds=5, threads=2, update=update, record=tmp_path / "r.json")  # type: ignore[arg-type]

    assert check() == 2  # no record of this CPU
    assert check({"a": quiet, "b": noisy}, update=True) == 0
    slower = {"a": [1.2 * value for value in quiet], "b": [1.2 * value for value in noisy]}
    assert check({"a": quiet, "b": noisy}) == 0
    assert check(slower, slower) == 1
    assert check(slower, {"a": quiet, "b": noisy}) == 0  # not confirmed by the second measurement
    assert check({"a": quiet, "b": slower["b"], "new": quiet}) == 0  # within the noise of b


def test_the_ratios_of_the_check_pair_the_rounds() -> None:
    stages = ("vision", "prefill", "decode", "bridge", "spatial", "end_to_end")
    seconds = {REFERENCE: [4.0, 8.0], "ours_fp32": [2.0, 2.0], "ours_int8": [1.0, 0.5]}
    results = Results(Path("none.json"))
    for label, taken in seconds.items():
        results.rows[f"demo/32/{label}"] = {row: {"seconds": taken} for row in (*stages, "queries_1", "queries_8")}
    found = ratios_of(results, "demo")
    assert found["decode: fp32 over torch"] == [0.5, 0.25] and found["decode: int8 over fp32"] == [0.5, 0.25]
    assert found["8 queries over 1"] == [1.0, 1.0] and len(found) == 13
    results.rows["demo/32/ours_int8"]["decode"]["error"] = "it broke"
    with pytest.raises(ClickException, match="ours_int8, decode: it broke"):
        ratios_of(results, "demo")
