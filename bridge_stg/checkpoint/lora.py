"""Read PEFT LoRA adapters for merging: W + scale · B A (Hu et al., arXiv 2106.09685).

Covers linear layers, embeddings and convolutions, and tensors that the adapter replaces (`modules_to_save`, trained
biases). Must not know file formats.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge_stg.checkpoint.safetensors_file import StoredTensor, rename_key
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host.parse import parse_json_file

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PAIRS = {".lora_A.weight": (".lora_B.weight", False), ".lora_embedding_A": (".lora_embedding_B", True)}
"""Suffix of an A tensor → suffix of its B, and whether the weight is the transpose of B A."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the weights of the base model unchanged."""
SETTINGS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "modules_to_tie", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_modules_to_tie", "task_type", "use_rslora",
})  # fmt: skip
"""Settings in peft's config that plain LoRA may have; any other one may change what it computes."""
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
BLOCK_VALUES = 1 << 22
"""Number of values merged at a time; limits the size of the float32 copy."""


@dataclass
class LoraDelta:
    """The addition of an adapter to one weight: scale · B A."""

    a: StoredTensor  # [r, in, …]
    b: StoredTensor  # [out, r, …]
    scale: float  # alpha / r, or alpha / √r for rank-stabilized adapters (arXiv 2312.03732)
    transposed: bool  # whether the weight is (B A)ᵀ, as in embeddings

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

    def copies(self, name: str) -> bool:
        """Return whether peft trains a copy of the module of a tensor (`modules_to_save`), not the model's own."""
        parts, saved = name.split("."), tuple(self.config.get("modules_to_save") or ())
        return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts)))


