"""The loss of an annotated clip: the chain's forward pass with given answers, on any device.

Must not know where clips come from, nor how weights are updated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.training.data.clips import ClipBatch
from bridge_stg.training.loss.losses import spatial_losses
from bridge_stg.training.loss.prefix_cache import bridging_taps, prefix_and_suffix_states


class ClipTask(nn.Module):
    """The loss of a clip, computed on the model's device, with matmuls in bfloat16 if `bf16`.

    The vision blocks get gradients if one of their weights is trained; the mergers always do.
    """

    def __init__(self, model: BridgeSTG, *, bf16: bool = True) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.vision_encoder.scale.device

    def forward(self, batch: ClipBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a clip, and values to log."""
        # The device context applies to tensors that the modules create: centres of patches, masks, ranges.
        with self.device:
            parts, more, outputs = self.losses(batch)
            # Every trained weight gets a gradient from every clip, which processes that share gradients rely on.
            all_outputs = torch.stack([output.float().sum() for output in outputs]).sum()
            loss = torch.stack(list(parts.values())).sum() + 0 * all_outputs
        return loss, {name: value.item() for name, value in (parts | more).items()}

    def losses(self, batch: ClipBatch) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        """Return the weighted losses of one clip by name, other values to log, and all outputs of the model."""
        config = self.model.config.losses
        ids, target, positive, mask, counted = (
            self.to_device(t) for t in (batch.input_ids, batch.target, batch.positive, batch.mask, batch.counted)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            suffix = self.language(batch, self.visual_tokens(self.to_device(batch.frames)), ids)
            choices = target >= 0
            logits = self.model.language_model.logits(suffix[-1][choices])
            feature_map = self.feature_map(self.to_device(batch.fine))
            times = self.to_device(batch.fine_times)
            taps = self.taps(batch, suffix)
            found = self.model.spatial_decoder.localize(feature_map[None], taps, times[None], mask[None])
        parts, more = {}, {}
        if choices.any():  # tracking in a single group has no choices
            parts["language"] = config.language * F.cross_entropy(logits, target[choices])
            more["token_accuracy"] = (logits.argmax(-1) == target[choices]).float().mean()
        if counted.any():
            rows, columns = feature_map.shape[1:3]
            boxes = self.to_device(batch.boxes)[None]
            spatial, iou = spatial_losses(found, boxes, positive[None], counted[None], (rows, columns), config)
            wrong = (found.presence[-1][0] > 0) != positive
            more["presence_accuracy"] = 1 - wrong[counted].float().mean()
            if (positive & counted).any():
                parts |= spatial
                more["iou"] = iou
            else:  # without positive frames, the other losses are means of no values
                parts["presence"] = spatial["presence"]
        outputs = [suffix[-1], logits, *found.boxes, *found.presence, found.heat, found.content, found.summary]
        return parts, more, outputs

    @property
    def trains_vision(self) -> bool:
        """Whether a weight of the vision blocks is trained."""
        parameters = self.model.vision_encoder.named_parameters()
        return any(parameter.requires_grad for name, parameter in parameters if "merger" not in name)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device of the model."""
        return tensor.to(self.device, non_blocking=True)

    def encode(self, frames: Tensor) -> Iterator[tuple[list[Tensor], tuple[int, int]]]:
        """Yield the residual streams of chunks of groups uint8 [G, P, height, width, 3], with rows and columns."""
        spec = self.model.spec
        rows, columns = frames.shape[2] // spec.vision.patch_size, frames.shape[3] // spec.vision.patch_size
        positions = [
            self.to_device(torch.from_numpy(table)) for table in vision_tables(spec.vision, rows, columns).values()
        ]
        size = max(1, min(spec.frames.encoder_chunk_groups, spec.frames.encoder_chunk_patches // (rows * columns)))
        for part in frames.split(size):
            with torch.set_grad_enabled(self.trains_vision):
                states = self.model.vision_encoder.hidden_states(part, *positions)
            yield states, (rows, columns)

    def visual_tokens(self, frames: Tensor) -> Tensor:
        """Return visual tokens [1+D, n, H] of coarse groups."""
        return torch.cat([self.model.vision_encoder.merge(states) for states, _ in self.encode(frames)], 1)

    def feature_map(self, frames: Tensor) -> Tensor:
        """Return the feature map [F, h, w, C] of fine frames, each repeated to fill its group."""
        groups = frames[:, None].expand(-1, self.model.spec.vision.temporal_patch_size, -1, -1, -1)
        encoder = self.model.vision_encoder
        return torch.cat([encoder.feature_map(states[-1], *grid) for states, grid in self.encode(groups)])

    def language(self, batch: ClipBatch, tokens: Tensor, ids: Tensor) -> list[Tensor]:
        """Return the residual streams [B, L, H] of the rows, after their common prefix."""
        return prefix_and_suffix_states(self.model.language_model, batch.prefix, tokens, ids, clips=1)[1]

    def taps(self, batch: ClipBatch, suffix: list[Tensor]) -> Tensor:
        """Return taps [T, 1, B, Q, H] of the bridging queries; `suffix` are the streams of `language`."""
        return bridging_taps(self.model.language_model, suffix, self.to_device(batch.length), clips=1)
