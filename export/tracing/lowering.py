"""The variants of a graph: how attention and the KV cache become ONNX operators.

One trace has all of them: where they differ, the nodes of each are inputs of a node `Choice`.

Attention is registered in transformers and the cache follows the `KeyValueCache` protocol, so that the torch modules
are the same in training, in the torch reference and in every trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bridge_stg.model.attention import matmul_attention
from bridge_stg.model.language_model import KeyValueCache, visible_keys
from bridge_stg.model.spatial_decoder import CrossAttention

if TYPE_CHECKING:
    from bridge_stg.model.model import BridgeSTG

DOMAIN = "bridge_stg"
"""Domain of nodes that mark places of a trace, and are not part of the finished graph."""

CHOICE = "Choice"
"""Node with one input per variant, in the order of `LOWERINGS`."""

SAME = "Same"
"""Node that returns its input, whose dims have other symbols."""

MASKED = -3e4
"""Score of a key that is not visible: finite, and within fp16."""


class GraphCache(KeyValueCache):
    """A cache whose updates become part of a graph, which returns `written`, in the order of `past`.

    `past` are key_0, value_0, key_1 …, each [B, kv_heads, S, head_dim]; `cache_position` int64 [B] is the position of
    each row's first new token.
    """

    def __init__(self, past: list[Tensor], cache_position: Tensor) -> None:
        self.past, self.cache_position = past, cache_position
        self.written = list(past)


class ScatterCache(GraphCache):
    """The cache contract `in_place`: new rows are scattered into the buffers, and attention reads the whole buffers."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Emit `TensorScatter` (opset 24), which backends run in place if past and present share a buffer."""
        for slot, new in ((2 * layer_idx, key), (2 * layer_idx + 1, value)):
            past = self.past[slot]
            inputs, attributes = (past, new, self.cache_position), dict[str, Any](axis=2)
            self.written[slot] = torch.onnx.ops.symbolic(
                "TensorScatter", inputs, attributes, dtype=past.dtype, shape=past.shape, version=24
            )
        return self.written[2 * layer_idx], self.written[2 * layer_idx + 1]


class AppendCache(GraphCache):
    """The cache contract `append`: buffers are only read, and the session writes the new rows, which are outputs."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the new rows; `appended_attention` reads the past itself."""
        self.written[2 * layer_idx], self.written[2 * layer_idx + 1] = key, value
        return key, value


class BothCache(GraphCache):
    """The caches of both contracts, with a choice of what they write; `scattered` has the buffers of `ScatterCache`."""

    def __init__(self, past: list[Tensor], cache_position: Tensor) -> None:
        super().__init__(past, cache_position)
        self.scattered: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the new rows, as `AppendCache` does; `both_attentions` reads the buffers from `scattered`."""
        scatter, first = ScatterCache(self.past, self.cache_position), 2 * layer_idx
        self.scattered[layer_idx] = scatter.update(key, value, layer_idx)
        self.written[first : first + 2] = map(choice, self.scattered[layer_idx], (key, value))
        return key, value


def choice(standard: Tensor, primitive: Tensor) -> Tensor:
    """Return a tensor that is another one in each variant, and has the shape of `standard` in the trace."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{CHOICE}", (standard, primitive), dtype=standard.dtype, shape=standard.shape, version=1
    )


