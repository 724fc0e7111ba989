"""The commands that make checkpoints: `init` from a vision-language model, `train` on your own clips, `train-demo`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, DTYPES, PATH, Count, OutputFolder
from bridge_stg.commands.progress import LOG, stage_line
from bridge_stg.runtime.device.table import GPUS
from bridge_stg.runtime.errors import BridgeError

TRACKERS = ("tensorboard", "wandb")
"""Names of `training.loop.distribution.TRACKERS`, which is imported with torch."""


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


def is_main_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def exit_if_stopped() -> Iterator[None]:
    """Exit with the code of the signal that stopped a training."""
    from bridge_stg.training.loop.trainer import TrainingStopped

    try:
        yield
    except TrainingStopped as stopped:
        if is_main_process():
            LOG.warning("%s", stopped)
        click.get_current_context().exit(128 + stopped.signal)


resume_option = click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Whether to resume from the state next to --out."
)


@click.command()
@click.option("--backbone", type=PATH, required=True, help="Folder of a Hugging Face model.")
@options.out_option("the checkpoint")
@options.overwrite_option("checkpoint")
@options.seed_option
@click.option(
    "--like", type=click.Choice(["paper"]),
    help="Use the sizes that the paper publishes, for any backbone (docs/training.md); the next options override them.",
)  # fmt: skip
@click.option("--queries", type=COUNT, help="Number of bridging queries; default: 8.")
@click.option("--taps", type=layers, help="LLM layers to tap; default: the last layer of each third.")
@click.option(
    "--decoder-width", type=Count(min=8),
    help="Width of the spatial decoder; default: 256, or the LLM's if that is less.",
)  # fmt: skip
@click.option("--decoder-layers", type=COUNT, help="Layers of the spatial decoder; default: 6.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Stored precision of the backbone; default: its own, without a copy."
)
@options.adapter_option
def init(
    *, backbone: Path, out: Path, seed: int, like: str | None, queries: int | None, taps: tuple[int, ...] | None,
    decoder_width: int | None, decoder_layers: int | None, dtype: str | None, adapter: str | None, overwrite: bool,
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
        backbone, out, seed=seed, dtype=torch_dtype(dtype), adapter=adapter, overwrite=overwrite,
        bridging=BridgingConfig(num_queries=queries or BridgingConfig.num_queries, tapped_layers=taps or ()),
        spatial_decoder=spatial_decoder, progress=stage_line,
    )  # fmt: skip
    click.echo(f"Wrote the untrained checkpoint {made}. Next: train {made} --recipe … --out …")


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--recipe", "recipe_name", required=True, help="YAML file, or name of a shipped recipe.")
@click.option("--annotations", type=PATH, help="JSON lines to train on, in place of the recipe's data.sources.")
@click.option("--media", type=PATH, help="Folder of their videos and images; default: that of --annotations.")
@options.out_option("the new checkpoint")
@options.overwrite_option("checkpoint when the training has ended")
@click.option("--device", default="auto", show_default=True, help="cpu or cuda; auto: CUDA if it is available.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Stored precision of the backbone; default: as in CHECKPOINT.")
@options.adapter_option
@click.option("--workers", type=Count(min=0), default=1, show_default=True, help="Processes that read clips.")
@click.option("--tracker", type=click.Choice(TRACKERS), help="Log the curves to this program too.")
@click.option(
    "--shard/--no-shard", default=None, help="Shard weights over processes; default: accelerate's --use_fsdp."
)
@click.option("--dry-run", is_flag=True, help="Check the data, estimate memory and hours, and do not train.")
@click.option("--gpu", type=click.Choice(list(GPUS)), help="With --dry-run: GPU to estimate for.")
@click.option("--devices", type=COUNT, default=1, show_default=True, help="With --dry-run: number of GPUs.")
@resume_option
def train(
    *, checkpoint: Path, recipe_name: str, annotations: Path | None, media: Path | None,
    out: Path, dtype: str | None, dry_run: bool, gpu: str | None, devices: int, **options: Any,
) -> None:  # fmt: skip
    """Train a CHECKPOINT by a recipe, on several devices under `accelerate launch`."""
    from bridge_stg.training.recipe import Source, read_recipe

    recipe = read_recipe(recipe_name)
    if annotations is not None:
        source = Source((str(annotations),), media=None if media is None else str(media))
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=(source,)))
    elif media is not None:
        raise BridgeError("options.conflict", "--media needs --annotations; a recipe names the media of its sources.")
    from bridge_stg.training.train_checkpoint import describe_training, train_checkpoint

    if gpu and not dry_run:
        raise BridgeError(
            "options.conflict", "--gpu needs --dry-run; the devices of a training are those of the machine."
        )
    if dry_run:
        shard = bool(options["shard"])
        click.echo(describe_training(checkpoint, recipe, gpu=gpu, devices=devices, shard=shard))
        return
    with exit_if_stopped():
        made = train_checkpoint(checkpoint, out, recipe, dtype=torch_dtype(dtype), progress=stage_line, **options)
    if is_main_process():
        click.echo(f"Wrote the checkpoint {made}. Next: export {made} --out …")


@click.command("train-demo")
@click.option(
    "--out", type=OutputFolder(), default=Path("build/demo/checkpoint"), show_default=True, help="Checkpoint folder."
)
@click.option(
    "--heads", type=click.Choice(["bridge", "text"]), default="bridge", show_default=True,
    help="Heads to train; text heads are trained on the backbone of a demo checkpoint.",
)  # fmt: skip
@click.option(
    "--start", type=PATH,
    help="Demo checkpoint to start from; default: none, or with --heads text the one of the source tree.",
)  # fmt: skip
@click.option("--vision-steps", type=COUNT, help="Steps of the first stage; default: the recipe's.")
@click.option("--grounding-steps", type=COUNT, help="Steps of the second stage; default: the recipe's.")
@click.option("--text-steps", type=COUNT, help="Steps with --heads text; default: the recipe's.")
@options.seed_option
@resume_option
def train_demo(
    *, out: Path, heads: str, start: Path | None, vision_steps: int | None, grounding_steps: int | None,
    text_steps: int | None, seed: int, resume: bool,
) -> None:  # fmt: skip
    """Train the demo checkpoint on synthetic clips: from scratch, or text heads on its backbone."""
    if heads == "text" and (vision_steps or grounding_steps):
        message = "--vision-steps and --grounding-steps train bridge heads; with --heads text, use --text-steps."
        raise BridgeError("options.conflict", message)
    if heads == "bridge" and text_steps:
        raise BridgeError("options.conflict", "--text-steps needs --heads text.")
    from bridge_stg.demo.text_heads.train import train_text_demo
    from bridge_stg.demo.training import train as demo

    bridge = {"vision": vision_steps, "grounding": grounding_steps}
    recipe = demo.demo_recipe({"text": text_steps} if heads == "text" else bridge, seed=seed)
    train_heads = train_text_demo if heads == "text" else demo.train_demo
    with exit_if_stopped():
        made = train_heads(out, recipe, start=start, resume=resume)
    click.echo(f"Wrote the checkpoint {made}.")
