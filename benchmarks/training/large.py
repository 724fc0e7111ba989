"""Train a random checkpoint of the size of Qwen3-VL-2B for three steps: its peak memory beside the estimate.

Runs `train` with LoRA adapters on the LLM and recomputed activations on a clip of the demo, in a subprocess on the CPU.
The result goes to benchmarks/results/training_large.json.

Usage: python benchmarks/training/large.py [SHAPE]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "large"))
from shapes import SHAPES, write_checkpoint

from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.runtime.host.machine import describe
from bridge_stg.training.estimate.estimate import estimate
from bridge_stg.training.recipe import read_recipe

RESULT = Path("benchmarks/results/training_large.json")
CLIP = Path("assets/demo/clips")
STEPS = 3
RECIPE = f"""
log_every: 1
data:
  fine_frames: 8
  max_visual_tokens: 1024
stages:
  - name: lora
    steps: {STEPS}
    clips: 1
    train: [bridging, spatial, mergers]
    lora: {{rank: 32}}
    checkpoint_activations: true
"""


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)), default="qwen3_vl_2b")
def main(shape: str) -> None:
    """Train SHAPE."""
    with tempfile.TemporaryDirectory(dir="build") as name:
        folder = Path(name)
        write_checkpoint(shape, folder / "checkpoint")
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        video = sorted(CLIP.glob("*.mp4"))[0].resolve()
        box = {"box": [10, 10, 60, 60]}
        line = {"video": video.name, "query": "the red car", "span": [0.5, 3.0],
                "boxes": [{"time": 0.5, **box}, {"time": 2.5, **box}]}  # fmt: skip
        (folder / "clips.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        options = ["--recipe", folder / "recipe.yaml", "--annotations", folder / "clips.jsonl", "--media", video.parent,
                   "--out", folder / "trained", "--device", "cpu", "--workers", "0"]  # fmt: skip
        began = time.monotonic()
        subprocess.run([sys.executable, "cli.py", "train", folder / "checkpoint", *options], check=True)
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        lines = (folder / "trained-training" / "log.jsonl").read_text().splitlines()
        config, recipe = BridgeSTGConfig.load(folder / "checkpoint"), read_recipe(folder / "recipe.yaml")
        estimated = estimate(config, recipe, mean_s=3.0, longest_s=3.0, video_size=(240, 320)).stages[0]
        weights = sum(path.stat().st_size for path in (folder / "checkpoint").glob("*.safetensors"))
    result = {
        "shape": shape, "steps": len(lines), "losses": [json.loads(line)["loss"] for line in lines],
        "measured_peak_bytes": peak, "estimated_peak_bytes": estimated.peak, "estimated_trained": estimated.trained,
        "loading_bytes": 2 * weights, "seconds": round(seconds), "machine": describe("torch", "transformers", "peft"),
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
