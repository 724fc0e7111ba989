"""The command `watch`: events as text and JSON lines, and an orderly end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg import cli
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.grounder import Grounder
from tests.evaluation.validation import validate
from tests.fakes.clips import write
from tests.fakes.live_chain import live_grounder


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grounder, "load", lambda path, **options: live_grounder())


def clip(path: Path, seconds: int = 20) -> str:
    """Write a video that is white from second 4 to 8."""
    frames = [np.full((48, 64, 3), 255 if 40 <= i < 80 else 0, np.uint8) for i in range(seconds * 10)]
    return write(path, frames, rate=10)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def watch(*arguments: object) -> int:
    return cli.run(["watch", *map(str, arguments), "--bundle", "bundle", "--window", "8"])


def test_prints_events_and_writes_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "events.jsonl"
    assert watch(clip(tmp_path / "a.mp4"), "the car", "--json", out) == 0
    shown = capsys.readouterr()
    appeared, left = shown.out.splitlines()
    wall, _, rest = appeared.partition("  ")
    assert abs((datetime.now() - datetime.fromisoformat(wall)).total_seconds()) < 60
    assert rest.startswith("00:00:04.00  appeared  the car  [")
    assert left.partition("  ")[2].startswith("00:00:08.00  left      the car  [")
    assert "200 frames, 20 rounds; ended: source" in shown.err and "rebuilds" in shown.err
    start, appeared, left, end = lines(out)
    walls = [datetime.fromisoformat(line["wall_time"]) for line in (start, appeared, left, end)]
    assert abs((datetime.now(timezone.utc) - walls[0]).total_seconds()) < 60 and walls[1] <= walls[2] <= walls[3]
    assert (start["event"], start["queries"]) == ("start", ["the car"]) and start["source"].endswith("a.mp4")
    assert start["options"]["every_s"] == 1
    assert (appeared["event"], appeared["time_s"], left["event"], left["time_s"]) == ("appeared", 4, "left", 8)
    assert appeared["tube"][0]["time_s"] == 4 and len(appeared["box"]) == 4
    assert end["event"] == "end" and end["groups"] == 20 and end["dropped_groups"] == 0
    assert 0 < end["latency_median_s"] <= end["latency_p95_s"] < 10


def test_lines_are_appended_after_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, source = tmp_path / "events.jsonl", clip(tmp_path / "a.mp4", 4)
    for _ in range(2):
        assert watch(source, "the car", "--jsonl", out) == 0
    assert [line["event"] for line in lines(out)] == ["start", "end"] * 2
    whole = out.read_bytes()
    out.write_bytes(whole[:-9])  # as if the process had been killed while it wrote
    assert watch(source, "the car", "--jsonl", out) == 0
    assert "events.jsonl" in capsys.readouterr().err
    assert [line["event"] for line in lines(out)] == ["start", "end", "start", "start", "end"]
    out.write_bytes(whole[:-1])
    assert watch(source, "the car", "--jsonl", out) == 0
    assert [line["event"] for line in lines(out)] == ["start", "end"] * 3
    with open(out, encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert watch(source, "the car", "--jsonl", out) == 2
    assert capsys.readouterr().err.endswith(" [output.in_use]\n")
    assert watch(source, "the car", "--jsonl", out, "--overwrite") == 0
    assert [line["event"] for line in lines(out)] == ["start", "end"]


def test_rounds_within_a_group_are_explained_and_not_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = clip(tmp_path / "a.mp4"), tmp_path / "events.jsonl"
    assert watch(source, "the car", "--every", 0.2, "--jsonl", out) == 0
    end = lines(out)[-1]
    assert (end["answers"], end["skipped_answers"], end["round_s"]) == (20, 0, 1)
    assert "--every 0.2" in capsys.readouterr().err
    assert watch(source, "the car", "--every", 1) == 0
    assert "--every" not in capsys.readouterr().err


def test_answers_are_written_on_request(tmp_path: Path) -> None:
    out = tmp_path / "events.jsonl"
    assert watch(clip(tmp_path / "a.mp4"), "the car", "the dog", "--json", out, "--answers", "--duration", 6) == 0
    for line in lines(out):
        validate(line, "watch_line")
    answers = [line for line in lines(out) if line["event"] == "answers"]
    assert [line["known_s"] for line in answers] == [1, 2, 3, 4, 5, 6]
    assert [grounding["query"] for grounding in answers[0]["groundings"]] == ["the car", "the dog"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, source = tmp_path / "events.jsonl", clip(tmp_path / "a.mp4", 60)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    began, threads = time.monotonic(), threading.active_count()
    timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
    timer.start()
    assert watch(source, "the car", "--realtime", "--json", out) == 0
    assert 1 < time.monotonic() - began < 20
    timer.join()
    assert lines(out)[-1]["event"] == "end" and lines(out)[-1]["ended"] == "stopped"
    assert "ended: stopped" in capsys.readouterr().err
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert threading.active_count() == threads


def test_faults_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = clip(tmp_path / "a.mp4", 4), tmp_path / "events.jsonl"
    out.write_text("what was there\n", encoding="utf-8")
    for arguments, code, value in (
        ([tmp_path / "none.mp4", "the car"], "video.not_found", "none.mp4"),
        (["/dev/video97", "the car"], "live.no_camera", "/dev/video97"),
        ([source], "options.missing", "QUERY"),
        ([source, " "], "query.empty", ""),
        ([source, "the car", "the car"], "query.duplicate", ""),
        ([source, "the car", "--every", "0"], "options.invalid", "--every"),
        ([source, "the car", "--json", out], "output.exists", out),
        ([source, "the car", "--jsonl", out], "output.exists", out),
        ([source, "the car", "--json", source, "--overwrite"], "output.is_input", source),
        ([source, "the car", "--json", tmp_path / "none" / "a.jsonl"], "output.no_folder", "a.jsonl"),
        ([source, "the car", "--answers"], "options.conflict", "--json"),
    ):
        assert watch(*arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.endswith(f" [{code}]\n") and str(value) in shown.err, shown.err
        assert "Traceback" not in shown.err
        if "--json" in arguments or "--jsonl" in arguments:
            assert json.loads(shown.out)["error"]["code"] == code
        else:
            assert not shown.out
    assert out.read_text(encoding="utf-8") == "what was there\n"


def test_an_error_while_it_runs_comes_after_the_events(tmp_path: Path) -> None:
    out, source = tmp_path / "events.jsonl", tmp_path / "a.txt"
    source.write_text("no video\n" * 1000, encoding="utf-8")
    assert watch(source, "the car", "--json", out) == 2
    assert [line.get("ended") for line in lines(out)] == [None, "error"]


def test_the_model_is_warm_before_the_watch_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(grounder: Grounder) -> None:
        raise EngineError("engine.failed", "the encoder does not run")

    monkeypatch.setattr(Grounder, "warm_up", fail)
    out = tmp_path / "events.jsonl"
    assert watch(clip(tmp_path / "a.mp4", 4), "the car", "--jsonl", out) == 2
    assert not out.exists()
