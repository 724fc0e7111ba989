"""The language model: one function of ids, positions and a KV cache for prefill, decode and the bridging step.

Runs transformers' own decoder layers, with attention and cache passed through transformers' extension points (the
attention registry, and an object with the cache's `update`). Must not know the meaning of tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bridge_stg.model.bridging import BridgingQueries
from bridge_stg.model.recompute import Recomputed
from bridge_stg.model.vision import rms_normalize
from bridge_stg.runtime.bundle.spec import LanguageSpec


class KeyValueCache(Protocol):
    """The part of transformers' cache that a decoder layer calls."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [B, kv_heads, L, head_dim] of a layer; return those to attend to."""
        ...


class BufferCache:
    """The KV cache of the graph contract in eager torch: copies of buffers [B, kv_heads, S, head_dim].

    `past` is key_0, value_0, key_1 …; new rows are written from `cache_position`, int64 [B].
    """

    def __init__(self, past: list[Tensor], cache_position: Tensor) -> None:
        self.past, self.cache_position = past, cache_position
        self.present = list(past)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write the new rows into copies of the layer's buffers and return them."""
        index = self.cache_position[:, None] + torch.arange(key.shape[2])
        index = index[:, None, :, None].expand_as(key)
        for slot, new in ((2 * layer_idx, key), (2 * layer_idx + 1, value)):
            self.present[slot] = self.past[slot].scatter(2, index, new.to(self.past[slot].dtype))
        return self.present[2 * layer_idx], self.present[2 * layer_idx + 1]


class LanguageModel(Recomputed):
    """The decoder with bridging queries, visual tokens, deepstack and taps.

    Args:
        model: the backbone's decoder, see `Backbone.text_model`.
        lm_head: projection of hidden states to logits.
        bridging: table of the bridging queries; None: a model with text heads, which has no taps either.
        spec: sizes.
        rotary_axis: int64 [head_dim / 2], index of the position (0 time, 1 row, 2 column) of each rotary frequency.
    """

    model: Any  # transformers' module
    lm_head: nn.Linear
    bridging: BridgingQueries | None
    rotary_axis: Tensor

    def __init__(
        self, model: nn.Module, lm_head: nn.Linear, bridging: BridgingQueries | None, spec: LanguageSpec,
        rotary_axis: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.lm_head, self.bridging, self.spec = model, lm_head, bridging, spec
        self.register_buffer("rotary_axis", rotary_axis, persistent=False)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, L, head_dim] of positions [3, B, L], each frequency by the position of its axis.

        Same values as transformers' module, whose assignments to strided slices would be traced as scatters.
        """
        rotary = self.model.rotary_emb
        angles = positions.index_select(0, self.rotary_axis).permute(1, 2, 0).float() * rotary.inv_freq.float()
        cos, sin = (table * rotary.attention_scaling for table in (angles.cos(), angles.sin()))
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([sin, sin], -1).to(dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed ids [B, L]; ids from vocab_size on are bridging queries, selected by Where over two gathers."""
        if self.bridging is None:
            embedded: Tensor = self.model.embed_tokens(input_ids)
            return embedded
        vocab = self.spec.vocab_size
        text = self.model.embed_tokens(input_ids.clamp(max=vocab - 1))
        queries = self.bridging((input_ids - vocab).clamp(min=0))
        return torch.where((input_ids >= vocab)[..., None], queries, text)

    def hidden_states(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: KeyValueCache | None, visual: Tensor | None
    ) -> list[Tensor]:
        """Return the residual stream [B, L, H] after each decoder layer.

        Args:
            x: embedded tokens [B, L, H].
            positions: MRoPE positions, int64 [3, B, L].
            mask: bool, True where visible, broadcasts to [B, 1, L, S]; None: causal over the new tokens.
            cache: KV cache; None: attend to the new tokens only.
            visual: deepstack rows [D, B, L, H] to add after the first D layers, zero at text; or None.
        """
        rotary = self.rotary(positions, x.dtype)
        states = []
        for index, layer in enumerate(self.model.layers):
            x = self.run_block(
                layer, x, position_embeddings=rotary, attention_mask=mask, past_key_values=cache, bridge_cache=cache
            )
            if visual is not None and index < visual.shape[0]:
                x = x + visual[index]
            states.append(x)
        return states

    def logits(self, x: Tensor) -> Tensor:
        """Return fp32 logits [..., vocab] of final hidden states [..., H]."""
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits.float()

    def forward(  # noqa: PLR0917 - the graph's inputs
        self, input_ids: Tensor, visual_index: Tensor, visual_tokens: Tensor, positions: Tensor,
        cache_position: Tensor, output_index: Tensor, mask: Tensor, cache: KeyValueCache,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Run L new tokens per row.

        Args:
            input_ids: int64 [B, L].
            visual_index: int64 [B, L]; 0 = text, k = row k of visual_tokens.
            visual_tokens: [1+D, V, H], row 0 all zero.
            positions: int64 [3, B, L].
            cache_position: int64 [B], number of tokens already cached in each row.
            output_index: int64 [B, K], indices among the L tokens of the requested outputs.
            mask: bool, see `visible_keys`.
            cache: KV cache that the new keys and values are written to.

        Returns:
            logits float32 [B, K, vocab] and, with bridge heads, taps [T, B, K, H], RMS-normalised in fp32.
        """
        visual = visual_tokens.index_select(1, visual_index.flatten()).unflatten(1, visual_index.shape)
        x = torch.where((visual_index > 0)[..., None], visual[0], self.embed(input_ids))
        states = self.hidden_states(x, positions, mask, cache, visual[1:])
        index = output_index[..., None].expand(-1, -1, self.spec.hidden_size)
        taps = [rms_normalize(states[layer].gather(1, index)) for layer in self.spec.tapped_layers]
        stacked = (torch.stack(taps),) if taps else ()
        return self.logits(states[-1].gather(1, index)), *stacked


def visible_keys(cache_position: Tensor, length: int | torch.SymInt, capacity: int | torch.SymInt) -> Tensor:
    """Return bool [B, 1, L, S]: key j is visible to new token i iff j ≤ cache_position[b] + i."""
    last = cache_position[:, None] + torch.arange(length)  # type: ignore[arg-type]  # the stub lacks SymInt
    keys = torch.arange(capacity)  # type: ignore[arg-type]  # the stub lacks SymInt
    return (keys <= last[..., None])[:, None]
