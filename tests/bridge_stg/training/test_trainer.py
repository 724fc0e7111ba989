"""The training loop: the same losses on any number of processes and after any interruption, and safe from bad steps."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from bridge_stg.training.data.micro_batch import Skipped
from bridge_stg.training.loop.distribution import Processes
from bridge_stg.training.loop.trainer import MOST_ROLLBACKS, PATIENCE, TrainingStopped, learning_rate
from bridge_stg.training.recipe import Stage, Validation
from bridge_stg.training.report.report import read_log
from tests.bridge_stg.training.toy import points, slow_points, train_toy
from tests.errors import raises

ROOT = Path(__file__).parents[3]


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line and "event" not in line]


def free_port() -> int:
    """Return a port that no program listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def launcher(processes: int) -> list[object]:
    """Return the arguments of python that run a program as several processes of this machine."""
    addresses = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    return ["-m", "torch.distributed.run", "--nproc_per_node", processes, *addresses]


def launch(processes: int, *arguments: object) -> None:
    command = [sys.executable, *launcher(processes), "-m", "tests.bridge_stg.training.toy", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["replicated", "shard"])
def test_two_processes_have_the_losses_of_one_and_continue_each_others_training(tmp_path, form):
    train_toy(tmp_path / "one", 50)
    launch(2, tmp_path / "two", 50, form)
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-5) and expected[-1] < 0.7 * expected[0]
    with pytest.raises(TrainingStopped) as stopped:
        train_toy(tmp_path / "mixed", 50, batches=slow_points)
    assert stopped.value.signal == signal.SIGTERM and losses(tmp_path / "mixed") == expected[:10]
    launch(2, tmp_path / "mixed", 50, form)
    assert losses(tmp_path / "mixed") == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_several_processes_stop_after_the_same_step_whichever_has_the_signal(tmp_path):
    launch(2, tmp_path, 20, "stop")
    first, second = ((tmp_path / f"stopped-{rank}").read_text() for rank in range(2))
    assert first == second and "step 4 of 20" in first
    train_toy(tmp_path, 20)
    assert [line["step"] for line in log(tmp_path) if "loss" in line] == list(range(1, 21))


def test_a_signal_to_all_processes_saves_the_state(tmp_path):
    def stop(step: int) -> dict[str, float]:
        (worker,) = multiprocessing.active_children()
        subprocess.run(["kill", str(worker.pid)], check=True)  # torch forgives a signal of the parent process
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(TrainingStopped):
        train_toy(tmp_path, 6, validate=stop, validation=Validation(every=3), run={"workers": 1})
    train_toy(tmp_path, 6)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_ignored_signals_stop_neither_the_training_nor_its_workers(tmp_path):
    def hang_up(step: int) -> dict[str, float]:
        for process in (os.getpid(), *(worker.pid for worker in multiprocessing.active_children())):
            os.kill(process, signal.SIGHUP)
        return {"m_vIoU": 0.0}

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        trainer = train_toy(tmp_path, 6, validate=hang_up, validation=Validation(every=3), run={"workers": 1})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.progress.step == 6


@pytest.mark.parametrize("stopped_at", [3, 6])
def test_an_interrupted_validation_is_repeated(tmp_path, stopped_at):
    def stop(step: int) -> dict[str, float]:
        if step == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"m_vIoU": float(step)}

    validation = Validation(every=3)
    with pytest.raises(TrainingStopped):
        train_toy(tmp_path, 6, validate=stop, validation=validation)
    progress = train_toy(tmp_path, 6, validate=lambda step: {"m_vIoU": float(step)}, validation=validation).progress
    assert progress.best_step == 6 and progress.finished
    assert [line["step"] for line in log(tmp_path) if "validation" in line] == [3, 6]
    (tmp_path / "toy.best.safetensors").unlink()
    train_toy(tmp_path, 6, validate=lambda step: {"m_vIoU": float(step)}, validation=validation)
    assert len(log(tmp_path)) == 8


def test_an_interrupted_training_continues_as_if_nothing_had_happened(tmp_path):
    whole = train_toy(tmp_path / "whole", 20)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped):
        train_toy(tmp_path / "killed", 20, batches=slow_points)
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = train_toy(tmp_path / "killed", 20)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert all(torch.equal(value, resumed.trained[name]) for name, value in whole.trained.items())


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e4])
def test_a_step_with_an_unusual_loss_is_skipped_and_counted(tmp_path, factor):
    trainer = train_toy(tmp_path / "new", 40, poison={4 * 30 + 1: factor})
    assert trainer.progress.skipped_steps == 1 and trainer.progress.rollbacks == 0
    usual = train_toy(tmp_path / "usual", 40)
    assert losses(tmp_path / "new")[:30] == losses(tmp_path / "usual")[:30]
    assert log(tmp_path / "new")[-1]["skipped_steps"] == 1 and len(losses(tmp_path / "new")) == 39
    assert [event for event, _ in read_log(tmp_path / "new").events] == ["step skipped"]
    assert all(value.isfinite().all() for value in trainer.trained.values())
    assert not torch.equal(usual.trained["out.weight"], trainer.trained["out.weight"])


