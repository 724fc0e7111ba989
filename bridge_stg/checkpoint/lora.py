"""Read PEFT LoRA adapters for merging: W + scale · B A (Hu et al., arXiv 2106.09685).

Covers linear layers, embeddings and convolutions, and tensors that the adapter replaces (`modules_to_save`, trained
biases). Must not know file formats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge_stg.checkpoint.safetensors_file import StoredTensor, rename_key
from bridge_stg.runtime.errors import CheckpointError

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PAIRS = {".lora_A.weight": (".lora_B.weight", False), ".lora_embedding_A": (".lora_embedding_B", True)}
"""Suffix of an A tensor → suffix of its B, and whether the weight is the transpose of B A."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the weights of the base model unchanged."""
CHANGES_MORE = ("use_dora", "layer_replication", "use_qalora", "alora_invocation_tokens", "trainable_token_indices")
"""Settings of unsupported adapters, which do more than add to weights."""
BLOCK_VALUES = 1 << 22
"""Number of values merged at a time; limits the size of the float32 copy."""


@dataclass
class LoraDelta:
    """The addition of an adapter to one weight: scale · B A."""

    a: StoredTensor  # [r, in, …]
    b: StoredTensor  # [out, r, …]
    scale: float  # alpha / r, or alpha / √r for rank-stabilized adapters (arXiv 2312.03732)
    transposed: bool  # whether the weight is (B A)ᵀ, as in embeddings and layers with fan_in_fan_out

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Return whether B A has the shape of a weight."""
        out, inner = self.b.shape[0], math.prod(self.a.shape[1:])
        rows, columns = (inner, out) if self.transposed else (out, inner)
        ranks_agree = math.prod(self.b.shape[1:]) == self.a.shape[0]
        return ranks_agree and len(stored) >= 2 and (stored[0], math.prod(stored[1:])) == (rows, columns)

    def add_to(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add scale · B A to a weight in place, computed in float32 for a block of rows at a time."""
        left, right = b.float().flatten(1), a.float().flatten(1)
        if self.transposed:
            left, right = right.T, left.T
        flat = weight.view(weight.shape[0], -1)
        step = max(1, BLOCK_VALUES // flat.shape[1])
        for first in range(0, len(flat), step):
            rows = flat[first : first + step]
            rows.copy_(rows.float() + self.scale * (left[first : first + step] @ right))


@dataclass(frozen=True)
class Adapter:
    """The config and the path of the weights of an adapter."""

    config: Mapping[str, Any]
    weights: Path

    def scale_of(self, module: str, rank: int) -> float:
        """Return the scale of one module's delta from the config's `alpha_pattern` or `lora_alpha`."""
        patterns = self.config.get("alpha_pattern") or {}
        fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(next(fitting, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def adapter_folder(folder: Path) -> Adapter | None:
    """Return the adapter in a folder or in its `adapter/`, None without any; raise if it is not plain LoRA."""
    places = [place for place in (folder, folder / "adapter") if any((place / n).is_file() for n in (CONFIG, ADAPTER))]
    if not places:
        return None
    if len(places) > 1:
        message = f"{folder}: contains an adapter, and so does {places[1]}; keep one of them"
        raise CheckpointError("checkpoint.bad_adapter", message)
    path, weights = places[0] / CONFIG, places[0] / ADAPTER
    for file, hint in ((path, "it has the adapter's scale"), (weights, "pickled adapters are never read: save it "
                       "again with peft's save_pretrained(…, safe_serialization=True)")):  # fmt: skip
        if not file.is_file():
            message = f"{file}: no such file, but the folder contains the rest of a LoRA adapter; {hint}"
            raise CheckpointError("checkpoint.missing_file", message)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError("checkpoint.bad_adapter", f"{path}: cannot be read as a JSON object ({error})") from error
    unsupported = [f"{name} {config[name]!r}" for name in CHANGES_MORE if config.get(name)]
    if kind != "LORA":
        unsupported.append(f"peft_type {kind!r}")
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights {start!r}")
    if unsupported:
        message = f"{path}: has {unsupported[0]}, but only plain LoRA can be merged here"
        hint = "merge it with peft's merge_and_unload() and save the whole model"
        raise CheckpointError("checkpoint.unsupported_adapter", f"{message}; {hint}")
    return Adapter(config, weights)


def deltas_and_replacements(
    adapter: Adapter, held: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], prefixes: Mapping[str, str]
) -> tuple[dict[str, LoraDelta], dict[str, StoredTensor]]:
    """Return the deltas of an adapter, and the tensors that it replaces, by the model's keys.

    `held` are the adapter's tensors without peft's `base_model.model.`, and `base` the model's; see
    `Backbone.key_prefixes` for `prefixes`. Raises CheckpointError if the model has no such tensor of this shape.
    """
    deltas: dict[str, LoraDelta] = {}
    replacements: dict[str, StoredTensor] = {}
    used = set()
    for name, tensor in held.items():
        suffix = next((suffix for suffix in PAIRS if name.endswith(suffix)), None)
        if suffix is None:
            continue
        module = name.removesuffix(suffix).removesuffix(".base_layer")
        other, transposed = PAIRS[suffix]
        partner = held.get(name.removesuffix(suffix) + other)
        if partner is None:
            raise CheckpointError("checkpoint.bad_adapter", f"{adapter.weights}: has {name} without its {other[1:]}")
        key = rename_key(f"{module}.weight", prefixes)
        delta = LoraDelta(
            a=tensor, b=partner, scale=adapter.scale_of(module, tensor.shape[0]),
            transposed=transposed or bool(adapter.config.get("fan_in_fan_out")),
        )  # fmt: skip
        check_target(adapter, name, key, base)
        if not delta.fits(base[key].shape):
            message = (
                f"{adapter.weights}: {name} {list(tensor.shape)} and its B {list(partner.shape)} do not fit {key} "
            )
            raise CheckpointError(
                "checkpoint.bad_adapter", f"{message}{list(base[key].shape)}; it belongs to another model"
            )
        deltas[key] = delta
        used |= {name, name.removesuffix(suffix) + other}
    for name in held.keys() - used:
        if ".lora_" in name:
            message = f"{adapter.weights}: {name} is not plain LoRA; merge the adapter with peft's merge_and_unload()"
            raise CheckpointError("checkpoint.unsupported_adapter", message)
        key = rename_key(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."), prefixes)
        check_target(adapter, name, key, base)
        if held[name].shape != base[key].shape:
            message = f"{adapter.weights}: {name} has shape {list(held[name].shape)}, expected {list(base[key].shape)}"
            raise CheckpointError("checkpoint.bad_adapter", message)
        replacements[key] = held[name]
    return deltas, replacements


def check_target(adapter: Adapter, name: str, key: str, base: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if the model lacks the tensor that an adapter's tensor changes."""
    if key not in base:
        tied = ". A tied head cannot have its own adapter" if key == "lm_head.weight" else ""
        message = f"{adapter.weights}: {name} would change {key}, which the model does not have"
        raise CheckpointError("checkpoint.bad_adapter", f"{message}; it belongs to another model{tied}")
