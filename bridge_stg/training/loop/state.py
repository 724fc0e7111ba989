"""The saved state of a stage: trained weights, their moving averages, the optimizer's moments, and the counts so far.

One safetensors file, whatever the number of processes that wrote it and that read it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bridge_stg.checkpoint.safetensors_file import save_file
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.training.loop.distribution import Processes, distribute_like, full_tensor


@dataclass
class StageProgress:
    """How far a stage has come."""

    step: int = 0  # number of finished steps
    seconds: float = 0.0
    losses: tuple[float, ...] = ()  # of the last good steps
    skipped_steps: int = 0  # without an update, because of their loss
    rollbacks: int = 0  # to the saved state, after several skipped steps
    broken_clips: int = 0  # that could not be read
    validated_step: int = 0  # after which the newest validation was
    best: float | None = None  # value of the validation metric
    best_step: int = 0
    validations_since_best: int = 0
    finished: bool = False


def save_state(  # noqa: PLR0917 - what a state is made of
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor],
    progress: StageProgress, processes: Processes,
) -> None:  # fmt: skip
    """Write a state; an interrupted or failed write leaves the previous one. All processes must call this."""
    tensors = {f"weight/{name}": full_tensor(parameter) for name, parameter in trained.items()}
    tensors |= {f"average/{name}": full_tensor(average) for name, average in averages.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = full_tensor(torch.as_tensor(value))
    if processes.is_main:
        with replacing(path) as partial:
            save_file(tensors, partial, {"progress": json.dumps(dataclasses.asdict(progress))})


def load_state(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor],
) -> StageProgress:  # fmt: skip
    """Load a state into weights, averages and optimizer.

    Raises CheckpointError if it is damaged or another model's; then some weights may have been replaced.
    """
    try:
        with safe_open(path, "pt") as file:
            progress = from_json(StageProgress, json.loads(file.metadata()["progress"]))
            kinds: dict[str, dict[str, str]] = {}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = key.partition("/")
                kinds.setdefault(kind, {})[name] = key
            wrong = set(kinds.get("weight", {})) ^ set(trained) or set(kinds.pop("average", {})) ^ set(averages)
            if wrong:
                raise ValueError(f"it has other weights, such as {sorted(wrong)[0]}")
            with torch.no_grad():
                for name, target in averages.items():
                    target.copy_(distribute_like(file.get_tensor(f"average/{name}"), target))
                for name, key in kinds.pop("weight").items():
                    trained[name].copy_(distribute_like(file.get_tensor(key), trained[name]))
            for kind, keys in kinds.items():
                for name, key in keys.items():
                    optimizer.state[trained[name]][kind] = distribute_like(file.get_tensor(key), trained[name])
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        message = f"{path}: cannot be resumed ({error}); start again with --no-resume"
        raise CheckpointError("training.wrong_state", message) from error
    return progress
