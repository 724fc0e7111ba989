"""A resumable training loop: steps, learning rate, saved states and a log. Must not know the model and its data."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host.files import replacing

CHECKPOINT_SECONDS = 300.0
LOG_EVERY = 50


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Return the learning rate of `step`: linear warm-up, then a cosine down to 3 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * (0.97 * cosine + 0.03)


def run_stage(
    name: str, model: nn.Module, groups: Sequence[dict[str, Any]],
    loss: Callable[[Any, int], tuple[Tensor, dict[str, float]]], make_batch: Callable[[int], Any], *, folder: Path,
    total_steps: int, peak_rate: float, warmup: int = 200, resume: bool = True, workers: int = 1,
    every: Callable[[int], dict[str, float]] | None = None,
) -> None:  # fmt: skip
    """Train `model` for `total_steps`, saving to `folder/<name>.safetensors` at least every five minutes.

    Args:
        name: name of the stage, for file names and the log.
        model: module to train and save.
        groups: AdamW parameter groups; an entry `scale` multiplies the learning rate of a group.
        loss: function of (batch, step) that returns the loss and values to log.
        make_batch: function that returns the batch of a step, independent of earlier steps; runs in a worker process.
        folder: folder of the state and `log.jsonl`.
        total_steps: number of steps of the whole stage, including those before resuming.
        peak_rate: largest learning rate.
        warmup: number of steps of linear warm-up.
        resume: whether to continue from the saved state, if one exists.
        workers: number of worker processes; 0: make batches in this process.
        every: function of the step that returns more values to log; called at each save.
    """
    scales = [group.pop("scale", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.02)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    path = folder / f"{name}.safetensors"
    first, seconds = load_state(path, model, optimizer) if resume and path.exists() else (0, 0.0)
    steps, collate, prefetch = range(first, total_steps), cast(Any, make_batch), 4 if workers else None
    loader: Iterable[Any] = DataLoader(
        cast(Any, steps), batch_size=None, collate_fn=collate, num_workers=workers, prefetch_factor=prefetch
    )
    started, saved, steps_figures = time.monotonic() - seconds, time.monotonic(), []
    progress = tqdm(loader, name, total=total_steps, initial=first, unit="step", mininterval=5)
    for step, batch in enumerate(progress, first):
        for group, scale in zip(optimizer.param_groups, scales):
            group["lr"] = scale * learning_rate(step, total_steps, peak_rate, warmup)
        value, figures = loss(batch, step)
        if not torch.isfinite(value):
            message = f"stage {name}: the loss is {value.item()} at step {step}; {path} contains an earlier state"
            raise CheckpointError("training.diverged", message)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps_figures.append(figures)
        done = step + 1
        if done % LOG_EVERY == 0 or done == total_steps:
            log(folder, stage=name, step=done, seconds=round(time.monotonic() - started), **means(steps_figures))
            steps_figures = []
        if done == total_steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
            if every is not None:
                log(folder, stage=name, step=done, **every(done))
            save_state(path, model, optimizer, done, time.monotonic() - started)
            saved = time.monotonic()


def means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the mappings that have it."""
    names = dict.fromkeys(name for one in figures for name in one)
    values = {name: [one[name] for one in figures if name in one] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def log(folder: Path, **figures: Any) -> None:
    """Append one line to `folder/log.jsonl`."""
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    """Write model, optimizer moments and step; an interrupted write leaves the previous state."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v.contiguous() for k, v in state.items()}
    with replacing(path) as partial:
        save_file(_without_sharing(tensors), partial, {"step": str(step), "seconds": str(seconds)})


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load a saved state; return (step, seconds). Raises CheckpointError if it is damaged or another model's."""
    moments: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            meta, names = file.metadata(), list(file.keys())
            weights = {k[6:]: file.get_tensor(k) for k in names if k.startswith("model.")}
            for key in names:
                if key.startswith("optimizer."):
                    _, index, name = key.split(".")
                    moments.setdefault(int(index), {})[name] = file.get_tensor(key)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        place = int(meta["step"]), float(meta["seconds"])
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        message = f"{path}: cannot be resumed ({error}); start again with --no-resume"
        raise CheckpointError("training.wrong_state", message) from error
    tied = {k for k in missing if k.endswith("lm_head.weight")}
    if set(missing) - tied or unexpected:
        message = f"{path}: does not fit this model (missing {missing[:3]}, unexpected {unexpected[:3]})"
        raise CheckpointError("training.wrong_state", message)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return place


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop tied duplicates, since safetensors does not store shared memory."""
    seen: dict[int, str] = {}
    return {k: v for k, v in tensors.items() if v.numel() == 0 or seen.setdefault(v.data_ptr(), k) == k}
