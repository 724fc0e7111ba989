"""Train a checkpoint by a recipe: stage after stage, each of which begins with the checkpoint of the one before.

States, logs and the checkpoints of finished stages are in `OUT-training`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bridge_stg.checkpoint.checkpoint import checkpoint_key, load_config, load_weights, open_checkpoint, open_weights
from bridge_stg.checkpoint.init_checkpoint import link_weights, write_weights
from bridge_stg.checkpoint.weight_store import (
    PART_FILES,
    PART_KEYS,
    TOKENIZER,
    WEIGHTS,
    WeightStore,
    require_new,
    weight_files,
)
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime.bundle.bundle import file_sha256
from bridge_stg.runtime.errors import BridgeError, CheckpointError
from bridge_stg.runtime.host.files import replace_folder, require_space, temporary_sibling
from bridge_stg.training.data.clips import ClipBatches
from bridge_stg.training.data.index import Index, check_clips
from bridge_stg.training.data.mixture import Mixture
from bridge_stg.training.data.sources import read_clips
from bridge_stg.training.estimate.estimate import estimate
from bridge_stg.training.folder import locked_run, require_apart, training_folder
from bridge_stg.training.loop.distribution import Processes, full_tensor
from bridge_stg.training.loop.log import progress_bar
from bridge_stg.training.loop.trainer import Run, StageTrainer, TrainingStopped, clips_per_process, make_optimizer
from bridge_stg.training.loss.clip_task import ClipTask
from bridge_stg.training.parts import adapted_layers, add_lora, part_of, part_of_key, save_adapter, trained_parameters
from bridge_stg.training.recipe import LORA, NEW_PARTS, Stage, TrainingRecipe
from bridge_stg.training.report.report import write_report
from bridge_stg.training.validation import Validator, metrics

ADAPTER_FOLDER = "adapter"


def train_checkpoint(
    checkpoint: Path | str, out: Path | str, recipe: TrainingRecipe, *, device: str = "auto",
    dtype: torch.dtype | None = None, adapter: Path | str | None = None, overwrite: bool = False, resume: bool = True,
    workers: int = 1, tracker: str | None = None, shard: bool | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Path:  # fmt: skip
    """Train a checkpoint, and write a new one to `out`; return `out`.

    Its config says `"trained": true`, and has no section `knows`. If the last stage trains LoRA adapters, they are in
    `out/adapter/`, beside an unchanged backbone, and `export` merges them. All processes of an `accelerate launch` call
    this.

    Args:
        checkpoint: folder of a Bridge-STG checkpoint.
        out: folder to create.
        recipe: data, validation and stages.
        device: `auto` (CUDA if it is available), `cpu` or `cuda`.
        dtype: stored dtype of the backbone; None: as in `checkpoint`.
        adapter: name or path of a LoRA adapter to merge first; None: the only one in the folder, if any.
        overwrite: whether to replace a checkpoint at `out` when the training has ended.
        resume: whether to continue from the states in `OUT-training`.
        workers: number of processes that make batches, for each training process; 0: none.
        tracker: one of `distribution.TRACKERS` to log to, or None.
        shard: see `Processes`.
        progress: called with texts to show: a summary of the data, and the name of each stage.

    Raises:
        TrainingStopped: a signal ended the training; calling again continues it.
        BridgeError: annotations, media, the checkpoint or the recipe cannot be used, or the loss diverged.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    checkpoint, out = Path(checkpoint), Path(out)
    require_new(out, source=checkpoint, overwrite=overwrite)
    require_apart(out, checkpoint)
    config = trainable_config(checkpoint)
    folder = training_folder(out)
    _, store = open_weights(checkpoint, config, adapter=adapter)
    processes = Processes(device, tracker=tracker, folder=folder, shard=shard)
    report = progress if processes.is_main else lambda text: None
    check_stages(recipe, config, processes)
    index = check_data(recipe, config, show=processes.is_main)
    validator = Validator(recipe.validation, recipe.seed) if recipe.validation else None
    for line in [*index.summary().splitlines(), *(validator.summary().splitlines() if validator else ())]:
        report(line)
    with processes.reporting_ended(), ExitStack() as stack:
        if processes.is_main:
            require_space(out, needed_bytes(store, recipe), purpose="the training")
            now = run_identity(recipe, index, checkpoint, store)
            stack.enter_context(locked_run(folder, now, resume=resume))
        processes.wait()
        processes.accelerator.init_trackers("bridge-stg", {"recipe": json.dumps(recipe.to_dict())})
        run = Run(
            folder, processes, seed=recipe.seed, workers=workers, resume=resume, save_every_s=recipe.save_every_s,
            max_broken=recipe.data.max_broken, log_every=recipe.log_every,
        )  # fmt: skip
        start = checkpoint
        for number, stage in enumerate(recipe.stages):
            is_last = number + 1 == len(recipe.stages)
            finished = out if is_last else folder / stage.name
            if resume and not is_last and (finished / "config.json").is_file():
                start, adapter = finished, None
                continue
            mixture = Mixture(index, recipe.data, recipe.seed, number, stage.clips)
            report(f"stage {stage.name}: {stage.steps} steps")
            try:
                train_stage(
                    start, finished, stage, recipe, mixture, run, validator,
                    adapter=adapter, dtype=dtype, overwrite=overwrite,
                )  # fmt: skip
            except TrainingStopped:  # in all processes, after the same step
                processes.end()
                raise
            start, adapter = finished, None
        if processes.is_main:
            write_report(folder, validator=validator)
        processes.end()
    return out


