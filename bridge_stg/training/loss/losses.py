"""The losses of the spatial decoder. Boxes are cxcywh in 0..1, float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge_stg.model.config import LossConfig
from bridge_stg.model.spatial_decoder import Localization, patch_centres


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Return corners [..., 4] of boxes [..., 4]."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def box_iou_giou(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalized IoU (Rezatofighi et al., arXiv 1902.09630) of paired boxes [..., 4]."""
    a, b = box_cxcywh_to_xyxy(first), box_cxcywh_to_xyxy(second)
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - shared + 1e-7
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1) + 1e-7
    return shared / union, shared / union - (hull - union) / hull


def heat_target(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """Return a distribution [..., rows·columns] over patches with centres in the box's inner 80 %, else the nearest."""
    offset = patch_centres(rows, columns) - boxes[..., None, :2]
    inside = (offset.abs() < boxes[..., None, 2:] * 0.4).all(-1).float()
    target = inside + 1e-6 * torch.exp(-50 * offset.pow(2).sum(-1))
    return target / target.sum(-1, keepdim=True)


def spatial_losses(  # noqa: PLR0917 - each is a different tensor or config
    output: Localization, boxes: Tensor, positive: Tensor, valid: Tensor, grid: tuple[int, int], config: LossConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Return weighted losses by name, and the mean IoU of the last boxes.

    `boxes` [V, B, F, 4] are the true ones, of which only those of positive frames are read. The bool tensors [V, B, F]
    say whether the target is in the frame, and whether the frame counts for the query. `grid` is (rows, columns).
    """
    positive = positive & valid
    weights = [0.5] * (len(output.boxes) - 1) + [1.0]
    total = sum(weights)
    truth = boxes[positive]
    l1 = giou = iou = truth.sum() * 0
    for weight, predicted in zip(weights, output.boxes):
        iou, generalized = box_iou_giou(predicted[positive], truth)
        l1 = l1 + weight / total * (predicted[positive] - truth).abs().sum(-1).mean()
        giou = giou + weight / total * (1 - generalized).mean()
    share = 1 / len(output.presence)
    presence = torch.zeros(())
    for logit in output.presence:
        presence = presence + share * F.binary_cross_entropy_with_logits(logit[valid], positive[valid].float())
    heat = -(output.heat[positive].float().log_softmax(-1) * heat_target(truth, *grid)).sum(-1).mean()
    parts = {
        "l1": config.l1 * l1,
        "giou": config.giou * giou,
        "presence": config.presence * presence,
        "heat": config.heat * heat,
        "contrastive": config.contrastive * contrastive_loss(output, positive, valid, config.contrastive_temperature),
    }
    return parts, iou.mean()


def contrastive_loss(output: Localization, positive: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE (van den Oord et al., arXiv 1807.03748) between bridging queries and frames.

    A query's summary is attracted by the content of frames with the target, and repelled by its other frames.
    """
    summary, content = F.normalize(output.summary.float(), dim=-1), F.normalize(output.content.float(), dim=-1)
    similarity = (summary[:, :, None] * content).sum(-1) / temperature
    others = similarity.masked_fill(positive | ~valid, -1e4).logsumexp(-1, keepdim=True)
    return F.softplus(others - similarity)[positive].mean()
