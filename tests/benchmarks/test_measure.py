"""The orchestrator with fake runners: turns, saved results, and every way a runner can fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from speed.measure import REFERENCE, Results, measure
from speed.runners import RunnerError, RunnerSpec, peer_runners, start

MODEL: Mapping[str, object] = {"name": "toy", "checkpoint": "nowhere", "folder": "nowhere", "bundles": {}}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    folder.mkdir()
    np.savez(folder / "decode.npz", prefix_ids=np.zeros((1, 3), np.int64), step_ids=np.arange(1, 5))
    return folder


def spec(program: Path, name: str, kind: str, log: Path) -> RunnerSpec:
    return RunnerSpec(name, "fp32", (sys.executable, str(program), kind, str(log)))


def run(specs: list[RunnerSpec], inputs: Path, tmp_path: Path, *, rounds: int = 2, timeout_s: float = 20) -> Results:
    results = Results(tmp_path / "state.json")
    measure(
        MODEL, specs, {8: inputs}, results, rounds={8: rounds}, threads=1, work=tmp_path / "work", timeout_s=timeout_s
    )
    return results


def test_runners_take_turns_and_their_outputs_are_compared(fake_runner: Path, inputs: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    specs = [spec(fake_runner, "torch_eager", "good", log), spec(fake_runner, "other", "slow", log)]
    results = run(specs, inputs, tmp_path)
    lines = log.read_text().split("\n")[:-1]
    assert lines[:2] == ["load good", "load slow"]
    turns = [kind for kind, before in zip(lines[2:], lines[1:]) if kind != before]
    assert turns == ["run good", "run slow"] * 3  # a warm-up and two rounds
    reference = results.rows[f"toy/8/{REFERENCE}"]["decode"]
    other = results.rows["toy/8/other_fp32"]["decode"]
    assert len(reference["seconds"]) == len(other["seconds"]) == 2 and other["tokens"] == 4
    assert all(seconds >= 0.02 for seconds in other["seconds"]) and min(reference["seconds"]) < 0.02
    assert other["peak_bytes"] > 1e6 and len(other["cpu_seconds"]) == 2
    assert reference["parity"] == {"cosine": 1.0, "worst_cosine": 1.0, "same_choice": 1.0}
    assert 0.9 < other["parity"]["worst_cosine"] < 1.0
    assert json.loads((tmp_path / "state.json").read_text())["rows"]["toy/8/other_fp32"]["decode"] == other


def test_an_interrupted_run_resumes(fake_runner: Path, inputs: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = spec(fake_runner, "torch_eager", "good", log)
    run([first], inputs, tmp_path)
    held = Results(tmp_path / "state.json").rows[f"toy/8/{REFERENCE}"]["decode"]["seconds"]
    before = log.read_text()
    run([first], inputs, tmp_path)
    assert log.read_text() == before  # no measurements left, so no runner was started
    results = run([first, spec(fake_runner, "other", "good", log)], inputs, tmp_path)
    assert results.rows[f"toy/8/{REFERENCE}"]["decode"]["seconds"] == held
    assert results.rows["toy/8/other_fp32"]["decode"]["parity"]["cosine"] == 1.0
    results.forget(["toy"], [8], growth=False)
    assert Results(tmp_path / "state.json").rows == {}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raises", "ValueError: no such operator"),
        ("dies", "exit status 3; Segmentation of some kind"),
        ("hangs", "did not answer decode in 2 s"),
    ],
)
def test_a_failed_runner_is_recorded_and_the_others_continue(
    kind: str, said: str, fake_runner: Path, inputs: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    specs = [spec(fake_runner, "torch_eager", "good", log), spec(fake_runner, "broken", kind, log)]
    results = run(specs, inputs, tmp_path, timeout_s=2 if kind == "hangs" else 20)
    assert said in results.rows["toy/8/broken_fp32"]["decode"]["error"]
    assert len(results.rows[f"toy/8/{REFERENCE}"]["decode"]["seconds"]) == 2


def test_a_runner_that_cannot_load_or_start_is_recorded(fake_runner: Path, inputs: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    specs = [
        spec(fake_runner, "torch_eager", "good", log),
        spec(fake_runner, "rejects", "rejects", log),
        RunnerSpec("gone", "int8", (str(tmp_path / "no_such_program"),)),
        RunnerSpec("talks", "int8", (sys.executable, "-c", "print('hello'); input()")),
    ]
    results = run(specs, inputs, tmp_path)
    assert results.runners["toy/rejects_fp32"] == {"error": "PeerError: this model is not supported"}
    assert "does not start" in results.runners["toy/gone_int8"]["error"]
    assert "invalid JSON: 'hello" in results.runners["toy/talks_int8"]["error"]
    assert len(results.rows[f"toy/8/{REFERENCE}"]["decode"]["seconds"]) == 2


def test_a_row_that_a_runner_lacks_is_an_error_of_that_row(fake_runner: Path, inputs: Path, tmp_path: Path) -> None:
    runner = start(spec(fake_runner, "one", "good", tmp_path / "log"), MODEL, threads=1, log=tmp_path / "stderr")
    try:
        request = {"do": "run", "row": "vision", "inputs": str(inputs / "decode.npz"), "repeat": 1, "outputs": None}
        with pytest.raises(RunnerError, match=r"'vision'.*decode"):
            runner.ask(request, timeout_s=10)
        assert runner.ask({**request, "row": "decode"}, timeout_s=10)["tokens"] == 4
    finally:
        runner.end()
    assert "a library prints this" in (tmp_path / "stderr").read_text()


def test_an_unknown_peer_is_only_reported() -> None:
    specs, missing = peer_runners(["no_such_runtime"], ("fp32",))
    assert specs == [] and "no_such_runtime" in missing["no_such_runtime"]
