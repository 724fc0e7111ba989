"""Every task is run; results survive a kill, never mix, and give the same table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.evaluation.datasets.got10k import write_results
from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.evaluation.report.report import report_values, write_report
from bridge_stg.evaluation.run.evaluate import evaluate
from bridge_stg.evaluation.run.results import ResultFile
from bridge_stg.evaluation.samples import Dataset
from tests.errors import raises
from tests.evaluation import official
from tests.evaluation.fake_models import Oracle, model
from tests.evaluation.official import ALL

ROOT = Path(__file__).resolve().parents[3]


def read(name: str, root: Path) -> Dataset:
    files = ALL[name](root)
    return read_dataset(files.name, files.annotations, files.media, split=files.split)


def sentences(root: Path, count: int) -> Dataset:
    """Charades-STA with so many lines about one video."""
    (root / "A.mp4").touch()
    path = root / "many.txt"
    path.write_text("".join(f"A {i % 5}.0 {i % 5 + 2}.0##sentence number {i}.\n" for i in range(count)))
    return read_dataset("charades-sta", (path,))


PERFECT = {
    "vidstg": {"tube": {"m_tIoU": 1, "m_vIoU": 1, "vIoU@0.5": 1}, "tube / declarative": {"samples": 2}},
    "hc-stvg-v1": {"tube": {"m_tIoU": 1, "m_vIoU": 1, "failed": 0}},
    "hc-stvg-v2": {"tube": {"m_tIoU": 1, "m_vIoU": 1}},
    "charades-sta": {"span": {"samples": 2, "R1@0.7": 1, "mIoU": 1}},
    "refcoco": {"image": {"samples": 2, "Acc@0.5": 1}},
    "got-10k": {"track": {"samples": 1, "AO": 1, "SR@0.75": 1}},
    "jsonl": {
        "tube": {"samples": 2, "m_vIoU": 1, "AUROC": 1, "absent recognized": 1},
        "span": {"mIoU": 1},
        "span / events": {"mIoU": 1},
        "image": {"Acc@0.5": 1},
        "track": {"AO": 1},
    },
}


@pytest.mark.parametrize("name", ALL)
def test_the_truth_has_the_best_scores(tmp_path: Path, name: str) -> None:
    dataset = read(name, tmp_path)
    oracle = Oracle(dataset)
    found = evaluate(dataset, [model(oracle)], tmp_path / "out").metrics["oracle"]
    for part, metrics in PERFECT[name].items():
        assert {metric: found[part][metric] for metric in metrics} == pytest.approx(metrics)
    assert {task for task, _ in oracle.calls} == {sample.task for sample in dataset.samples}


def test_wrong_answers_have_worse_scores(tmp_path: Path) -> None:
    dataset = read("jsonl", tmp_path)
    found = evaluate(dataset, [model(Oracle(dataset, shift=8, delay=1))], tmp_path / "out").metrics["oracle"]
    assert 0 < found["tube"]["m_vIoU"] < found["tube"]["m_tIoU"] < 1
    assert 0 < found["span"]["mIoU"] < 1 and 0 < found["track"]["AO"] < 0.5 and found["image"]["Acc@0.5"] == 0


def test_missing_media_are_listed_and_omitted(tmp_path: Path) -> None:
    dataset = read("charades-sta", tmp_path)
    evaluation = evaluate(dataset, [model(Oracle(dataset))], tmp_path / "out")
    values = report_values(evaluation)
    assert values["missing"] == ["3MSZA.mp4"] and values["missing_samples"] == 1 and values["samples"] == 3
    assert evaluation.metrics["oracle"]["span"]["samples"] == 2
    for file in tmp_path.rglob("*.mp4"):
        file.unlink()
    dataset = read_dataset("charades-sta", (tmp_path / "charades_sta_test.txt",))
    with raises("evaluation.no_media", "3", "charades-sta", "'AO8RW.mp4'"):
        evaluate(dataset, [], tmp_path / "out")


def test_failures_are_recorded_and_count(tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 4)
    oracle = Oracle(dataset, failing=["sentence number 2."])
    evaluation = evaluate(dataset, [model(oracle)], tmp_path / "out")
    assert evaluation.metrics["oracle"]["span"] == pytest.approx(
        {"samples": 4, "failed": 1, "R1@0.3": 0.75, "R1@0.5": 0.75, "R1@0.7": 0.75, "mIoU": 0.75}
    )
    assert evaluation.rows["oracle"]["3"]["error"] == "RuntimeError: cannot see sentence number 2."
    assert report_values(evaluation)["failed"]["oracle"][0]["id"] == "3"
    evaluate(dataset, [model(oracle)], tmp_path / "out")
    assert len(oracle.calls) == 4  # a failure is a finished sample
    oracle.failing = set()
    again = evaluate(dataset, [model(oracle)], tmp_path / "out", retry_failed=True)
    assert len(oracle.calls) == 5 and again.metrics["oracle"]["span"]["failed"] == 0
    assert evaluate(dataset, [model(oracle)], tmp_path / "out").metrics == again.metrics


def test_numbers_that_are_not_finite_are_a_failure(tmp_path: Path) -> None:
    """A bundle in low precision may overflow: neither the run nor the metrics may break on it."""
    dataset = read("hc-stvg-v1", tmp_path)
    evaluation = evaluate(dataset, [model(Oracle(dataset, shift=float("nan")))], tmp_path / "out")
    assert evaluation.metrics["oracle"]["tube"] == pytest.approx(
        {"samples": 1, "failed": 1, "m_tIoU": 0, "m_vIoU": 0, "vIoU@0.3": 0, "vIoU@0.5": 0}
    )
    (row,) = evaluation.rows["oracle"].values()
    assert row["error"] == "EngineError: the answer has numbers that are not finite"


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 2)
    (tmp_path / "out").mkdir()
    evaluation = evaluate(dataset, [model(Oracle(dataset))], tmp_path / "out", shard=(3, 3))
    values = write_report(evaluation, tmp_path / "out")
    assert values["finished"] == {"oracle": 0} and values["figures"] == {"oracle": {}}
    assert values["models"] == {"oracle": {"fingerprint": "oracle"}}


def test_a_missing_package_stops_the_run(tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 2)

    class Lacking:
        def span(self, *arguments: Any, **options: Any) -> Any:
            raise ModuleNotFoundError("No module named 'av'", name="av")

    with pytest.raises(ModuleNotFoundError):
        evaluate(dataset, [model(Lacking())], tmp_path / "out")


def test_broken_truth_stops_the_run(tmp_path: Path) -> None:
    files = official.vidstg(tmp_path)
    dataset = read_dataset("vidstg", files.annotations, files.media)
    oracle = Oracle(dataset)
    official.dump(tmp_path / "vidor/validation/0021/3557382625.json", {"trajectories": [0]})
    from bridge_stg.evaluation.datasets.vidstg import trajectories_of

    trajectories_of.cache_clear()
    with raises("annotation.bad_file", "trajectories[0]"):
        evaluate(dataset, [model(oracle)], tmp_path / "out")


def test_a_second_run_keeps_finished_samples(tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 6)
    oracle = Oracle(dataset, delay=0.7)
    first = evaluate(dataset, [model(oracle)], tmp_path / "out", limit=4)
    assert len(oracle.calls) == 4
    evaluate(dataset, [model(oracle)], tmp_path / "out")
    assert len(oracle.calls) == 6  # a higher limit continues
    again = evaluate(dataset, [model(oracle)], tmp_path / "out", limit=4)
    assert len(oracle.calls) == 6 and again.metrics == first.metrics
    evaluate(dataset, [model(oracle)], tmp_path / "out", limit=4, overwrite=True)
    assert len(oracle.calls) == 10


def test_a_truncated_last_line_is_dropped(tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 5)
    whole = evaluate(dataset, [model(Oracle(dataset, delay=0.3))], tmp_path / "out")
    path = tmp_path / "out/samples/oracle.jsonl"
    data = path.read_bytes()
    for cut, again in ((1, 0), (2, 1), (20, 1), (len(data.splitlines()[-1]), 1)):
        path.write_bytes(data[:-cut])
        oracle = Oracle(dataset, delay=0.3)
        assert evaluate(dataset, [model(oracle)], tmp_path / "out").metrics == whole.metrics
        assert len(oracle.calls) == again
        assert len(path.read_bytes().splitlines()) == 6
    path.write_bytes(data[: data.index(b"\n")])  # killed while the header was written
    oracle = Oracle(dataset, delay=0.3)
    assert evaluate(dataset, [model(oracle)], tmp_path / "out").metrics == whole.metrics and len(oracle.calls) == 5
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{}}\n", *lines[3:]]))
    with raises("evaluation.bad_results", "oracle.jsonl:3", "--overwrite"):
        evaluate(dataset, [model(oracle)], tmp_path / "out")
    row = json.loads(lines[2])
    for name, value in (("scores", None), ("scores", {"IoU": "1"}), ("task", "x"), ("seconds", "1"), ("index", [])):
        path.write_bytes(b"".join([*lines[:2], json.dumps({**row, name: value}).encode(), b"\n", *lines[3:]]))
        with raises("evaluation.bad_results", "oracle.jsonl:3", name):
            evaluate(dataset, [model(oracle)], tmp_path / "out")


def test_results_of_something_else_never_mix(tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 2)
    evaluate(dataset, [model(Oracle(dataset), fingerprint="a")], tmp_path / "out")
    with raises("evaluation.other_results", "model.fingerprint", "'a'", "'b'", "--overwrite"):
        evaluate(dataset, [model(Oracle(dataset), fingerprint="b")], tmp_path / "out")
    evaluate(dataset, [model(Oracle(dataset), fingerprint="a", heads="text")], tmp_path / "text")
    with raises("evaluation.other_results", "model.heads", "'text'", None):
        evaluate(dataset, [model(Oracle(dataset), fingerprint="a")], tmp_path / "text")
    other = sentences(tmp_path, 3)
    with raises("evaluation.other_results", "annotations"):
        evaluate(other, [model(Oracle(other), fingerprint="a")], tmp_path / "out")
    found = evaluate(other, [model(Oracle(other), fingerprint="b")], tmp_path / "out", overwrite=True)
    assert found.metrics["oracle"]["span"]["samples"] == 3


def test_a_row_is_on_disk_when_it_is_added_and_a_long_torn_line_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ResultFile(path, {"benchmark": "b"}) as results:
        results.add({"id": "1"})
        assert path.read_bytes().endswith(b'{"id": "1"}\n')
    path.write_bytes(path.read_bytes() + b'{"id": "2", "query": "' + b"x" * 5000)
    with ResultFile(path, {"benchmark": "b"}) as results:
        assert list(results.rows) == ["1"]
        results.add({"id": "3"})
    assert [json.loads(line).get("id") for line in path.read_text().splitlines()] == [None, "1", "3"]


def test_two_processes_never_write_one_file(tmp_path: Path) -> None:
    with ResultFile(tmp_path / "a.jsonl", {}):
        with raises("output.in_use", tmp_path / "a.jsonl"):
            ResultFile(tmp_path / "a.jsonl", {})
    with ResultFile(tmp_path / "a.jsonl", {}):
        pass


def test_shards_add_up(tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 7)
    whole = evaluate(dataset, [model(Oracle(dataset, delay=0.4))], tmp_path / "whole")
    seen: list[int] = []
    for i in (1, 2, 3):
        oracle = Oracle(dataset, delay=0.4)
        last = evaluate(dataset, [model(oracle)], tmp_path / "out", shard=(i, 3))
        seen.append(len(oracle.calls))
    assert seen == [3, 2, 2] and last.metrics == whole.metrics
    oracle = Oracle(dataset)
    assert evaluate(dataset, [model(oracle)], tmp_path / "out").metrics == whole.metrics and not oracle.calls
    assert sorted(file.name for file in (tmp_path / "out/samples").iterdir()) == [
        "oracle.1of3.jsonl", "oracle.2of3.jsonl", "oracle.3of3.jsonl", "oracle.jsonl"
    ]  # fmt: skip


SLOW_RUN = """
import json, sys, time
from pathlib import Path
import bridge_stg
sys.path.insert(0, {root!r})
from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.evaluation.report.report import write_report
from bridge_stg.evaluation.run.evaluate import evaluate
from tests.evaluation.fake_models import Oracle, model

