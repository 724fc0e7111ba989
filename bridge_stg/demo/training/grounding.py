"""Second stage of the demo's training: all parts except the vision blocks, on clips with three queries each.

Auxiliary heads on the LLM's hidden states (what is present, enters, leaves and moves, and which group an answer names)
are discarded after training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge_stg.demo.training.batches import ASKED, LOOKS, QUERIES_PER_CLIP, GroundingBatch
from bridge_stg.model.model import BridgeSTG
from bridge_stg.training.loss.clip_task import ClipTask
from bridge_stg.training.loss.losses import spatial_losses
from bridge_stg.training.loss.prefix_cache import bridging_taps, prefix_and_suffix_states

SEEN_LAYER, CHANGED_LAYER, POINTER_LAYER = 1, 2, 3
MAX_SECONDS = 32


class AuxiliaryHeads(nn.Module):
    """Linear predictions from the LLM's hidden states, for training only."""

    def __init__(self, hidden_size: int, width: int = 64) -> None:
        super().__init__()
        self.seen = nn.Linear(hidden_size, LOOKS + MAX_SECONDS + 10)
        self.changed = nn.Linear(hidden_size, 2 * LOOKS)
        self.moving = nn.Linear(hidden_size, 4 * LOOKS)
        self.group_key, self.point = nn.Linear(hidden_size, width), nn.Linear(hidden_size, width)
        self.inside_key, self.inside = nn.Linear(hidden_size, width), nn.Linear(hidden_size, width)
        self.asked = nn.Linear(hidden_size, sum(ASKED) + len(ASKED))


class GroundingTask(ClipTask):
    """The loss of a batch."""

    def __init__(self, model: BridgeSTG) -> None:
        super().__init__(model)
        self.heads = AuxiliaryHeads(model.spec.language.hidden_size)

    def forward(self, batch: GroundingBatch) -> tuple[Tensor, dict[str, float]]:  # type: ignore[override]
        """Return the loss, and values to log."""
        language, clips = self.model.language_model, len(batch.frames)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            tokens = self.visual_tokens(batch.frames.flatten(0, 1))
            prefix, suffix = prefix_and_suffix_states(language, batch.prefix, tokens, batch.input_ids, clips=clips)
            feature_map = self.feature_map(batch.fine.flatten(0, 1)).unflatten(0, batch.fine.shape[:2])
            taps = bridging_taps(language, suffix, batch.length, clips=clips)
            found = self.model.spatial_decoder.localize(feature_map, taps, batch.fine_times, batch.mask)
            choices = batch.target >= 0
            logits = language.logits(suffix[-1][choices])
            auxiliary = self.auxiliary(batch, prefix, suffix)
            auxiliary["asked"] = self.asked(batch, taps)
        config = self.model.config.losses
        parts, iou = spatial_losses(found, batch.boxes, batch.positive, batch.mask, feature_map.shape[2:4], config)
        parts["language"] = config.language * F.cross_entropy(logits, batch.target[choices])
        parts |= {k: config.auxiliary * v for k, v in auxiliary.items()}
        figures = {k: v.item() for k, v in parts.items()}
        figures["iou"] = iou.item()
        figures["token_accuracy"] = (logits.argmax(-1) == batch.target[choices]).float().mean().item()
        wrong = (found.presence[-1] > 0) != batch.positive
        figures["presence_accuracy"] = 1 - wrong[batch.mask].float().mean().item()
        return torch.stack(list(parts.values())).sum(), figures

    def asked(self, batch: GroundingBatch, taps: Tensor) -> Tensor:
        """Return the loss of predicting name, colour and direction of a query from each tap of the bridging queries."""
        logits = self.heads.asked(taps.mean(3)).float().flatten(1, 2)
        parts = logits.split([count + 1 for count in ASKED], -1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), batch.asked[:, i].repeat(len(taps))) for i, part in enumerate(parts)
        ]
        return 0.5 * torch.stack(losses).sum()

    def auxiliary(self, batch: GroundingBatch, prefix: list[Tensor], suffix: list[Tensor]) -> dict[str, Tensor]:
        """Return the losses on hidden states at the last token of each group, and at the answer's tokens."""
        groups = batch.frames.shape[1]
        visual = torch.from_numpy(batch.prefix.visual_index)
        last = visual.view(-1).eq(torch.arange(1, groups + 1)[:, None] * (visual.max() // groups)).float().argmax(-1)
        closing = [state[:, last + 1] for state in prefix]
        heads = self.heads
        seen, whole, decimal = heads.seen(closing[SEEN_LAYER]).float().split([LOOKS, MAX_SECONDS, 10], -1)
        clips = len(seen)
        losses = {"seen": 20 * F.binary_cross_entropy_with_logits(seen, batch.looks)}
        if groups == 1:
            return losses
        digits = batch.time_digits[None].expand(clips, -1, -1)
        losses["digits"] = 0.2 * (
            F.cross_entropy(whole.flatten(0, 1), digits[..., 0].flatten())
            + F.cross_entropy(decimal.flatten(0, 1), digits[..., 1].flatten())
        )
        before = F.pad(batch.looks, (0, 0, 1, 0))[:, :-1]
        edges = torch.cat([(batch.looks > before).float(), (before > batch.looks).float()], -1)
        changed = heads.changed(closing[CHANGED_LAYER]).float()
        losses["changed"] = 20 * F.binary_cross_entropy_with_logits(changed, edges)
        moving = heads.moving(closing[CHANGED_LAYER]).float()
        losses["moving"] = 40 * F.binary_cross_entropy_with_logits(moving, batch.moving.flatten(2))
        pointing = batch.pointer >= 0
        row = pointing.nonzero()[:, 0]
        keys = heads.group_key(closing[POINTER_LAYER])[row // QUERIES_PER_CLIP]
        point = heads.point(suffix[POINTER_LAYER][pointing])
        scores = (keys @ point[..., None])[..., 0].float() / 8
        losses["pointer"] = 0.5 * F.cross_entropy(scores, batch.pointer[pointing])
        first = (batch.target >= 0).float().argmax(-1)
        asked = heads.inside(suffix[POINTER_LAYER][torch.arange(len(first)), first])
        keys = heads.inside_key(closing[POINTER_LAYER]).repeat_interleave(QUERIES_PER_CLIP, 0)
        scores = (keys @ asked[..., None])[..., 0].float() / 8 - 1
        group = torch.arange(groups)
        inside = (group >= batch.span[:, :1]) & (group <= batch.span[:, 1:]) & (batch.span[:, :1] >= 0)
        losses["inside"] = F.binary_cross_entropy_with_logits(scores, inside.float())
        return losses
