"""Compare the estimated memory of a training step with its measured peak, on the CPU, with random weights.

Each case runs two steps (gradients of all its clips, then AdamW) in a subprocess. The measured figure is the peak of
resident memory above that of the process before the model exists; the estimate is `training.estimate`'s peak of one
device. Results go to benchmarks/results/training_memory.json.

Usage: python benchmarks/training/memory.py [CASE …]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "large"))
from shapes import config_of

from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.subprocess import run_in_subprocess
from bridge_stg.training.recipe import DataRecipe, Lora, Stage, TrainingRecipe

RESULT = Path("benchmarks/results/training_memory.json")
SHAPE = "qwen3_vl_150m"
MERGERS = ("bridging", "spatial", "mergers")
FULL = (*MERGERS, "llm", "vision")
DATA = DataRecipe(queries=3, fine_frames=6)
SECONDS, VIDEO = 10.0, (240, 320)
CASES: dict[str, Stage] = {
    "new parts": Stage("a", 1, clips=1),
    "new parts, recomputed": Stage("a", 1, clips=1, checkpoint_activations=True),
    "LoRA": Stage("a", 1, train=MERGERS, lora=Lora(), clips=1),
    "LoRA, recomputed": Stage("a", 1, train=MERGERS, lora=Lora(), clips=1, checkpoint_activations=True),
    "all": Stage("a", 1, train=FULL, clips=1),
    "all, recomputed, 2 clips": Stage("a", 1, train=FULL, clips=2, checkpoint_activations=True),
}  # fmt: skip


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(CASES)))
def main(names: tuple[str, ...]) -> None:
    """Measure the CASES, by default all."""
    rows = [row(name) for name in names or CASES]
    result = {"cases": rows, "machine": describe("torch", "transformers", "peft")}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def row(name: str) -> dict[str, Any]:
    """Return the estimated and the measured bytes of a case."""
    began = time.monotonic()
    estimate = run_in_subprocess("memory:estimated", name, purpose="estimates a step")
    middle = time.monotonic()
    measured = run_in_subprocess("memory:measure", name, purpose="trains a step")
    values = {
        "case": name, "shape": SHAPE, "estimated_bytes": estimate, "measured_bytes": measured,
        "error": round(estimate / measured - 1, 3), "estimate_seconds": round(middle - began, 1),
        "measure_seconds": round(time.monotonic() - middle, 1),
    }  # fmt: skip
    click.echo(json.dumps(values))
    return values


def estimated(name: str) -> int:
    """Return the estimated peak of a case."""
    from bridge_stg.training.estimate.estimate import estimate

    stage = CASES[name]
    recipe = TrainingRecipe((stage,), DATA)
    sizes: Any = {"mean_s": SECONDS, "longest_s": SECONDS, "video_size": VIDEO}
    return estimate(config_of(SHAPE), recipe, **sizes).stages[0].peak


def measure(name: str) -> int:
    """Return the measured peak of a case, of zeros in place of frames."""
    import torch

    from bridge_stg.model.model import BridgeSTG
    from bridge_stg.runtime.host.memory import peak_bytes, reset_peak, return_freed_memory
    from bridge_stg.training.estimate.estimate import clip_shape, empty_batch
    from bridge_stg.training.loss.clip_task import ClipTask
    from bridge_stg.training.parts import add_lora, trained_parameters

    return_freed_memory()
    stage = CASES[name]
    config = config_of(SHAPE)
    torch.ones(8, 8).bfloat16() @ torch.ones(8, 8).bfloat16()
    reset_peak()
    before = peak_bytes()
    model = BridgeSTG(config, attention="sdpa")
    if stage.lora is not None:
        add_lora(model, stage.lora)
    task = ClipTask(model, bf16=True).train()
    trained = list(trained_parameters(task, stage, frozen=torch.bfloat16).values())
    model.language_model.checkpoint_activations = stage.checkpoint_activations
    model.vision_encoder.checkpoint_activations = stage.checkpoint_activations
    optimizer = torch.optim.AdamW(trained, fused=True)
    batch = empty_batch(model.spec, clip_shape(model.spec, DATA, SECONDS, VIDEO))
    batch.target.fill_(-100)
    batch.target[:, :8] = 0
    for _ in range(2):
        for _ in range(stage.clips):
            loss, _ = task(batch)
            (loss / stage.clips).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_bytes() - before


if __name__ == "__main__":
    main()