def trainable_config(checkpoint: Path) -> BridgeSTGConfig:
    """Return the config of a checkpoint with bridge heads. Raises CheckpointError if it has others."""
    config = load_config(checkpoint)
    if config.heads != "bridge":
        message = f"{checkpoint}: has {config.heads} heads, and only bridge heads are trained; begin with `init`"
        raise CheckpointError("checkpoint.wrong_model_type", message)
    return config


def check_stages(recipe: TrainingRecipe, config: BridgeSTGConfig, processes: Processes) -> None:
    """Raise BridgeError if a stage, also a later one, cannot be trained on this model and on these processes."""
    with torch.device("meta"):
        model = BridgeSTG(config)
    check_distribution(recipe, processes.count, sharded=processes.shard)
    for stage in recipe.stages:
        make_optimizer([{"params": [torch.zeros(1)]}], stage)
        if stage.lora is not None:
            adapted_layers(model, stage.lora)


def check_distribution(recipe: TrainingRecipe, processes: int, *, sharded: bool) -> None:
    """Raise BridgeError if a stage cannot be distributed over some processes.

    The prefix's keys and values pass from one call of a layer to the next, unseen by FSDP2, which gathers the weights
    for their gradients only if the layer is recomputed.
    """
    for stage in recipe.stages:
        clips_per_process(stage, processes)
        more = stage.lora is not None or set(stage.train) - set(NEW_PARTS)
        if sharded and processes > 1 and more and not stage.checkpoint_activations:
            message = f"stage {stage.name}: trains more than the new parts with sharded weights"
            raise BridgeError("training.bad_recipe", f"{message}, which needs 'checkpoint_activations: true'")


def check_data(recipe: TrainingRecipe, config: BridgeSTGConfig, *, show: bool = True) -> Index:
    """Check annotations and media, with a progress bar. Raises BridgeError, also if the recipe names none."""
    if not recipe.data.sources:
        message = "data.sources is empty; name your annotations in a recipe with `base`, or give --annotations"
        raise BridgeError("training.bad_recipe", message)
    clips = read_clips(recipe.data.sources)
    most = recipe.data.max_broken
    with progress_bar("checking clips", unit="clip", show=show) as progress:
        return check_clips(clips, recipe.data.sources, config.model_spec(), max_broken=most, progress=progress)


def describe_training(
    checkpoint: Path | str, recipe: TrainingRecipe, *, gpu: str | None = None, devices: int = 1, shard: bool = False
) -> str:  # fmt: skip
    """Return a text with the data that a training will read, and its estimated memory and hours.

    `gpu` is one of `runtime.device.table.GPUS`, None: no hours. Without sources, only the estimate. Raises
    BridgeError as `train_checkpoint` does.
    """
    config, texts = trainable_config(Path(checkpoint)), []
    check_distribution(recipe, devices, sharded=shard)
    lengths: dict[str, Any] = {}
    if recipe.data.sources:
        index = check_data(recipe, config)
        texts.append(index.summary())
        seconds = [size.medium.duration_s for size in index.sizes if size.medium.duration_s is not None]
        lengths = {"mean_s": sum(seconds) / len(seconds), "longest_s": max(seconds)} if seconds else {}
    if recipe.validation:
        texts.append(Validator(recipe.validation, recipe.seed).summary())
    found = estimate(config, recipe, gpu=gpu, devices=devices, sharded=shard and devices > 1, **lengths)
    return "\n".join([*texts, "", found.table()])


