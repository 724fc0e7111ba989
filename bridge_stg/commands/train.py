"""The commands that make checkpoints: `init` from a vision-language model, `train` on your own clips, `train-demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, DTYPES, PATH, Number
from bridge_stg.commands.progress import stage_line
from bridge_stg.runtime.errors import BridgeError


def layers(value: str) -> tuple[int, ...]:
    """Return indices of layers, separated by commas in `value`."""
    try:
        indices = tuple(int(index) for index in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a list of layers; expected indices from 0, as in 8,17,26."
        ) from None
    if list(indices) != sorted(set(indices)):
        raise click.BadParameter(f"{value!r} is not in order; expected increasing indices, each once.")
    return indices


def torch_dtype(name: str | None) -> Any:
    """Return torch's dtype for one of `DTYPES`, None for None."""
    import torch

    return {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


resume_option = click.option(
    "--resume/--no-resume", default=True, help="Whether to resume from the state next to --out."
)


@click.command()
@click.option("--backbone", type=PATH, required=True, help="Folder of a Hugging Face model.")
@options.out_option("the checkpoint")
@options.seed_option
@click.option(
    "--like", type=click.Choice(["paper"]),
    help="Sizes of the paper as far as published, for any backbone (docs/training.md); --queries etc. override them.",
)  # fmt: skip
@click.option("--queries", type=COUNT, help="Number of bridging queries; default: 8.")
@click.option("--taps", type=layers, help="LLM layers to tap; default: the last layer of each third.")
@click.option("--decoder-width", type=click.IntRange(min=8), help="Default: 256, or the LLM's width if that is less.")
@click.option("--decoder-layers", type=COUNT, help="Default: 6.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Stored precision of the backbone; default: unchanged, as links."
)
@options.adapter_option
def init(
    *, backbone: Path, out: Path, seed: int, like: str | None, queries: int | None, taps: tuple[int, ...] | None,
    decoder_width: int | None, decoder_layers: int | None, dtype: str | None, adapter: str | None,
) -> None:  # fmt: skip
    """Create a checkpoint from a vision-language model, with new, untrained bridging and spatial parts.

    A LoRA adapter is merged if it is in the folder, in its adapter/, or below one of them.
    """
    from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
    from bridge_stg.model.config import BridgingConfig, SpatialDecoderConfig

    def spatial_decoder(hidden_size: int) -> SpatialDecoderConfig:
        fitting = SpatialDecoderConfig() if like else SpatialDecoderConfig.fitting(hidden_size)
        sizes = SpatialDecoderConfig.of_width(decoder_width) if decoder_width else fitting
        return dataclasses.replace(sizes, num_layers=decoder_layers or sizes.num_layers)

    made = init_checkpoint(
        backbone, out, seed=seed, dtype=torch_dtype(dtype), adapter=adapter,
        bridging=BridgingConfig(num_queries=queries or BridgingConfig.num_queries, tapped_layers=taps or ()),
        spatial_decoder=spatial_decoder, progress=stage_line,
    )  # fmt: skip
    click.echo(f"Wrote the untrained checkpoint {made}. Next: train {made} --annotations … --media … --out …")


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--annotations", type=PATH, required=True, help="JSON lines; see docs/annotations.md.")
@click.option("--media", type=PATH, required=True, help="Folder of their videos and images.")
@options.out_option("the new checkpoint")
@click.option("--epochs", type=COUNT, default=10, show_default=True, help="Passes over all clips.")
@click.option("--clips", type=COUNT, default=1, show_default=True, help="Clips per step.")
@click.option(
    "--queries", "--questions", "questions", type=COUNT, default=4, show_default=True, help="Maximum queries per clip."
)
@click.option("--fine-frames", type=COUNT, default=16, show_default=True, help="Fine frames per clip.")
@click.option("--learning-rate", type=Number(min=0, min_open=True), default=1e-4, show_default=True)
@click.option(
    "--backbone-scale", type=Number(min=0), default=0.1, show_default=True, help="Learning rate factor of the backbone."
)
@click.option("--freeze-backbone", is_flag=True, help="Train only the bridging and spatial parts.")
@click.option("--train-vision", is_flag=True, help="Train the vision blocks too, not only their mergers.")
@click.option("--max-visual-tokens", type=COUNT, help="Maximum visual tokens per video.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:1; auto: CUDA if it is available.")
@click.option(
    "--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Precision of matmuls."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Stored precision of the backbone; default: as in CHECKPOINT.")
@options.adapter_option
@click.option("--workers", type=click.IntRange(min=0), default=1, show_default=True, help="Processes that read clips.")
@options.seed_option
@resume_option
def train(
    *, checkpoint: Path, annotations: Path, media: Path, out: Path, freeze_backbone: bool, train_vision: bool,
    precision: str, device: str, dtype: str | None, adapter: str | None, workers: int, resume: bool, **options: Any,
) -> None:  # fmt: skip
    """Train a CHECKPOINT on annotated clips: by default everything except the vision blocks."""
    if freeze_backbone and train_vision:
        raise BridgeError("options.conflict", "--freeze-backbone and --train-vision exclude each other; leave one out.")
    from bridge_stg.training.train_clips import NEW_PARTS, PARTS, TrainingOptions, train_clips

    parts = NEW_PARTS if freeze_backbone else PARTS if train_vision else PARTS[:-1]
    chosen = TrainingOptions(parts=parts, bf16=precision == "bf16", **options)
    made = train_clips(
        checkpoint, annotations, media, out, options=chosen, device=device, dtype=torch_dtype(dtype), adapter=adapter,
        resume=resume, workers=workers,
    )  # fmt: skip
    click.echo(f"Wrote the checkpoint {made}. Next: export {made} --out …")


@click.command("train-demo")
@click.option("--out", type=PATH, default=Path("build/demo/checkpoint"), show_default=True, help="Checkpoint folder.")
@click.option(
    "--heads", type=click.Choice(["bridge", "text"]), default="bridge", show_default=True,
    help="What answers; text heads are trained from the demo checkpoint of a source tree.",
)  # fmt: skip
@click.option("--vision-steps", type=COUNT, help="Steps of the first stage; default: the recipe's.")
@click.option("--grounding-steps", type=COUNT, help="Steps of the second stage; default: the recipe's.")
@click.option("--text-steps", type=COUNT, help="Steps with --heads text; default: the recipe's.")
@options.seed_option
@resume_option
def train_demo(
    *, out: Path, heads: str, vision_steps: int | None, grounding_steps: int | None, text_steps: int | None, **rest: Any
) -> None:
    """Train the demo checkpoint on synthetic clips: from scratch, or text heads on its backbone."""
    if heads == "text":
        if vision_steps or grounding_steps:
            message = "--vision-steps and --grounding-steps train bridge heads; with --heads text, use --text-steps."
            raise BridgeError("options.conflict", message)
        from bridge_stg.demo.text_heads.train import train_text_demo

        made = train_text_demo(out, steps=text_steps, **rest)
    else:
        if text_steps:
            raise BridgeError("options.conflict", "--text-steps needs --heads text.")
        from bridge_stg.demo.train import train_demo as train_checkpoint

        made = train_checkpoint(out, vision_steps=vision_steps, grounding_steps=grounding_steps, **rest)
    click.echo(f"Wrote the checkpoint {made}.")
