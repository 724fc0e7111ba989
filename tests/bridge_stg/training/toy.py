"""A task that trains in milliseconds, run by itself or as one of several processes: toy.py OUT STEPS [shard] [stop]."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridge_stg.training.data.micro_batch import MicroBatch
from bridge_stg.training.loop.distribution import Processes
from bridge_stg.training.loop.trainer import Run, StageTrainer, TrainingStopped
from bridge_stg.training.recipe import Stage, Validation


class Toy(nn.Module):
    """Classifies points; `poison` changes the loss of a place."""

    def __init__(self, poison: Mapping[int, float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.language_model = nn.Module()
        self.language_model.bridging = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.out = nn.Linear(8, 4)
        self.poison = dict(poison or {})

    def forward(self, batch: tuple[int, Tensor]) -> tuple[Tensor, dict[str, float]]:
        place, points = batch
        x = self.language_model.bridging(points)
        for layer in self.layers:
            x = x + layer(x)
        loss = nn.functional.cross_entropy(self.out(x), points[:, :4].argmax(-1))
        loss = loss * self.poison.get(place, 1.0)
        return loss, {"entropy": loss.item()}


def points(place: int) -> MicroBatch:
    """Return the points of a place."""
    return MicroBatch((place, torch.randn(4, 8, generator=torch.Generator().manual_seed(place))))


def train_toy(
    folder: Path, steps: int = 20, *, shard: bool = False, poison: Mapping[int, float] | None = None,
    batches: Callable[[int], Any] = points, validate: Callable[[int], Mapping[str, float]] | None = None,
    validation: Validation | None = None, run: Mapping[str, Any] | None = None, **stage: Any,
) -> StageTrainer:  # fmt: skip
    """Train the toy, and return its trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = Processes("cpu", shard=shard)
    task = Toy(poison)
    chosen = Stage("toy", steps, train=("bridging",), **{"clips": 4, "learning_rate": 1e-2, "warmup": 5} | stage)
    options = {"workers": 0, "log_every": 1, **(run or {})}
    trainer = StageTrainer(
        chosen, task, dict(task.named_parameters()), batches, Run(folder, processes, **options),
        units=task.layers, validation=validation, validate=validate,
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        processes.end()
    return trainer


def slow_points(place: int) -> MicroBatch:
    """Return the points of a place; those of place 40 end this process as `kill` does, and take a minute."""
    if place == 40:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    return points(place)


def stop_first(step: int) -> dict[str, float]:
    """Send a signal to the first process alone, between two steps."""
    if step == 3 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return {"m_vIoU": 0.0}


if __name__ == "__main__":
    out, steps, *words = sys.argv[1:]
    stop: dict[str, Any] = {"validate": stop_first, "validation": Validation(every=3)} if "stop" in words else {}
    try:
        train_toy(Path(out), int(steps), shard="shard" in words, **stop)
    except TrainingStopped as stopped:
        (Path(out) / f"stopped-{os.environ['RANK']}").write_text(str(stopped))
