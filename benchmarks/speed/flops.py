"""Count operations of vision encoder and language model, and bytes read per token, from the shapes.

A multiply-add counts as two operations. Matmuls with weights and those inside attention are counted separately: the
latter grow with the square of the sequence length, and no engine computes them in integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """Floating-point or integer operations.

    Attributes:
        matmuls: operations of matmuls with weights.
        attention: operations of queries × keys and of attention weights × values.
    """

    matmuls: float
    attention: float

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.matmuls + self.attention


def vision_work(config: Mapping[str, Any], groups: int, rows: int, columns: int) -> Work:
    """Count a Qwen3-VL vision encoder, whose patches attend within their group.

    Args:
        config: the backbone's `vision_config`.
        groups: number of frame groups.
        rows: rows of patches per group.
        columns: columns of patches per group.
    """
    width, inner, depth = config["hidden_size"], config["intermediate_size"], config["depth"]
    patches, merge = groups * rows * columns, config["spatial_merge_size"] ** 2
    embed = 3 * config["temporal_patch_size"] * config["patch_size"] ** 2 * width
    block = 4 * width * width + 2 * width * inner
    mergers = 1 + len(config.get("deepstack_visual_indexes", ()))
    merger = (merge * width) ** 2 + merge * width * config["out_hidden_size"]
    matmuls = 2 * patches * (embed + depth * block) + 2 * (patches // merge) * mergers * merger
    attention = 4 * depth * patches * (rows * columns) * width
    return Work(float(matmuls), float(attention))


def layer_weights(config: Mapping[str, Any]) -> int:
    """Return the number of matmul weights of a decoder layer."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head, heads, kv_heads = head_size(config), config["num_attention_heads"], config["num_key_value_heads"]
    return 2 * width * heads * head + 2 * width * kv_heads * head + 3 * width * inner


def head_size(config: Mapping[str, Any]) -> int:
    """Return the number of channels of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def prefill_work(config: Mapping[str, Any], length: int, *, outputs: int = 1) -> Work:
    """Count a decoder on `length` new tokens with causal attention and logits at `outputs` positions."""
    matmuls = 2 * length * config["num_hidden_layers"] * layer_weights(config)
    matmuls += 2 * outputs * config["hidden_size"] * config["vocab_size"]
    pairs = length * (length + 1) / 2
    attention = 4 * config["num_hidden_layers"] * config["num_attention_heads"] * head_size(config) * pairs
    return Work(float(matmuls), float(attention))


WEIGHT_BYTES = {"fp32": 4.0, "int8": 1.0, "int4": 0.5 + 4 / 32}
"""Bytes per weight; int4 includes an fp32 scale per 32 values."""


def decode_bytes(config: Mapping[str, Any], past: int, precision: str, *, kv_bytes: int = 4) -> float:
    """Return the bytes of weights, keys and values that a new token reads after `past` others.

    The head has the precision of the layers, as in `ort-cpu-decode`. The one row of the embedding is ignored.
    """
    layers, head = config["num_hidden_layers"], config["hidden_size"] * config["vocab_size"]
    weights = (layers * layer_weights(config) + head) * WEIGHT_BYTES[precision]
    keys = 2 * layers * config["num_key_value_heads"] * head_size(config) * (past + 1) * kv_bytes
    return float(weights + keys)
