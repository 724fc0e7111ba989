"""The parts of a model: which of its weights a stage trains, at which rate, and its LoRA adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from bridge_stg.checkpoint.checkpoint import checkpoint_key, save_files
from bridge_stg.checkpoint.lora import ADAPTER
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.training.recipe import AUXILIARY, LORA, Lora, Stage


def part_of(name: str) -> str:
    """Return the part, one of `recipe.PARTS`, `LORA` or `AUXILIARY`, of a parameter of a task or model."""
    if ".lora_" in name:
        return LORA
    try:
        return part_of_key(checkpoint_key(name.removeprefix("model.")))
    except KeyError:
        return AUXILIARY


def part_of_key(key: str) -> str:
    """Return the part, one of `recipe.PARTS`, of a checkpoint key."""
    if key.startswith("model.visual."):
        return "mergers" if "merger" in key else "vision"
    return {"bridging": "bridging", "spatial_decoder": "spatial"}.get(key.partition(".")[0], "llm")


def trained_parameters(task: nn.Module, stage: Stage, *, frozen: torch.dtype | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters that a stage trains, by name, as float32; freeze all others.

    `frozen` is the dtype of the frozen matrices of the backbone, None: unchanged. Its vectors (biases, norms) stay in
    float32, which torch's norms need on a CPU.
    """
    found = {}
    for name, parameter in task.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in (*stage.train, LORA, AUXILIARY))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            found[name] = parameter
        elif frozen is not None and part in ("mergers", "llm", "vision") and parameter.ndim > 1:
            parameter.data = parameter.data.to(frozen)
    return found


def parameter_groups(trained: Mapping[str, nn.Parameter], stage: Stage) -> list[dict[str, Any]]:
    """Return AdamW's groups, one per part and weight decay; `scale` is a factor on the learning rate.

    Vectors (biases, norms) and embeddings have no weight decay.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trained.items():
        decays = parameter.ndim > 1 and "embed" not in name and "queries" not in name
        members[stage.rates.get(part_of(name), 1.0), stage.weight_decay * decays].append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay} for (scale, decay), parameters in members.items()
    ]


def adapted_layers(model: BridgeSTG, lora: Lora) -> list[str]:
    """Return the names of the linear layers that get adapters.

    Raises BridgeError if one of the parts has no layer with one of the names.
    """
    found: dict[str, list[str]] = {part: [] for part in lora.parts}
    names: dict[str, set[str]] = {part: set() for part in lora.parts}
    for name, module in model.named_modules():
        part, last = part_of(name), name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and module is not model.language_model.lm_head and part in found:
            names[part].add(last)
            found[part] += [name] if last in lora.modules else []
    for part, layers in found.items():
        if not layers:
            chosen = ", ".join(lora.modules) or "none"
            message = f"lora.modules: {part} has no linear layer with one of the names {chosen}"
            raise BridgeError("training.bad_recipe", f"{message}; it has {', '.join(sorted(names[part]))}")
    return [name for layers in found.values() for name in layers]


def add_lora(model: BridgeSTG, lora: Lora) -> LoraConfig:
    """Add adapters to linear layers of the model, in place; return peft's config of the adapter.

    Raises BridgeError as `adapted_layers` does.
    """
    names = adapted_layers(model, lora)
    options: dict[str, Any] = {
        "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "lora_dropout": lora.dropout,
    }  # fmt: skip
    LoraModel(model, LoraConfig(target_modules=names, **options), "default")
    published = [checkpoint_key(f"{name}.weight").removesuffix(".weight") for name in names]
    return LoraConfig(target_modules=published, inference_mode=True, **options)


def save_adapter(config: LoraConfig, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a peft adapter, given its tensors by parameter name, whose keys are those of the published backbone."""
    config.save_pretrained(str(folder))
    stored = {
        f"base_model.model.{checkpoint_key(name.removeprefix('model.')).replace('.default.', '.')}": value
        for name, value in tensors.items()
    }
    save_files({ADAPTER: stored}, folder)
