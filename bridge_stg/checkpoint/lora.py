"""PEFT LoRA adapters, as far as merging them needs: which tensors they change, and by how much.

W + scale · B A (Hu et al., arXiv 2106.09685), for linear layers, embeddings and convolutions; and whole tensors that
the adapter brings along (`modules_to_save`, trained biases). Knows nothing of files' formats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge_stg.checkpoint.safetensors_file import StoredTensor
from bridge_stg.runtime.errors import CheckpointError

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PAIRS = {".lora_A.weight": (".lora_B.weight", False), ".lora_embedding_A": (".lora_embedding_B", True)}
"""Ending of an A tensor → ending of its B, and whether the layer's weight is the transpose of B A."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that leave the base model's weights as they are."""
CHANGES_MORE = ("use_dora", "layer_replication", "use_qalora", "alora_invocation_tokens", "trainable_token_indices")
"""Settings of an adapter that is more than an addition to weights."""
BLOCK_VALUES = 1 << 22
"""Values merged at a time; bounds the float32 copy."""


@dataclass(frozen=True)
class LoraDelta:
    """What an adapter adds to one weight.

    Attributes:
        a, b: stored A [r, in, …] and B [out, r, …].
        scale: alpha / r, or alpha / √r where the adapter is rank-stabilized (arXiv 2312.03732).
        transposed: whether the weight is laid out as (B A)ᵀ: embeddings, and layers with fan_in_fan_out.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool

    def shape_for(self, stored: tuple[int, ...]) -> bool:
        """Return whether the product fits a weight of this shape."""
        out, inner = self.b.shape[0], math.prod(self.a.shape[1:])
        rows, columns = (inner, out) if self.transposed else (out, inner)
        ranks_agree = math.prod(self.b.shape[1:]) == self.a.shape[0]
        return ranks_agree and len(stored) >= 2 and (stored[0], math.prod(stored[1:])) == (rows, columns)

    def add_to(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add scale · B A to a weight in place, in float32, some rows at a time."""
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
    """An adapter's two files."""

    config_path: Path
    config: Mapping[str, Any]
    weights: Path

    def scale_of(self, module: str, rank: int) -> float:
        """Return the scale of one module's delta, by the config's `alpha_pattern` or `lora_alpha`."""
        patterns = self.config.get("alpha_pattern") or {}
        fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(next(fitting, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def adapter_folder(folder: Path) -> Adapter | None:
    """Return the adapter that lies in a folder or in its `adapter/`, None if there is none.

    Raises:
        CheckpointError: half an adapter, two of them, or one that is not LoRA's plain form.
    """
    places = [place for place in (folder, folder / "adapter") if any((place / n).is_file() for n in (CONFIG, ADAPTER))]
    if not places:
        return None
    if len(places) > 1:
        raise CheckpointError(
            "checkpoint.bad_adapter", f"{folder}: holds an adapter, and so does {places[1]}; leave one of them"
        )
    path, weights = places[0] / CONFIG, places[0] / ADAPTER
    for file, why in ((path, "its scale is written there"), (weights, "pickled adapters are never read: save it anew "
                      "with peft's save_pretrained(…, safe_serialization=True)")):  # fmt: skip
        if not file.is_file():
            raise CheckpointError(
                "checkpoint.missing_file", f"{file}: no such file, but the rest of a LoRA adapter lies there; {why}"
            )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError("checkpoint.bad_adapter", f"{path}: cannot be read as a JSON object ({error})") from error
    more = [f"{name} {config[name]!r}" for name in CHANGES_MORE if config.get(name)]
    if kind != "LORA":
        more.append(f"peft_type {kind!r}")
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        more.append(f"init_lora_weights {start!r}")
    if more:
        raise CheckpointError(
            "checkpoint.unsupported_adapter",
            f"{path}: has {more[0]}, and only plain LoRA is merged here; merge it with peft's merge_and_unload() and "
            "save the whole model",
        )
    return Adapter(path, config, weights)


def deltas_and_replacements(
    adapter: Adapter,
    held: Mapping[str, StoredTensor],
    base: Mapping[str, StoredTensor],
    key_of: Callable[[str], str],
) -> tuple[dict[str, LoraDelta], dict[str, StoredTensor]]:
    """Return what an adapter adds, and what it puts in place of the base model's, by our keys.

    Args:
        adapter: its settings.
        held: its tensors by name, without peft's `base_model.model.`.
        base: the model's tensors by our keys.
        key_of: returns our key of a name.

    Raises:
        CheckpointError: a tensor has no counterpart in the model, or does not fit it.
    """
    deltas: dict[str, LoraDelta] = {}
    replacements: dict[str, StoredTensor] = {}
    used = set()
    for name, tensor in held.items():
        ending = next((ending for ending in PAIRS if name.endswith(ending)), None)
        if ending is None:
            continue
        module = name.removesuffix(ending).removesuffix(".base_layer")
        other, transposed = PAIRS[ending]
        partner = held.get(name.removesuffix(ending) + other)
        if partner is None:
            raise CheckpointError("checkpoint.bad_adapter", f"{adapter.weights}: holds {name} without its {other[1:]}")
        key = key_of(f"{module}.weight")
        delta = LoraDelta(
            a=tensor, b=partner, scale=adapter.scale_of(module, tensor.shape[0]),
            transposed=transposed or bool(adapter.config.get("fan_in_fan_out")),
        )  # fmt: skip
        check_target(adapter, name, key, base)
        if not delta.shape_for(base[key].shape):
            raise CheckpointError(
                "checkpoint.bad_adapter",
                f"{adapter.weights}: {name} {list(tensor.shape)} and its B {list(partner.shape)} do not fit {key} "
                f"{list(base[key].shape)}; it belongs to another model",
            )
        deltas[key] = delta
        used |= {name, name.removesuffix(ending) + other}
    for name in held.keys() - used:
        if ".lora_" in name:
            raise CheckpointError(
                "checkpoint.unsupported_adapter",
                f"{adapter.weights}: {name} is more than plain LoRA; merge the adapter with peft's merge_and_unload()",
            )
        key = key_of(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."))
        check_target(adapter, name, key, base)
        if held[name].shape != base[key].shape:
            raise CheckpointError(
                "checkpoint.bad_adapter",
                f"{adapter.weights}: {name} has shape {list(held[name].shape)}, the model's has {list(base[key].shape)}",
            )
        replacements[key] = held[name]
    return deltas, replacements


def check_target(adapter: Adapter, name: str, key: str, base: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if the model has no tensor that an adapter's one belongs to."""
    if key not in base:
        tied = " A tied head cannot have an adapter of its own." if key == "lm_head.weight" else ""
        raise CheckpointError(
            "checkpoint.bad_adapter",
            f"{adapter.weights}: {name} would change {key}, which the model does not hold; it belongs to another model."
            f"{tied}",
        )
