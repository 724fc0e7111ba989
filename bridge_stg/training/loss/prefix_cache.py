"""The LLM's forward pass in training: a video's prefix is computed once, with gradients, and shared by its queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge_stg.model.language_model import LanguageModel
from bridge_stg.model.vision import rms_normalize
from bridge_stg.runtime.chain.prompt import Segment


class PrefixCache:
    """Keys and values of V prefixes by layer."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store and return the keys and values of a layer; a layer that is recomputed keeps the first ones."""
        self.stored.setdefault(layer_idx, (key, value))
        return key, value


class SuffixCache:
    """Keys and values of V·B suffixes that follow the V prefixes."""

    def __init__(self, prefix: PrefixCache, rows_per_prefix: int) -> None:
        self.prefix, self.rows = prefix, rows_per_prefix

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer after those of its prefix."""
        old = (tensor.repeat_interleave(self.rows, 0) for tensor in self.prefix.stored[layer_idx])
        return tuple(torch.cat([before.to(new.dtype), new], 2) for before, new in zip(old, (key, value)))  # type: ignore[return-value]


def prefix_and_suffix_states(
    model: LanguageModel, prefix: Segment, tokens: Tensor, input_ids: Tensor, *, clips: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the residual streams of the prefixes [V, L0, H] of V clips, and of the B rows [V·B, L, H] after each.

    `prefix` is the prompt's video segment, `tokens` are the visual tokens [1+D, V·n, H] of all clips, and `input_ids`,
    int64 [V·B, L], are the rows.
    """
    text, index, positions = (
        torch.from_numpy(array).to(input_ids.device, non_blocking=True)
        for array in (prefix.input_ids, prefix.visual_index, prefix.positions)
    )
    visual = F.pad(tokens.unflatten(1, (clips, -1)).float(), (0, 0, 1, 0))[:, :, index]
    x = torch.where((index > 0)[:, None], visual[0], model.model.embed_tokens(text[None]))
    rows, length = input_ids.shape
    cache = PrefixCache()
    prefix_states = model.hidden_states(x, positions[:, None].expand(-1, clips, -1), None, cache, visual[1:])
    positions = (prefix.next_position + torch.arange(length)).expand(3, rows, -1)
    mask = torch.ones(length, len(prefix) + length, dtype=torch.bool).tril(len(prefix))[None, None]
    after = SuffixCache(cache, rows // clips)
    return prefix_states, model.hidden_states(model.embed(input_ids), positions, mask, after, None)


def bridging_taps(model: LanguageModel, states: list[Tensor], length: Tensor, *, clips: int) -> Tensor:
    """Return taps [T, V, B, Q, H] of the bridging queries, which end each row of `states`.

    `length`, int64 [V·B], are the lengths of the rows without padding.
    """
    count = model.spec.num_bridging_queries
    index = length[:, None] - count + torch.arange(count)
    rows = torch.arange(len(index))[:, None]
    taps = torch.stack([rms_normalize(states[layer][rows, index]) for layer in model.spec.tapped_layers])
    by_clip: Tensor = taps.unflatten(1, (clips, -1))
    return by_clip
