"""Training a model on two processes: the losses of one process, with replicated and with sharded weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from tests.bridge_stg.model.published import publish
from tests.bridge_stg.training.small import shrink_frames
from tests.bridge_stg.training.test_trainer import ROOT, launcher, losses
from tests.evaluation import official

RECIPE = """
precision: fp32
log_every: 1
data:
  sources: SOURCES
  fine_frames: 6
  max_broken: 0.9
  absent: 0.2
stages:
  - {name: only, steps: 50, clips: 2, train: [bridging, spatial, mergers, vision], lora: {rank: 4},
     learning_rate: 0.001, warmup: 5, checkpoint_activations: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a checkpoint and a recipe on all datasets in their published layouts."""
    folder = tmp_path_factory.mktemp("train")
    publish(folder / "model", "qwen3_vl")
    init_checkpoint(folder / "model", folder / "checkpoint")
    shrink_frames(folder / "checkpoint")
    sources = []
    for name, build in official.ALL.items():
        files = build(folder / name, official.video)
        sources.append({"dataset": name, "annotations": [*map(str, files.annotations)], "media": str(files.media),
                        "split": files.split})  # fmt: skip
    (folder / "recipe.yaml").write_text(RECIPE.replace("SOURCES", json.dumps(sources)))
    return folder


def command(folder: Path, out: str, *start: object) -> Sequence[str]:
    train = [ROOT / "cli.py", "train", folder / "checkpoint", "--recipe", folder / "recipe.yaml", "--out", folder / out,
             "--device", "cpu", "--workers", "0"]  # fmt: skip
    return list(map(str, [sys.executable, *start, *train]))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_on_all_datasets(folder):
    ran = subprocess.run(command(folder, "one"), env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    expected = losses(folder / "one-training")
    assert len(expected) == 50 and expected[-1] < expected[0]
    for name, sharded in (("replicated", "false"), ("sharded", "true")):
        ran = subprocess.run(
            command(folder, name, *launcher(2)), env=environment(ACCELERATE_USE_FSDP=sharded), capture_output=True,
            text=True, timeout=900,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert losses(folder / f"{name}-training") == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert load_checkpoint(folder / name).spec.trained


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_and_the_same_command_continues(folder, number):
    out = f"stopped-{number.name}"
    process = subprocess.Popen(command(folder, out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = folder / f"{out}-training" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and len(losses(log.parent)) > 3):
        time.sleep(0.1)
    process.send_signal(number)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and time.monotonic() - began < 60
    assert b"Traceback" not in errors and not (folder / out).exists()
    done = len(losses(log.parent))
    assert 3 < done < 50
    ran = subprocess.run(command(folder, out), env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    if (folder / "one-training" / "log.jsonl").is_file():
        assert losses(log.parent) == losses(folder / "one-training")
    assert len(losses(log.parent)) == 50