def train_stage(  # noqa: PLR0917
    checkpoint: Path, out: Path, stage: Stage, recipe: TrainingRecipe, mixture: Mixture, run: Run,
    validator: Validator | None, *, adapter: Path | str | None = None, dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Train one stage, and write its checkpoint. All processes call this."""
    attention = "sdpa" if run.processes.device.type == "cuda" else None
    model, store = open_checkpoint(checkpoint, attention=attention, adapter=adapter)
    load_weights(model.train(), store)
    assert model.tokenizer is not None
    torch.manual_seed(recipe.seed)  # of new adapters
    lora = None if stage.lora is None else add_lora(model, stage.lora)
    half = recipe.precision == "bf16" and store.dtype == torch.bfloat16
    task = ClipTask(model, bf16=recipe.precision == "bf16")
    trained = trained_parameters(task, stage, frozen=torch.bfloat16 if half else None)
    for module in (model.language_model, model.vision_encoder):
        module.checkpoint_activations = stage.checkpoint_activations

    def validate(step: int) -> Mapping[str, float]:
        assert validator is not None
        grounder = torch_grounder(model.eval(), autocast=torch.bfloat16 if task.bf16 else None)
        processes = run.processes
        with progress_bar("validation", unit="sample", show=processes.is_main) as progress:
            own = validator.validate(grounder, process=processes.rank, processes=processes.count, progress=progress)
        rows = [row for some in processes.gather(own) for row in some]
        if processes.is_main:
            validator.write(run.folder, stage.name, step, rows)
        return metrics(rows)

    trainer = StageTrainer(
        stage, task, trained, ClipBatches(model.spec, checkpoint / TOKENIZER, mixture), run,
        units=model.language_model.model.layers, validation=recipe.validation,
        validate=None if validator is None else validate,
    )  # fmt: skip
    trainer.train()
    values = {name.removeprefix("model."): full_tensor(value) for name, value in trainer.trained.items()}
    if run.processes.is_main:
        done = dataclasses.replace(model.config, trained=True, knows=None)
        if out.parent != run.folder:
            require_new(out, source=checkpoint, overwrite=overwrite)
        with temporary_sibling(out) as partial:
            partial.mkdir()
            save_trained(partial, checkpoint, done, store, values, dtype=dtype)
            if lora is not None:
                save_adapter(lora, {k: v for k, v in values.items() if part_of(k) == LORA}, partial / ADAPTER_FOLDER)
            replace_folder(partial, out)
    run.processes.wait()


def save_trained(
    folder: Path, checkpoint: Path, config: BridgeSTGConfig, store: WeightStore, values: Mapping[str, torch.Tensor], *,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint: trained `values` by parameter name, all others from `store`.

    The new parts have files of their own, in float32. Files of an unchanged backbone are linked or copied.
    """
    changed = {checkpoint_key(name): value for name, value in values.items() if part_of(name) != LORA}
    dtype = dtype or store.dtype
    for name, prefix in zip(PART_FILES, PART_KEYS):
        keys = [key for key in store if key.startswith(prefix)]
        write_weights(folder / name, store, keys, dtype=torch.float32, changed=changed)
    backbone = [key for key in store if not key.startswith(PART_KEYS)]
    files = [file for file in weight_files(checkpoint) if file.name not in PART_FILES]
    own = {tensor.path for key, tensor in store.items() if key.startswith(PART_KEYS)}
    same = all(store.raw(key) and store[key].dtype == dtype and key not in changed for key in backbone)
    if same and not own & set(files):
        link_weights(files, folder)
    else:
        write_weights(folder / WEIGHTS, store, backbone, dtype=dtype, changed=changed)
    config.save(folder)
    shutil.copyfile(checkpoint / TOKENIZER, folder / TOKENIZER)


def needed_bytes(store: WeightStore, recipe: TrainingRecipe) -> int:
    """Return the disk space of the states and checkpoints of a training, at most."""
    counts = {key: math.prod(tensor.shape) for key, tensor in store.items()}
    needed = 0
    for stage in recipe.stages:
        full = sum(n for key, n in counts.items() if part_of_key(key) in stage.train)
        states = 2 if recipe.validation else 1
        needed += (states + 1) * 12 * full
        if set(stage.train) - set(NEW_PARTS):
            needed += sum(tensor.length for tensor in store.values())
    return needed


def file_sample_sha256(path: Path, *, blocks: int = 64, size: int = 2**16) -> str:
    """Return the SHA-256 of some blocks of a file, evenly spaced: other weights of the same shapes differ in most."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for place in range(blocks):
            file.seek(max(0, path.stat().st_size - size) * place // (blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def run_identity(recipe: TrainingRecipe, index: Index, checkpoint: Path, store: WeightStore) -> dict[str, Any]:
    """Return what must not change when a run is resumed: recipe, hashes, sizes of the weights."""
    return {
        **recipe.to_dict(),
        "annotations": index.digest,
        "config": file_sha256(checkpoint / "config.json"),
        "weights": [[path.name, path.stat().st_size, file_sample_sha256(path)] for path in store.files],
    }