class Slow(Oracle):
    def span(self, *arguments, **options):
        time.sleep(0.05)
        return super().span(*arguments, **options)

dataset = read_dataset("charades-sta", (Path({annotations!r}),))
models = [model(Slow(dataset, delay=0.3, failing=["sentence number 7."]), label) for label in ("first", "second")]
write_report(evaluate(dataset, models, Path({out!r})), Path({out!r}))
"""


def test_a_killed_run_ends_with_the_same_report(tmp_path: Path) -> None:
    """SIGKILL in the middle, twice; then the same command again, and a run that nobody disturbed."""
    sentences(tmp_path, 30)

    def started(out: Path) -> subprocess.Popen[bytes]:
        program = SLOW_RUN.format(root=str(ROOT), annotations=str(tmp_path / "many.txt"), out=str(out))
        return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)

    def lines(file: Path) -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    killed, files = tmp_path / "killed", []
    for name, least in (("first", 10), ("second", 5)):
        process = started(killed)
        files.append(killed / "samples" / f"{name}.jsonl")
        deadline = time.monotonic() + 90
        while lines(files[-1]) < least:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert lines(files[-1]) < 31 and not (killed / "report.json").exists()
    kept = files[0].read_bytes()
    for out in (killed, tmp_path / "whole"):
        process = started(out)
        assert process.wait(timeout=120) == 0, process.communicate()
        process.communicate()
    assert files[0].read_bytes() == kept  # finished samples were not run again
    reports = [json.loads((out / "report.json").read_text()) for out in (killed, tmp_path / "whole")]
    for report in reports:
        del report["seconds_median"]
    assert reports[0] == reports[1] and reports[0]["figures"]["second"]["span"]["failed"] == 1


def test_got10k_results_are_in_the_layout_of_the_server(tmp_path: Path) -> None:
    """github.com/got-10k/toolkit, experiments/got10k.py: `_record`, and what `report` reads back."""
    files = official.got10k(tmp_path)
    dataset = read_dataset("got-10k", files.annotations, split="test")
    evaluation = evaluate(dataset, [model(Oracle(dataset, look=True))], tmp_path / "out")
    assert evaluation.metrics["oracle"]["track"] == {"samples": 1, "failed": 0}  # its truth is not public
    assert write_results(list(evaluation.rows["oracle"].values()), tmp_path / "server") == 1
    name = "GOT-10k_Test_000001"
    boxes = np.loadtxt(tmp_path / "server" / name / f"{name}_001.txt", delimiter=",")
    left, top, right, bottom = official.box_at(0.0)
    assert boxes.shape == (12, 4)
    np.testing.assert_allclose(boxes[0], [left, top, right - left, bottom - top], atol=1e-3)
    first = (tmp_path / "server" / name / f"{name}_001.txt").read_text().splitlines()[0]
    assert first == f"{left:.3f},{top:.3f},{right - left:.3f},{bottom - top:.3f}"
    assert np.loadtxt(tmp_path / "server" / name / f"{name}_time.txt").shape == (12,)