def find_adapter(folder: Path, chosen: Path | str | None = None) -> Adapter | None:
    """Return the `chosen` adapter (a name in the model's folder, or a path), or the only one; None if there is none.

    peft saves an adapter in the folder that it is given, or below it under the adapter's name: both are looked for in
    `folder` and in its `adapter/`. Raises CheckpointError if there are several, or it is missing or not plain LoRA.
    """
    roots = [folder, folder / "adapter"]
    if chosen is not None:
        places = [place for place in (*(root / chosen for root in roots), Path(chosen)) if is_adapter(place)][:1]
        if not places:
            message = f"{chosen}: is neither the name of an adapter in {folder} nor the folder of one"
            raise CheckpointError("checkpoint.not_found", f"{message}; check --adapter")
    else:
        below = [place for root in roots if root.is_dir() for place in root.iterdir()]
        places = sorted({place for place in (folder, *below) if is_adapter(place)})
    if len(places) > 1:
        names = ", ".join("." if place == folder else str(place.relative_to(folder)) for place in places)
        message = f"{folder}: contains {len(places)} adapters ({names})"
        hint = "choose one with --adapter NAME|PATH, or keep one of them"
        raise CheckpointError("checkpoint.several_adapters", f"{message}; {hint}")
    return read_adapter(places[0]) if places else None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains a file of an adapter."""
    return any(os.path.isfile(folder / name) for name in (CONFIG, ADAPTER))


def read_adapter(folder: Path) -> Adapter:
    """Return the adapter in a folder; raise CheckpointError if it is incomplete, or not plain LoRA."""
    path, weights = folder / CONFIG, folder / ADAPTER
    for file, hint in ((path, "it has the adapter's scale"), (weights, "pickled adapters are never read: save it "
                       "again with peft's save_pretrained(…, safe_serialization=True)")):  # fmt: skip
        if not file.is_file():
            message = f"{file}: no such file, but the folder contains the rest of a LoRA adapter; {hint}"
            raise CheckpointError("checkpoint.missing_file", message)
    try:
        config = parse_json_file(path)
        kind, patterns = config.get("peft_type"), config.get("alpha_pattern") or {}
        list(map(float, (config.get("lora_alpha", 8), *patterns.values())))
        list(map(re.compile, [*(rf"(.*\.)?({one})$" for one in patterns), *(config.get("modules_to_save") or ())]))
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, re.error) as error:
        raise CheckpointError("checkpoint.bad_adapter", f"{path}: is not a peft config ({error})") from error
    unsupported = [] if kind == "LORA" else [f"peft_type {kind!r}"]
    unsupported += [f"{name} {value!r}" for name, value in config.items() if value and name not in SETTINGS]
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights {start!r}")
    if unsupported:
        message = f"{path}: has {unsupported[0]}, but only plain LoRA can be merged here"
        hint = "merge it with peft's merge_and_unload() and save the whole model"
        raise CheckpointError("checkpoint.unsupported_adapter", f"{message}; {hint}")
    return Adapter(config, weights)


def deltas_and_replacements(
    adapter: Adapter, held: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], prefixes: Mapping[str, str],
    *, tied: bool,
) -> tuple[dict[str, LoraDelta], dict[str, StoredTensor]]:  # fmt: skip
    """Return the deltas of an adapter, and the tensors that it replaces, by the model's keys.

    `held` are the adapter's tensors without peft's `base_model.model.`, and `base` the model's, with a head even if it
    is `tied` to the table; see `Backbone.key_prefixes` for `prefixes`. Raises CheckpointError if the model has no such
    tensor of this shape.
    """
    deltas: dict[str, LoraDelta] = {}
    replacements: dict[str, StoredTensor] = {}
    used = set()
    if not held:
        raise CheckpointError("checkpoint.bad_adapter", f"{adapter.weights}: contains no tensors; save it again")
    for name, tensor in held.items():
        suffix = next((suffix for suffix in PAIRS if name.endswith(suffix)), None)
        if suffix is None:
            continue
        module = name.removesuffix(suffix).removesuffix(".base_layer")
        other, transposed = PAIRS[suffix]
        partner = held.get(name.removesuffix(suffix) + other)
        if partner is None or min(len(tensor.shape), len(partner.shape)) < 2 or not tensor.shape[0]:
            message = f"{adapter.weights}: {name} and its {other[1:]} are not a pair of matrices"
            raise CheckpointError("checkpoint.bad_adapter", message)
        key = rename_key(f"{module}.weight", prefixes)
        delta = LoraDelta(tensor, partner, scale=adapter.scale_of(module, tensor.shape[0]), transposed=transposed)
        check_target(adapter, name, key, base)
        if not delta.fits(base[key].shape):
            message = f"{adapter.weights}: {name} {list(tensor.shape)} and its B {list(partner.shape)} do not fit {key}"
            raise CheckpointError("checkpoint.bad_adapter", f"{message} {list(base[key].shape)} of this model")
        deltas[key] = delta
        used |= {name, name.removesuffix(suffix) + other}
    for name in sorted(held.keys() - used, key=adapter.copies):  # copies last: they replace the model's own tensors
        if ".lora_" in name:
            message = f"{adapter.weights}: {name} is not plain LoRA; merge the adapter with peft's merge_and_unload()"
            raise CheckpointError("checkpoint.unsupported_adapter", message)
        key = rename_key(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."), prefixes)
        check_target(adapter, name, key, base)
        if held[name].shape != base[key].shape:
            message = f"{adapter.weights}: {name} has shape {list(held[name].shape)}, expected {list(base[key].shape)}"
            raise CheckpointError("checkpoint.bad_adapter", message)
        shared = tied and key in (HEAD, EMBEDDING) and not adapter.copies(name)
        replacements |= dict.fromkeys((HEAD, EMBEDDING) if shared else (key,), held[name])
    return deltas, replacements


def check_target(adapter: Adapter, name: str, key: str, base: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if the model lacks the tensor that an adapter's tensor changes."""
    if key not in base:
        message = f"{adapter.weights}: {name} would change {key}, which the model does not have"
        raise CheckpointError("checkpoint.bad_adapter", f"{message}; it belongs to another model")