def operator_attention(  # noqa: PLR0917  # the signature that transformers calls
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Emit `Attention` (opset 23 and later) with a boolean mask; arguments as in `matmul_attention`."""
    inputs = (query, key, value) if mask is None else (query, key, value, mask)
    attributes: dict[str, Any] = {"scale": float(scaling)}
    out = torch.onnx.ops.symbolic("Attention", inputs, attributes, dtype=query.dtype, shape=query.shape, version=24)
    return out.transpose(1, 2), None


def appended_attention(  # noqa: PLR0917  # the signature that transformers calls
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    bridge_cache: GraphCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the past and to the new rows with one softmax over both, without concatenating the cache.

    Arguments and result as in `matmul_attention`, which this is outside the language model, without a `bridge_cache`.
    `mask` bool [B, 1, L, S + L] is True for visible keys: the past first, then the new rows.
    """
    if bridge_cache is None:
        return matmul_attention(module, query, key, value, mask, scaling)
    assert mask is not None
    index = module.layer_idx
    assert isinstance(index, int)
    past_key, past_value = bridge_cache.past[2 * index], bridge_cache.past[2 * index + 1]
    batch, heads, length, head_dim = query.shape
    kv_heads, capacity = past_key.shape[1], past_key.shape[2]
    # The heads that share keys are folded into the rows: one matmul per KV head, and no repeated keys.
    shared = heads // kv_heads
    query = (query * scaling).reshape(batch, kv_heads, shared * length, head_dim)
    scores = torch.cat([query @ past_key.transpose(-1, -2), query @ key.transpose(-1, -2)], -1)
    scores = scores.reshape(batch, kv_heads, shared, length, capacity + length)
    scores = torch.where(mask[:, None], scores, torch.full((), MASKED, dtype=scores.dtype))
    weights = scores.float().softmax(-1).to(value.dtype)
    weights = weights.reshape(batch, kv_heads, shared * length, capacity + length)
    out = weights[..., :capacity] @ past_value + weights[..., capacity:] @ value
    return out.reshape(batch, heads, length, head_dim).transpose(1, 2), None


def both_attentions(  # noqa: PLR0917  # the signature that transformers calls
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float,
    bridge_cache: BothCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return a choice between the two attentions; with a `bridge_cache`, `mask` has the two of `both_masks`."""
    if bridge_cache is None:
        primitive = matmul_attention(module, query, key, value, mask, scaling=scaling)[0]
    else:
        index = module.layer_idx
        assert isinstance(index, int)
        primitive = appended_attention(module, query, key, value, mask[1], scaling, bridge_cache)[0]
        key, value, mask = *bridge_cache.scattered[index], mask[0]
    standard = operator_attention(module, query, key, value, mask, scaling=scaling)[0]
    return choice(standard, primitive), None


def visible_past_and_new(cache_position: Tensor, length: int, capacity: int) -> Tensor:
    """Return bool [B, 1, L, S + L]: key j of the past is visible iff j < cache_position[b], new key k iff k ≤ i."""
    past = torch.arange(capacity) < cache_position[:, None, None]
    rows = torch.arange(length)
    new = (rows <= rows[:, None])[None]
    batch = cache_position.shape[0]
    return torch.cat([past.expand(batch, length, capacity), new.expand(batch, length, length)], -1)[:, None]


def both_masks(cache_position: Tensor, length: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Return the masks of both variants."""
    return visible_keys(cache_position, length, capacity), visible_past_and_new(cache_position, length, capacity)


@dataclass(frozen=True)
class Lowering:
    """One variant, or the form that is traced.

    Attributes:
        name: name of the variant.
        opset: ONNX opset of its graphs.
        cache_update: cache contract in the manifest.
        attention: name in transformers' registry of attention functions.
        cache: function that builds the cache that the decoder layers update.
        mask: function that returns which keys are visible under the cache contract.
    """

    name: str
    opset: int
    cache_update: str
    attention: str
    cache: Callable[[list[Tensor], Tensor], GraphCache]
    mask: Callable[[Tensor, int, int], Any]

    @contextmanager
    def applied(self, model: BridgeSTG) -> Iterator[None]:
        """Let the model's attention layers use this variant inside the block."""
        switches: list[tuple[Any, str]] = [
            (model.vision_encoder.model.config, "_attn_implementation"),
            (model.language_model.model.config, "_attn_implementation"),
            *((m, "attention") for m in model.modules() if isinstance(m, CrossAttention)),
        ]
        before = [getattr(holder, name) for holder, name in switches]
        for holder, name in switches:
            setattr(holder, name, self.attention)
        try:
            yield
        finally:
            for (holder, name), value in zip(switches, before, strict=True):
                setattr(holder, name, value)


ALL_ATTENTION_FUNCTIONS.register("bridge_operator", operator_attention)
ALL_ATTENTION_FUNCTIONS.register("bridge_append", appended_attention)
ALL_ATTENTION_FUNCTIONS.register("bridge_both", both_attentions)

LOWERINGS = {
    "standard": Lowering("standard", 24, "in_place", "bridge_operator", ScatterCache, visible_keys),
    "primitive": Lowering("primitive", 18, "append", "bridge_append", AppendCache, visible_past_and_new),
}

TRACED = Lowering("traced", 24, "in_place", "bridge_both", BothCache, both_masks)
"""The form with a choice of both variants."""
