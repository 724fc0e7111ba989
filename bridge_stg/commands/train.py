"""The commands that make checkpoints: `init` from a plain model, `train` on a person's own clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bridge_stg.commands.options import Number

DTYPES = ("fp32", "fp16", "bf16")
PRECISIONS = ("bf16", "fp32")


class Layers(click.ParamType):
    """Indices of layers, separated by commas."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            layers = tuple(int(index) for index in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of layers; expected indices from 0, as in 8,17,26.", param, ctx)
        if list(layers) != sorted(set(layers)):
            self.fail(f"{value!r} is not in order; expected increasing indices, each once.", param, ctx)
        return layers


def torch_dtype(name: str | None) -> Any:
    """Return torch's dtype of one of `DTYPES`, None for None."""
    import torch

    return None if name is None else dict(zip(DTYPES, (torch.float32, torch.float16, torch.bfloat16)))[name]


@click.command()
@click.option("--backbone", type=click.Path(path_type=Path), required=True, help="Folder of a Hugging Face model.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The checkpoint: a folder to be made.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the new parts' weights.")
@click.option("--queries", type=click.IntRange(min=1), default=8, show_default=True, help="Bridging queries.")
@click.option("--taps", type=Layers(), default=None, help="Read at these LLM layers; default: last of each third.")
@click.option("--decoder-width", type=click.IntRange(min=8), default=256, show_default=True)
@click.option("--decoder-layers", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="Store the backbone in this; by default as it is, by links.")
def init(
    backbone: Path,
    out: Path,
    seed: int,
    queries: int,
    taps: tuple[int, ...] | None,
    decoder_width: int,
    decoder_layers: int,
    dtype: str | None,
) -> None:
    """Make a checkpoint from a plain vision-language model: new bridging and spatial parts, untrained.

    A LoRA adapter in the folder, or in its adapter/, is merged.
    """
    from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
    from bridge_stg.model.config import BridgingConfig, SpatialDecoderConfig

    if decoder_width % (heads := 8):
        raise click.UsageError(f"--decoder-width {decoder_width} does not divide by the decoder's {heads} heads.")
    made = init_checkpoint(
        backbone, out, seed=seed, dtype=torch_dtype(dtype),
        bridging=BridgingConfig(num_queries=queries, tapped_layers=taps or ()),
        spatial_decoder=SpatialDecoderConfig(
            width=decoder_width, num_layers=decoder_layers, num_heads=heads, ffn_width=8 * decoder_width
        ),
        progress=lambda stage: click.echo(f"  {stage}", err=True),
    )  # fmt: skip
    click.echo(f"{made} holds an untrained checkpoint. Next: train {made} --annotations … --media … --out …")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--annotations", type=click.Path(path_type=Path), required=True, help="JSON lines: docs/annotations.md.")
@click.option("--media", type=click.Path(path_type=Path), required=True, help="The folder that their paths start from.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new checkpoint: a folder to be made.")
@click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="Times each clip is seen.")
@click.option("--clips", type=click.IntRange(min=1), default=1, show_default=True, help="Clips of a step.")
@click.option("--questions", type=click.IntRange(min=1), default=4, show_default=True, help="Of a clip, at most.")
@click.option("--fine-frames", type=click.IntRange(min=1), default=16, show_default=True, help="Of a clip.")
@click.option("--learning-rate", type=Number(min=0, min_open=True), default=1e-4, show_default=True)
@click.option(
    "--backbone-scale", type=Number(min=0), default=0.1, show_default=True,
    help="Factor on the rate for the backbone.",
)  # fmt: skip
@click.option("--freeze-backbone", is_flag=True, help="Train the bridging and spatial parts alone.")
@click.option("--train-vision", is_flag=True, help="Train the vision blocks too, not their mergers alone.")
@click.option("--max-visual-tokens", type=click.IntRange(min=1), help="What a video may take of the prompt.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:1; auto: CUDA where there is one.")
@click.option(
    "--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Of products."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Store the backbone in this; by default as in CHECKPOINT.")
@click.option("--workers", type=click.IntRange(min=0), default=1, show_default=True, help="Processes that read clips.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume/--no-resume", default=True, help="Whether to go on from the last state beside --out.")
def train(
    checkpoint: Path,
    annotations: Path,
    media: Path,
    out: Path,
    freeze_backbone: bool,
    train_vision: bool,
    precision: str,
    device: str,
    dtype: str | None,
    workers: int,
    resume: bool,
    **options: Any,
) -> None:
    """Train a CHECKPOINT on annotated clips: all but the vision blocks, unless told otherwise."""
    if freeze_backbone and train_vision:
        raise click.UsageError("--freeze-backbone and --train-vision exclude each other; give one of them.")
    from bridge_stg.training.train_clips import NEW_PARTS, PARTS, TrainingOptions, train_clips

    parts = NEW_PARTS if freeze_backbone else PARTS if train_vision else PARTS[:-1]
    chosen = TrainingOptions(parts=parts, bf16=precision == "bf16", **options)
    made = train_clips(
        checkpoint, annotations, media, out, options=chosen, device=device, dtype=torch_dtype(dtype), resume=resume,
        workers=workers,
    )  # fmt: skip
    click.echo(f"{made} holds the checkpoint. Next: export {made} --out …")
