"""The executor on a local Ray: the same rows as without it; processes that die are replaced; nothing is left over.

A local Ray is started once for all.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.evaluation.run.evaluate import Model, evaluate
from bridge_stg.evaluation.run.executor import LocalExecutor, Lost, open_executor
from bridge_stg.evaluation.run.ray_executor import RayExecutor
from bridge_stg.evaluation.run.results import ResultFile
from bridge_stg.runtime.errors import AnnotationError
from tests.errors import raises
from tests.evaluation.fake_models import Oracle
from tests.evaluation.official import ALL
from tests.evaluation.run.test_evaluate import sentences

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    pytest.importorskip("ray")
    with open_executor("ray", workers=2, threads=1) as opened:
        assert isinstance(opened, RayExecutor) and opened.workers == 2
        yield opened


def double(model: int, unit: int) -> tuple[int, int]:
    return model * unit, os.getpid()


def test_units_are_spread_over_processes_that_each_open_one_model(executor: RayExecutor, tmp_path: Path) -> None:
    @contextmanager
    def open_model() -> Iterator[int]:
        with (tmp_path / "opened").open("a") as file:
            file.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        yield 2

    found = dict(executor.answers(open_model, double, range(20)))
    assert {place: value for place, (value, _) in found.items()} == {place: 2 * place for place in range(20)}
    opened = (tmp_path / "opened").read_text().splitlines()
    processes = {pid for _, pid in found.values()}
    assert len(opened) <= 2 and {int(line.split()[0]) for line in opened} == processes
    assert os.getpid() not in processes and {line.split()[1] for line in opened} == {"1"}
    assert list(executor.answers(open_model, double, [])) == []


def dying(folder: Path, model: None, unit: str) -> str:
    """Answer, or end the process: always for `always`, the first time for `once`."""
    mark = folder / unit
    if unit == "always" or (unit == "once" and not mark.exists()):
        with mark.open("a") as file:
            file.write(".")
        os._exit(1)
    return f"answer to {unit}"


def test_processes_that_die_are_replaced_and_nothing_is_lost(executor: RayExecutor, tmp_path: Path) -> None:
    units = ["a", "once", "b", "always", "c", "d"]
    found = dict(executor.answers(nullcontext, partial(dying, tmp_path), units))
    lost = found.pop(3)
    assert isinstance(lost, Lost) and "the worker process died 2 times" in lost.error
    assert found == {place: f"answer to {unit}" for place, unit in enumerate(units) if unit != "always"}
    assert (tmp_path / "always").read_text() == ".." and (tmp_path / "once").read_text() == "."


def test_a_model_that_kills_every_process_is_an_error(executor: RayExecutor) -> None:
    with raises("evaluation.worker_died", "--workers"):
        list(executor.answers(partial(os._exit, 1), double, range(3)))


def test_what_would_fail_every_unit_is_raised_as_it_was(executor: RayExecutor) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    with pytest.raises(ModuleNotFoundError) as caught:
        list(executor.answers(missing, double, range(3)))
    assert caught.value.name == "onnxruntime"

    def broken(model: Any, unit: Any) -> Any:
        raise AnnotationError("annotation.bad_file", "a.json: is broken")

    with raises("annotation.bad_file", "a.json", kind=AnnotationError):
        list(executor.answers(nullcontext, broken, range(3)))


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "samples/oracle.jsonl").read_text().splitlines()]
    assert lines[0]["schema"] == 1
    rows = {row["id"]: row for row in lines[1:]}
    assert len(rows) == len(lines) - 1
    for row in rows.values():
        del row["seconds"]
    return rows


def test_evaluate_gives_the_same_rows_and_goes_on_where_it_was(executor: RayExecutor, tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 9)
    model = Model("oracle", {"fingerprint": "a"}, lambda: nullcontext(Oracle(dataset, delay=0.4, failing=[FAILING])))
    calls: list[int] = []
    evaluate(dataset, [model], tmp_path / "ray", limit=4, executor=executor)
    spread = evaluate(
        dataset, [model], tmp_path / "ray", executor=executor, progress=lambda label, done, total: calls.append(done)
    )
    assert calls == [4, 5, 6, 7, 8, 9]
    local = evaluate(dataset, [model], tmp_path / "local")
    assert spread.metrics == local.metrics and local.metrics["oracle"]["span"]["failed"] == 1
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "local")
    assert rows_of(tmp_path / "ray")["6"]["error"] == f"RuntimeError: cannot see {FAILING}"
    mended = Model("oracle", {"fingerprint": "a"}, lambda: nullcontext(Oracle(dataset, delay=0.4)))
    again = evaluate(dataset, [mended], tmp_path / "ray", executor=executor, retry_failed=True)
    assert again.metrics["oracle"]["span"]["failed"] == 0


FAILING = "sentence number 5."


class Deadly(Oracle):
    """Ends its process at one of the queries."""

    def span(self, video: Any, query: str, **options: Any) -> Any:
        if query == FAILING:
            os._exit(1)
        return super().span(video, query, **options)


def test_a_sample_that_kills_its_process_is_a_failed_sample(executor: RayExecutor, tmp_path: Path) -> None:
    dataset = sentences(tmp_path, 7)
    model = Model("oracle", {}, lambda: nullcontext(Deadly(dataset)))
    found = evaluate(dataset, [model], tmp_path / "out", executor=executor)
    metrics = found.metrics["oracle"]["span"]
    assert metrics["samples"] == 7 and metrics["failed"] == 1 and metrics["mIoU"] == pytest.approx(6 / 7)
    row = found.rows["oracle"]["6"]
    assert "died 2 times" in row["error"] and row["scores"] == {"IoU": 0.0} and row["query"] == FAILING


def test_a_run_that_is_broken_off_leaves_ray_as_it_was(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    dataset = sentences(tmp_path, 6)
    model = Model("oracle", {}, lambda: nullcontext(Oracle(dataset)))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    total = ray.cluster_resources()["CPU"]
    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "add", full)
        with pytest.raises(OSError, match="No space left"):
            evaluate(dataset, [model], tmp_path / "out", executor=executor)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != total and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == total  # its actors are gone
    evaluate(dataset, [model], tmp_path / "out", executor=executor)
    assert len(rows_of(tmp_path / "out")) == 6


@pytest.mark.parametrize("name", ALL)
def test_samples_of_every_dataset_can_be_pickled(tmp_path: Path, name: str) -> None:
    files = ALL[name](tmp_path)
    dataset = read_dataset(files.name, files.annotations, files.media, split=files.split)
    for sample in dataset.samples:
        if sample.media is not None:
            there = pickle.loads(pickle.dumps(sample))
            assert there.id == sample.id and there.read_truth().span == sample.read_truth().span


GPUS = """
import os, sys, tempfile
import ray
sys.path.insert(0, {root!r})
from contextlib import nullcontext
from bridge_stg.evaluation.run.executor import open_executor
folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")
ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder.name)
def answer(model, unit):
    import time
    time.sleep(0.2)
    return os.environ["CUDA_VISIBLE_DEVICES"]
with open_executor("ray") as executor:
    shown = {{value for _, value in executor.answers(nullcontext, answer, range(12))}}
    print(executor.workers, executor.threads, sorted(shown))
with open_executor("ray", workers=1) as executor:
    print(executor.workers)
assert ray.is_initialized()  # it is the program's own
ray.shutdown()
folder.cleanup()
"""


@pytest.mark.slow
def test_one_actor_per_gpu() -> None:
    """Ray is started with two GPUs, which it assigns as numbers."""
    pytest.importorskip("ray")
    program = [sys.executable, "-c", GPUS.format(root=str(ROOT))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["2 2 ['0', '1']", "1"]


def test_faults_of_executors() -> None:
    with raises("options.invalid", "'spark'", "local, ray"):
        open_executor("spark")
    with raises("options.conflict", "--workers", "'local'"):
        open_executor("local", workers=2)
    with open_executor("local", threads=3) as local:
        assert local == LocalExecutor(3)
