"""`init` and then `train`, and the faults of their user."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bridge_stg import cli
from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.commands import train
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.runtime.bundle.spec import KnowsSpec
from bridge_stg.training.loop.distribution import TRACKERS
from bridge_stg.training.loop.trainer import TrainingStopped
from tests.bridge_stg.model.published import publish

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    publish(tmp_path / "model", "qwen3_vl")
    Image.new("RGB", (96, 64), "red").save(tmp_path / "b.png")
    line = {"image": "b.png", "query": "the car", "boxes": [{"box": [0, 0, 48, 32]}]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


INIT = [
    "init",
    "--backbone",
    "model",
    "--out",
    "new",
    "--queries",
    "2",
    "--decoder-width",
    "32",
    "--decoder-layers",
    "2",
]
TRAIN = ["train", "new", "--recipe", "recipe.yaml", "--out", "trained", "--device", "cpu", "--workers", "0"]
RECIPE = """
precision: fp32
stages: [{name: parts, steps: 2, clips: 1}]
data: {sources: [{annotations: [clips.jsonl], media: .}]}
"""


def test_a_plain_model_becomes_a_trained_checkpoint(folder, capsys):
    assert cli.run([*INIT, "--taps", "0,2", "--dtype", "bf16"]) == 0
    assert "untrained checkpoint" in capsys.readouterr().out
    config = BridgeSTGConfig.load(folder / "new")
    assert config.trained is False and config.model_spec().trained is False
    dataclasses.replace(config, knows=KnowsSpec("It knows dogs.", ("dog",))).save(folder / "new")
    assert cli.run(TRAIN) == 0
    assert "checkpoint trained" in capsys.readouterr().out
    model = load_checkpoint(folder / "trained")
    assert model.spec.trained and model.spec.knows is None
    assert model.spec.language.tapped_layers == (0, 2) and model.config.spatial_decoder.width == 32
    recipe = json.loads((folder / "trained-training" / "run.json").read_text())
    assert recipe["stages"][0]["train"] == ["bridging", "spatial"] and recipe["precision"] == "fp32"
    assert (folder / "trained-training" / "train_report.html").is_file()


def test_checkpoints_are_replaced_only_with_overwrite(folder, capsys):
    def fails(*arguments: str) -> str:
        assert cli.run(arguments) == 2
        return capsys.readouterr().err.rpartition(" ")[2].strip("[]\n")

    weights = folder / "new/bridging.safetensors"
    assert cli.run(INIT) == 0
    before = weights.read_bytes()
    assert fails(*INIT, "--seed", "1") == "output.exists" and weights.read_bytes() == before
    (folder / "new/model.safetensors.index.json").touch()  # nothing of the old folder is left
    assert cli.run([*INIT, "--seed", "1", "--overwrite"]) == 0 and weights.read_bytes() != before
    assert not (folder / "new/model.safetensors.index.json").exists()
    assert fails("init", "--backbone", "model", "--out", "model", "--overwrite") == "output.exists"
    assert cli.run(TRAIN) == 0
    trained = (folder / "trained/bridging.safetensors").read_bytes()
    assert fails(*TRAIN) == "output.exists"
    (folder / "recipe.yaml").write_text(RECIPE.replace("steps: 2", "steps: 3"))
    assert cli.run([*TRAIN, "--overwrite", "--no-resume"]) == 0
    assert (folder / "trained/bridging.safetensors").read_bytes() != trained
    assert fails(*TRAIN, "--out", "new", "--overwrite") == "output.is_input" and weights.exists()


@pytest.mark.parametrize(
    ("options", "queries", "taps", "decoder"),
    [
        ([], 8, (0, 1, 2), (32, 6, 1, 256)),
        (["--decoder-layers", "3"], 8, (0, 1, 2), (32, 3, 1, 256)),
        (["--like", "paper"], 8, (0, 1, 2), (256, 6, 8, 2048)),
        (["--like", "paper", "--queries", "4", "--taps", "1", "--decoder-width", "30"], 4, (1,), (30, 6, 1, 240)),
    ],
)
def test_an_explicit_size_overrides_the_papers_and_the_default(folder, options, queries, taps, decoder):
    assert cli.run(["init", "--backbone", "model", "--out", "new", *options]) == 0
    config = BridgeSTGConfig.load(folder / "new")
    assert (config.bridging.num_queries, config.model_spec().language.tapped_layers) == (queries, taps)
    assert dataclasses.astuple(config.spatial_decoder) == decoder


def test_a_dry_run_checks_the_data_and_estimates(folder, capsys):
    assert cli.run(INIT) == 0
    assert cli.run([*TRAIN, "--dry-run", "--gpu", "l4"]) == 0
    printed = capsys.readouterr().out
    assert "1 clips, 1 queries" in printed and "parts" in printed and "1 × l4" in printed
    assert not (folder / "trained").exists() and not (folder / "trained-training").exists()
    assert tuple(TRACKERS) == train.TRACKERS
    assert cli.run([*TRAIN, "--dry-run", "--devices", "2"]) == 2
    assert "'clips' is 1" in capsys.readouterr().err
    adapters = RECIPE.replace("clips: 1", "clips: 2, lora: {rank: 4}")
    (folder / "recipe.yaml").write_text(adapters)
    assert cli.run([*TRAIN, "--dry-run", "--devices", "2"]) == 0
    assert cli.run([*TRAIN, "--dry-run", "--devices", "2", "--shard"]) == 2
    assert "checkpoint_activations" in capsys.readouterr().err
    (folder / "recipe.yaml").write_text(adapters.replace("lora", "checkpoint_activations: true, lora"))
    assert cli.run([*TRAIN, "--dry-run", "--devices", "2", "--shard"]) == 0
    sources = [{"annotations": ["gone.jsonl"]}]
    (folder / "recipe.yaml").write_text(RECIPE + f"validation: {json.dumps({'sources': sources})}\n")
    assert cli.run([*TRAIN, "--dry-run"]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "value"),
    [
        ([*INIT, "--taps", "2,1"], "options.invalid", "'2,1'"),
        ([*INIT, "--taps", "a"], "options.invalid", "'a'"),
        ([*INIT, "--taps", "9"], "checkpoint.bad_config", "[9]"),
        ([*INIT, "--decoder-width", "7"], "options.invalid", "7"),
        ([*INIT, "--like", "mine"], "options.invalid", "'mine'"),
        (["init", "--backbone", "nowhere", "--out", "new"], "checkpoint.not_found", "nowhere"),
        ([*TRAIN, "--media", "."], "options.conflict", "--media"),
        ([*TRAIN, "--gpu", "l4"], "options.conflict", "--gpu"),
        ([*TRAIN, "--recipe", "clips.jsonl"], "training.bad_recipe", "clips.jsonl"),
        ([*TRAIN, "--tracker", "mlflow"], "options.invalid", "mlflow"),
        (TRAIN, "checkpoint.missing_file", "new"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(folder, capsys, arguments, code, value):
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(f" [{code}]\n") and value in captured.err
    assert "Traceback" not in captured.err and not captured.out
    assert {path.name for path in folder.iterdir()} == {"model", "b.png", "clips.jsonl", "recipe.yaml"}


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_one_of_several_processes_names_the_checkpoint(folder, capsys, monkeypatch, rank, printed):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("bridge_stg.training.train_checkpoint.train_checkpoint", lambda _, out, *__, **___: out)
    assert cli.run(TRAIN) == 0
    assert ("trained" in capsys.readouterr().out) is printed


def test_left_over_variables_of_a_launcher_are_an_error(folder):
    assert cli.run(INIT) == 0
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *TRAIN], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.endswith(" [training.bad_launch]\n") and "WORLD_SIZE" in done.stderr
    assert "Traceback" not in done.stderr and not (folder / "trained-training").exists()


@pytest.mark.parametrize(
    ("arguments", "function", "stages"),
    [
        (TRAIN, "training.train_checkpoint.train_checkpoint", [("parts", 2)]),
        (["train-demo", "--vision-steps", "7"], "demo.training.train.train_demo", [("vision", 7), ("grounding", 3500)]),
        (["train-demo", "--heads", "text"], "demo.text_heads.train.train_text_demo", [("text", 6000)]),
    ],
)
def test_a_stopped_training_exits_with_the_signal(*, folder, monkeypatch, capsys, arguments, function, stages):
    def stop(*values, **options):
        recipe = values[-1]
        assert [(stage.name, stage.steps) for stage in recipe.stages] == stages
        raise TrainingStopped(signal.SIGTERM, "Stopped; the state is saved.")

    monkeypatch.setattr(f"bridge_stg.{function}", stop)
    assert cli.run(arguments) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("Stopped; the state is saved.\n")
