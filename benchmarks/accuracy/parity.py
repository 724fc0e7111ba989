"""Compare a bundle's chain with eager torch on held-out clips, every variant: answers, spans and boxes.

Usage: python benchmarks/accuracy/parity.py [--bundle DIR] [--checkpoint DIR] [--clips 200] [--out FILE.json]
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.demo.held_out import compare_models
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.host.machine import describe


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("build/demo/bundle"), show_default=True)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), default=Path("assets/demo/checkpoint"), show_default=True
)
@click.option("--clips", default=200, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/parity_demo.json"))
def main(bundle: Path, checkpoint: Path, clips: int, out: Path) -> None:
    """Write the figures as JSON."""
    variants = list(Bundle.load(bundle).manifest.graphs["language_model"])
    grounders = {variant: Grounder.load(bundle, variant=variant) for variant in variants}
    reference = torch_grounder(load_checkpoint(checkpoint))
    figures = compare_models(reference, grounders, clips=clips, folder=Path("build/held-out"))
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = describe("torch", "onnxruntime", "numpy")
    text = json.dumps(
        {"clips": clips, "against": "eager torch, fp32", "variants": figures, "machine": machine}, indent=2
    )
    out.write_text(text + "\n", encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
