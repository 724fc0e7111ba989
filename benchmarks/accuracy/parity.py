"""Compare every variant of a bundle with eager torch on held-out clips: answers, spans and boxes.

Usage: python benchmarks/accuracy/parity.py [--bundle DIR] [--checkpoint DIR] [--clips 200] [--out FILE.json]
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.demo.held_out import clip_path, held_out_clips
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.host.machine import describe


def compare_models(
    reference: Grounder, others: dict[str, Grounder], *, clips: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Compare grounders on held-out clips: share of identical answers, and box IoU where both found a tube."""
    agree: dict[str, list[bool]] = {name: [] for name in others}
    ious: dict[str, list[np.ndarray]] = {name: [] for name in others}
    for clip in tqdm(held_out_clips(clips), "parity", total=clips, unit="clip"):
        path = clip_path(clip, folder)
        texts = [q.text for q in (clip.named, clip.absent) if q is not None]
        with reference.open(path) as video:
            expected = video.ground_many(texts)
        for name, grounder in others.items():
            with grounder.open(path) as video:
                for first, second in zip(expected, video.ground_many(texts)):
                    agree[name].append(first.answer == second.answer and first.span == second.span)
                    if first.tube is not None and second.tube is not None and len(first.tube) == len(second.tube):
                        ious[name].append(box_iou(first.tube.boxes, second.tube.boxes))
    return {
        name: {
            "queries": len(agree[name]),
            "identical_answers": float(np.mean(agree[name])),
            "box_iou_mean": float(np.concatenate(ious[name]).mean()),
            "box_iou_min": float(np.concatenate(ious[name]).min()),
        }
        for name in others
    }


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
