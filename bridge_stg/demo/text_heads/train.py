"""Train the demo's text heads: LLM and mergers of the demo checkpoint; the vision blocks are frozen.

Auxiliary heads on the LLM's hidden states (what covers a visual token, where the target is) are discarded after
training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge_stg.demo.bundle import demo_checkpoint
from bridge_stg.demo.text_heads.batches import TextBatch, TextBatchMaker
from bridge_stg.demo.text_heads.held_out import score_rendered_text
from bridge_stg.demo.text_heads.model import SCALE, first_side_id, text_model, write_text_tokenizer
from bridge_stg.demo.training.batches import LOOKS, QUERIES_PER_CLIP
from bridge_stg.demo.training.train import DemoStage, DemoTraining
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.vision import rms_normalize
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.training.loss.clip_task import ClipTask
from bridge_stg.training.loss.losses import box_iou_giou
from bridge_stg.training.loss.prefix_cache import prefix_and_suffix_states
from bridge_stg.training.recipe import TrainingRecipe

EVALUATED = 6, 16  # clips and images
CELL_LAYER, POINTER_LAYER, BOX_LAYER = 1, 2, 3
SMOOTHING = 1.0
"""Deviation of the target distribution over the values of a side, in hundredths of the frame."""


class AuxiliaryHeads(nn.Module):
    """Linear predictions from the LLM's hidden states, for training only."""

    def __init__(self, hidden_size: int, width: int = 64) -> None:
        super().__init__()
        self.encoded, self.cells = (nn.Linear(hidden_size, LOOKS + 4) for _ in range(2))
        self.cell_key, self.point = nn.Linear(hidden_size, width), nn.Linear(hidden_size, width)
        self.box = nn.Linear(hidden_size, 4)
        for covered in (self.encoded, self.cells):
            nn.init.constant_(covered.bias[:LOOKS], -4.0)  # most visual tokens are background