def test_several_bad_steps_return_to_the_saved_weights_and_too_many_end_the_training(tmp_path):
    bad = {4 * step: math.nan for step in range(10, 10 + PATIENCE)}
    trainer = train_toy(tmp_path / "new", 30, poison=bad)
    assert (trainer.progress.skipped_steps, trainer.progress.rollbacks) == (PATIENCE, 1)
    assert len(losses(tmp_path / "new")) == 30 - PATIENCE
    bad = {4 * step: math.nan for step in range(10, 100)}
    with raises("training.diverged", "toy", MOST_ROLLBACKS, "toy.safetensors"):
        train_toy(tmp_path / "worse", 100, poison=bad)


def test_the_best_weights_win_and_no_progress_ends_a_stage(tmp_path):
    seen = {}
    values = iter([0.1, 0.5, 0.3, 0.2, 0.9])

    def validate(step: int) -> dict[str, float]:
        seen[step] = trained()["out.weight"].clone()
        return {"m_vIoU": next(values)}

    holder: list[Any] = []

    def trained() -> Any:
        return dict(holder[0].named_parameters())

    import tests.bridge_stg.training.toy as module

    made = module.Toy

    def noted(*arguments: Any) -> Any:
        holder.append(made(*arguments))
        return holder[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Toy", noted)
        trainer = train_toy(tmp_path / "new", 100, validate=validate, validation=Validation(every=5, patience=2))
    assert trainer.progress.step == 20 and trainer.progress.best == 0.5 and trainer.progress.best_step == 10
    assert torch.equal(trainer.trained["out.weight"], seen[10])
    shown = [line["validation"]["m_vIoU"] for line in log(tmp_path / "new") if "validation" in line]
    assert shown == [0.1, 0.5, 0.3, 0.2]
    assert "toy: validation at step 10: m_vIoU 0.5000\n" in (tmp_path / "new" / "train.log").read_text()
    with raises("training.bad_recipe", "AO", "m_vIoU"):
        train_toy(tmp_path / "other", 5, validate=lambda step: {"m_vIoU": 0.0}, validation=Validation(metric="AO"))


def test_new_parts_get_their_moving_average(tmp_path):
    plain, averaged = (train_toy(tmp_path / str(ema), 30, ema=ema) for ema in (0.0, 0.99))
    name = "language_model.bridging.weight"
    assert torch.equal(plain.trained["out.weight"], averaged.trained["out.weight"])
    start = train_toy(tmp_path / "start", 1, learning_rate=0.0).trained[name]
    moved = [float((trainer.trained[name] - start).detach().norm()) for trainer in (averaged, plain)]
    assert 0 < moved[0] < moved[1]


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    with pytest.raises(TrainingStopped):
        train_toy(tmp_path / "new", 20, batches=slow_points)
    before = (tmp_path / "new" / "toy.safetensors").read_bytes()

    def full(tensors: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="space") as caught:
        train_toy(tmp_path / "new", 20)
    assert caught.value.filename == str(tmp_path / "new" / "toy.safetensors")
    assert (tmp_path / "new" / "toy.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir() if "toy" in path.name] == ["toy.safetensors"]


def test_the_end_of_another_process_is_an_error_of_one_paragraph(monkeypatch):
    processes = Processes("cpu")
    lost = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4504.")
    with pytest.raises(RuntimeError, match="closed by peer"), processes.reporting_ended():
        raise lost
    monkeypatch.setattr(Processes, "count", 2)
    with raises("training.process_ended", "process 0", "2 processes"), processes.reporting_ended():
        raise lost
    with pytest.raises(RuntimeError, match="shape"), processes.reporting_ended():
        raise RuntimeError("shape")


def test_broken_clips_are_listed_and_too_many_end_the_training(tmp_path):
    def some(place: int) -> Any:
        return dataclasses.replace(points(place), skipped=(Skipped("a.mp4", "no frames"),) * (place % 10 == 0))

    trainer = train_toy(tmp_path / "new", 20, batches=some, run={"max_broken": 0.1})
    lines = [json.loads(line) for line in (tmp_path / "new" / "skipped.jsonl").read_text().splitlines()]
    assert trainer.progress.broken_clips == 8 and lines == [{"media": "a.mp4", "reason": "no frames"}] * 8
    with raises("training.too_many_broken", "skipped.jsonl", "0.05"):
        train_toy(tmp_path / "other", 20, batches=some, run={"max_broken": 0.05})


def test_learning_rates_follow_the_schedule():
    cosine = Stage("a", 100, learning_rate=1.0, warmup=10, final_rate=0.1)
    rates = [learning_rate(cosine, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01) and max(rates) == rates[9] and rates[-1] == pytest.approx(0.1, 0.01)
    constant = Stage("a", 100, learning_rate=1.0, warmup=10, schedule="constant")
    assert [learning_rate(constant, step) for step in (0, 9, 99)] == [0.1, 1.0, 1.0]


def test_clips_that_cannot_be_shared_and_other_states_are_errors(tmp_path):
    train_toy(tmp_path / "new", 2)
    with raises("training.wrong_state", "toy.safetensors", "--no-resume"):
        train_toy(tmp_path / "new", 3, ema=0.9)
    with raises("training.no_bitsandbytes", "toy"):
        train_toy(tmp_path / "other", 2, optimizer="adamw8bit")
