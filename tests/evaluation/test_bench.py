"""The command `bench`: its figures, its table, and rendered videos of the wanted length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge_stg import cli
from bridge_stg.evaluation.bench import bench
from bridge_stg.evaluation.stage_times import StageTimes
from bridge_stg.runtime.grounder import Grounder
from tests.bridge_stg.commands.fake_grounder import complaint
from tests.evaluation.official import video
from tests.evaluation.validation import validate
from tests.fakes.chain import fake_grounder


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Grounder, "load", lambda path, **options: fake_grounder())
    return Path("bundle")


def test_the_figures_of_rendered_videos(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    command = ["bench", str(bundle), "--frames", "4,8", "--rounds", "3", "--json", str(out)]
    assert cli.run(command) == 0
    values = json.loads(out.read_text(encoding="utf-8"))
    validate(values, "bench")
    assert [row["coarse_frames"] for row in values["rows"]] == [4, 8]
    assert 0 < values["load_s"] < values["first_answer_s"] and values["source"] == "rendered frames"
    for row in values["rows"]:
        assert {"decode_video", "vision_coarse", "prefill", "answer", "spatial", "total"} <= set(row["stages"])
        assert all(0 <= stage["median_s"] <= stage["p95_s"] for stage in row["stages"].values())
        assert set(row["tokens_per_s"]) == {"vision_coarse", "prefill", "answer"} and row["tokens"]["answer"] > 0
    shown = capsys.readouterr().out
    assert "8 coarse frames" in shown and "peak memory" in shown and "median" in shown


def test_a_video_of_the_user(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mp4"
    video(path, 3, 8)
    calls: list[int] = []
    values = bench(bundle, video=str(path), rounds=1, progress=lambda stage, done, total: calls.append(done))
    assert values["source"] == str(path) and len(values["rows"]) == 1 and calls == [0, 1, 2]
    for arguments, code in (
        (["--video", path, "--frames", "8"], "options.conflict"),
        (["--frames", "8,0"], "options.invalid"),
        (["--frames", "8,100000"], "options.out_of_range"),
        (["--query", ""], "query.empty"),
        (["--video", tmp_path / "none.mp4"], "video.not_found"),
    ):
        complaint(["bench", bundle, *arguments, "--json", tmp_path / "b.json"], capsys, code=code)
    assert not (tmp_path / "b.json").exists()


def test_percentiles_are_of_each_stage() -> None:
    times = StageTimes()
    for seconds in (1.0, 2.0, 4.0):
        times.add({"answer": seconds, "total": 10 * seconds})
    times.add({"total": 30.0})
    assert times.percentile(50) == {"answer": 2.0, "total": 25.0}
    assert times.percentile(100) == {"answer": 4.0, "total": 40.0}