class TextTask(ClipTask):
    """The loss of a batch."""

    def __init__(self, model: BridgeSTG) -> None:
        super().__init__(model)
        self.heads = AuxiliaryHeads(model.spec.language.hidden_size)
        values = torch.arange(SCALE + 1.0)
        near = torch.exp(-((values[:, None] - values) ** 2) / (2 * SMOOTHING**2))
        self.soft = near / near.sum(1, keepdim=True)  # [value, value]
        self.first_side = first_side_id()

    def forward(self, batch: TextBatch) -> tuple[Tensor, dict[str, float]]:  # type: ignore[override]
        """Return the loss, and values to log."""
        language, clips = self.model.language_model, len(batch.frames)
        answer = batch.target >= 0
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            tokens = self.visual_tokens(batch.frames.flatten(0, 1))
            prefix, suffix = prefix_and_suffix_states(language, batch.prefix, tokens, batch.input_ids, clips=clips)
            logits = language.logits(suffix[-1][answer])
            parts = self.auxiliary(batch, tokens, prefix, suffix)
        target, side = batch.target[answer], (batch.cell >= 0)[answer]
        log_probabilities = logits.log_softmax(-1)
        text = F.nll_loss(log_probabilities[~side], target[~side], reduction="sum")
        value = (target[side] - self.first_side) % (SCALE + 1)
        columns = (target[side] - value)[:, None] + torch.arange(SCALE + 1)
        sides = -(self.soft[value] * log_probabilities[side].gather(1, columns)).sum(-1)
        count = max(len(value), 1)
        parts |= {"text": 0.25 * text / count, "sides": sides.sum() / count}
        figures = {name: part.item() for name, part in parts.items()}
        chosen = logits.argmax(-1)
        figures["text_accuracy"] = (chosen == target)[~side].float().mean().item()
        if len(value):
            off = (chosen - target)[side].abs().clamp(max=SCALE).float()
            figures["sides_off"] = off.mean().item() / SCALE
        kind = "image" if batch.frames.shape[1] == 1 else "clip"
        return torch.stack(list(parts.values())).sum(), {f"{kind}_{name}": value for name, value in figures.items()}

    def auxiliary(
        self, batch: TextBatch, tokens: Tensor, prefix: list[Tensor], suffix: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses on hidden states at visual tokens, and where a side of a box follows."""
        heads, visual = self.heads, torch.from_numpy(batch.prefix.visual_index > 0)
        cells = rms_normalize(prefix[CELL_LAYER][:, visual])
        losses = covered_loss(heads.cells(cells).float(), batch)
        encoded = covered_loss(heads.encoded(rms_normalize(tokens[0])).float().view(*cells.shape[:2], -1), batch)
        losses |= {f"encoded_{name}": value for name, value in encoded.items()}
        pointing = batch.cell >= 0
        if pointing.any():
            clip = pointing.nonzero()[:, 0] // QUERIES_PER_CLIP
            keys = heads.cell_key(rms_normalize(prefix[POINTER_LAYER][:, visual]))[clip]
            point = heads.point(rms_normalize(suffix[POINTER_LAYER][pointing]))
            scores = (keys @ point[..., None])[..., 0].float() / 8
            losses["pointer"] = 0.5 * F.cross_entropy(scores, batch.cell[pointing])
            box = heads.box(rms_normalize(suffix[BOX_LAYER][pointing])).float()
            losses["box"] = box_loss(box, batch.box[pointing])
        return losses


def covered_loss(found: Tensor, batch: TextBatch) -> dict[str, Tensor]:
    """Return the losses of what covers visual tokens [V, G·n, LOOKS + 4], and of the centres of uncovered ones."""
    looks, boxes = found.split([LOOKS, 4], -1)
    covered = batch.boxes[..., 2] > 0
    return {
        "looks": 20 * F.binary_cross_entropy_with_logits(looks, batch.looks),
        "boxes": 0.5 * box_loss(boxes[covered], batch.boxes[covered]),
        "places": 5 * (boxes[..., :2] - batch.places)[~covered].abs().sum(-1).mean(),
    }


def box_loss(found: Tensor, truth: Tensor) -> Tensor:
    """Return the loss of boxes [N, 4] cxcywh in 0..1, with the weights of DETR (arXiv 2005.12872)."""
    _, giou = box_iou_giou(torch.cat([found[:, :2], found[:, 2:].clamp(min=0.01)], 1), truth)
    return 5 * (found - truth).abs().sum(-1).mean() + (1 - giou).mean()


def held_out_scores(grounder: Grounder) -> dict[str, float]:
    """Return the scores on a few held-out clips and images."""
    return score_rendered_text(grounder, *EVALUATED)


def train_text_demo(
    out: Path, recipe: TrainingRecipe, *, start: Path | None = None, resume: bool = True, clips: int = 8,
    score: Callable[[Grounder], Mapping[str, float]] = held_out_scores,
) -> Path:  # fmt: skip
    """Train the demo model with text heads, write its checkpoint to the folder `out`, and return it.

    Args:
        out: folder of the checkpoint, see `DemoTraining`.
        recipe: `demo_recipe` with the stage text; its seed is that of new weights and of every batch.
        start: demo checkpoint with bridge heads to start from; None: that of the source tree.
        resume: whether to continue from a saved state.
        clips: clips per batch.
        score: returns the metrics of a validation.

    Raises:
        TrainingStopped: a signal ended the training; calling again continues it.
        BridgeError: the checkpoint cannot be read, a saved state does not fit the model or the recipe, or the loss
            diverged.
    """
    training = DemoTraining(out, recipe, write_text_tokenizer, start=start or demo_checkpoint(), resume=resume)
    assert training.start is not None
    model = text_model(training.start, training.tokenizer)
    batches = TextBatchMaker(model.spec, training.tokenizer_path, recipe.seed, clips=clips)
    return training.train(model, {"text": DemoStage(TextTask(model), batches, score)})
