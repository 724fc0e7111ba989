"""Work counted from the shapes: multiplications and additions of vision and language model, and bytes read a token.

Two for each multiplication with its addition. Matrix products with weights and attention's own products apart, since
the latter grow with the square of what they attend to, and no engine computes them in integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """Floating-point or integer operations.

    Attributes:
        products: of matrix products with weights.
        attention: of queries by keys, and of their weights by values.
    """

    products: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.attention


def vision_work(config: Mapping[str, Any], groups: int, rows: int, columns: int) -> Work:
    """Count a Qwen3-VL vision encoder on `groups` groups of rows × columns patches, each attending to its own group.

    Args:
        config: the backbone's `vision_config`.
    """
    width, inner, depth = config["hidden_size"], config["intermediate_size"], config["depth"]
    patches, merge = groups * rows * columns, config["spatial_merge_size"] ** 2
    embed = 3 * config["temporal_patch_size"] * config["patch_size"] ** 2 * width
    block = 4 * width * width + 2 * width * inner
    mergers = 1 + len(config.get("deepstack_visual_indexes", ()))
    merger = (merge * width) ** 2 + merge * width * config["out_hidden_size"]
    products = 2 * patches * (embed + depth * block) + 2 * (patches // merge) * mergers * merger
    attention = 4 * depth * patches * (rows * columns) * width
    return Work(float(products), float(attention))


def layer_weights(config: Mapping[str, Any]) -> int:
    """Return the weights of a decoder layer's matrix products."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head, heads, kv_heads = head_size(config), config["num_attention_heads"], config["num_key_value_heads"]
    return 2 * width * heads * head + 2 * width * kv_heads * head + 3 * width * inner


def head_size(config: Mapping[str, Any]) -> int:
    """Return the channels of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def prefill_work(config: Mapping[str, Any], length: int, *, outputs: int = 1) -> Work:
    """Count a decoder on `length` new tokens, causal attention at half of its square, logits at `outputs` places."""
    products = 2 * length * config["num_hidden_layers"] * layer_weights(config)
    products += 2 * outputs * config["hidden_size"] * config["vocab_size"]
    pairs = length * (length + 1) / 2
    attention = 4 * config["num_hidden_layers"] * config["num_attention_heads"] * head_size(config) * pairs
    return Work(float(products), float(attention))


WEIGHT_BYTES = {"fp32": 4.0, "int8": 1.0, "int4": 0.5 + 4 / 32}
"""A weight's bytes; int4 with an fp32 scale for every 32 values."""


def decode_bytes(config: Mapping[str, Any], past: int, precision: str, *, kv_bytes: int = 4) -> float:
    """Return the bytes of weights, keys and values that one new token behind `past` others must read.

    The head is int8 at most (see `GraphRecipe.form_of`); of the embedding one row is read, which is left out.
    """
    layers, head = config["num_hidden_layers"], config["hidden_size"] * config["vocab_size"]
    weights = layers * layer_weights(config) * WEIGHT_BYTES[precision]
    weights += head * WEIGHT_BYTES["int8" if precision == "int4" else precision]
    keys = 2 * layers * config["num_key_value_heads"] * head_size(config) * (past + 1) * kv_bytes
    return float(weights + keys)
