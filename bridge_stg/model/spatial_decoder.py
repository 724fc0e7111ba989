"""QGSL: the spatial decoder. From the bridging queries, it computes a box and a presence score in each frame.

The first reference box comes from a heat map of query against patch, in which each patch votes for a box. Each layer
then attends to the queries of all taps, across frames, and to the frame's fine feature map, and moves the box
(iterative refinement, arXiv 2010.04159). Votes are in units of patches and moves in units of boxes, so that both mean
the same on landscape and portrait frames. Must not know text and the choice of frames.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bridge_stg.model.attention import MATMUL
from bridge_stg.model.bridging import BridgingAggregator
from bridge_stg.model.config import SpatialDecoderConfig

COORDINATE_BANDS = 16
TIME_BANDS = 16
VOTE_PATCHES = 4.5


@dataclass(frozen=True)
class Localization:
    """Outputs for training. V = videos, B = queries per video, F = frames, N = patches, d = width."""

    boxes: list[Tensor]  # the reference box, then one after each layer: float32 [V, B, F, 4] cxcywh in 0..1
    presence: list[Tensor]  # logits [V, B, F] after each layer
    heat: Tensor  # logits [V, B, F, N] in raster order
    content: Tensor  # [V, B, F, d], the features weighted by the heat map
    summary: Tensor  # [V, B, d], the bridging queries in one vector


class MLP(nn.Sequential):
    """Linear layers with GELU between them."""

    def __init__(self, *sizes: int) -> None:
        layers: list[nn.Module] = []
        for first, second in itertools.pairwise(sizes):
            layers += [nn.Linear(first, second), nn.GELU()]
        super().__init__(*layers[:-1])


class CrossAttention(nn.Module):
    """Multi-head attention of queries [M, Lq, d] on keys and values [M, Lk, d], with an optional boolean mask.

    `attention` is a name in transformers' attention registry, as in the backbone's layers.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = MATMUL
        self.heads, self.head_dim = heads, width // heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; mask bool [M, Lq, Lk], True where visible."""
        q, k, v = (
            linear(x).reshape(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)
            for linear, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        visible = None if mask is None else mask[:, None]
        out, _ = ALL_ATTENTION_FUNCTIONS[self.attention](self, q, k, v, visible, scaling=self.head_dim**-0.5)
        attended: Tensor = self.out(out.reshape(query.shape))
        return attended


class DecoderLayer(nn.Module):
    """One round: bridging queries, other frames, this frame's patches, feed-forward."""

    def __init__(self, config: SpatialDecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.bridge, self.time, self.space = (CrossAttention(width, config.num_heads) for _ in range(3))
        self.feed_forward = MLP(width, config.ffn_width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))


class SpatialDecoder(nn.Module):
    """Localize the target of each query in each frame.

    The feature map has `channels` channels, and the taps are those of `num_taps` layers of width `hidden_size`.
    """

    def __init__(
        self, config: SpatialDecoderConfig, *, channels: int, num_taps: int, num_queries: int, hidden_size: int
    ) -> None:
        super().__init__()
        width = config.width
        self.aggregator = BridgingAggregator(num_taps, num_queries, hidden_size, width)
        self.feature = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.coordinate = nn.Linear(4 * COORDINATE_BANDS, width)
        self.time = nn.Linear(2 * TIME_BANDS, width)
        self.heat_query, self.heat_key = nn.Linear(width, width), nn.Linear(width, width)
        self.vote = MLP(width, width, 4)
        self.reference = MLP(8 * COORDINATE_BANDS, width, width)
        self.content = nn.Linear(width, width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.box_heads = nn.ModuleList(MLP(width, width, 4) for _ in range(config.num_layers))
        self.presence_heads = nn.ModuleList(MLP(2 * width + 2, width, 1) for _ in range(config.num_layers))
        for head in self.box_heads:
            for parameter in list(head.parameters())[-2:]:  # weight and bias of the last layer
                nn.init.zeros_(parameter)

    def localize(self, feature_map: Tensor, taps: Tensor, frame_times: Tensor, frame_mask: Tensor) -> Localization:
        """Run all layers on V videos with equal numbers of queries and frames; see `forward` for one video.

        Shapes: feature_map [V, F, h, w, C], taps [T, V, B, Q, H], frame_times [V, F], frame_mask [V, B, F].
        """
        videos, frames, rows, columns, _ = feature_map.shape
        queries = taps.shape[2]
        patches = rows * columns
        memory, summary = self.aggregator(taps.flatten(1, 2))
        bridge = memory
        features = self.feature(feature_map.reshape(videos * frames, patches, -1))
        width = features.shape[-1]
        centres = patch_centres(rows, columns)
        keys = features + self.coordinate(sine_embedding(centres, COORDINATE_BANDS))
        times = self.time(time_embedding(frame_times, frame_mask)).reshape(videos * queries, frames, width)

        x = summary[:, None] + times
        by_frame = self.to_frames(x, videos, queries)
        heat = self.heat_query(by_frame) @ self.heat_key(keys).transpose(-1, -2) * width**-0.5
        weights = heat.float().softmax(-1)
        reach = F.softplus(self.vote(features).float()) * patch_sides(rows, columns)
        low, high = centres - reach[..., :2], centres + reach[..., 2:]
        voted = torch.cat([(low + high) / 2, high - low], -1)
        reference = self.to_queries(weights @ voted, videos, queries)
        content = self.content(self.to_queries(weights.to(features.dtype) @ features, videos, queries))
        peak = torch.stack([heat.float().amax(-1), heat.float().logsumexp(-1)], -1)
        peak = self.to_queries(peak, videos, queries)
        x = x + content

        mask = frame_mask.reshape(videos * queries, 1, frames).expand(-1, frames, -1)
        boxes, presence = [reference], []
        for module, box_head, presence_head in zip(self.layers, self.box_heads, self.presence_heads):
            layer = cast(DecoderLayer, module)
            place = self.reference(sine_embedding(reference, COORDINATE_BANDS).to(x.dtype))
            y = layer.norms[0](x) + times
            x = x + layer.bridge(y, bridge, bridge)
            y = layer.norms[1](x)
            x = x + layer.time(y + times, y + times, y, mask)
            y = self.to_frames(layer.norms[2](x) + place, videos, queries)
            x = x + self.to_queries(layer.space(y, keys, features), videos, queries)
            x = x + layer.feed_forward(layer.norms[3](x))
            reference = move_boxes(reference, box_head(x).float())
            boxes.append(reference)
            evidence = torch.cat([x, content, peak.to(x.dtype)], -1)
            presence.append(presence_head(evidence)[..., 0].float())
            if self.training:
                reference = reference.detach()
        shape = (videos, queries, frames)
        return Localization(
            boxes=[box.reshape(*shape, 4) for box in boxes],
            presence=[logit.reshape(shape) for logit in presence],
            heat=self.to_queries(heat, videos, queries).reshape(*shape, patches),
            content=content.reshape(*shape, width),
            summary=summary.reshape(videos, queries, width),
        )

    @staticmethod
    def to_frames(x: Tensor, videos: int, queries: int) -> Tensor:
        """Reorder [V·B, F, d] to [V·F, B, d]."""
        return x.reshape(videos, queries, x.shape[1], x.shape[2]).transpose(1, 2).flatten(0, 1)

    @staticmethod
    def to_queries(x: Tensor, videos: int, queries: int) -> Tensor:
        """Reorder [V·F, B, d] to [V·B, F, d]."""
        return x.reshape(videos, x.shape[0] // videos, queries, x.shape[2]).transpose(1, 2).flatten(0, 1)

    def forward(
        self, feature_map: Tensor, taps: Tensor, frame_times: Tensor, frame_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return boxes float32 [B, F, 4] cxcywh and presence float32 [B, F], both in 0..1, of one video.

        Shapes: feature_map [F, h, w, C], taps [T, B, Q, H], frame_times float32 [F] in seconds, frame_mask bool [B, F]
        with at least one True per row; False frames are excluded from attention across frames.
        """
        found = self.localize(feature_map[None], taps[:, None], frame_times[None], frame_mask[None])
        return found.boxes[-1][0], found.presence[-1][0].sigmoid()


def patch_centres(rows: int, columns: int) -> Tensor:
    """Return the centres [rows·columns, 2] (x, y) of a raster of patches, in 0..1."""
    y = (torch.arange(rows, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float32) + 0.5) / columns
    return torch.stack([x[None].expand(rows, columns), y[:, None].expand(rows, columns)], -1).reshape(rows * columns, 2)


def patch_sides(rows: int, columns: int) -> Tensor:
    """Return the reach [4] (left, up, right, down), in 0..1, of a vote of 1: VOTE_PATCHES patches in each direction."""
    x = torch.ones(1, dtype=torch.float32) * VOTE_PATCHES / columns
    y = torch.ones(1, dtype=torch.float32) * VOTE_PATCHES / rows
    return torch.cat([x, y, x, y])


def move_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Shift centres by deltas in units of the box, and scale sides by their exponential (arXiv 1311.2524, app. C).

    Unlike an offset of logits, it does not depend on the aspect ratio of the frame. Both are [..., 4].
    """
    centre = boxes[..., :2] + deltas[..., :2].clamp(-2.0, 2.0) * boxes[..., 2:]
    size = boxes[..., 2:] * deltas[..., 2:].clamp(-2.0, 2.0).exp()
    return torch.cat([centre.clamp(0.0, 1.0), size.clamp(1e-3, 1.0)], -1)


def sine_embedding(x: Tensor, bands: int) -> Tensor:
    """Embed coordinates [..., n] in 0..1 as sines and cosines [..., n·2·bands] of wavelengths 2 … 1/16."""
    octaves = torch.arange(bands, dtype=torch.float32) * (5.0 / (bands - 1))
    angles = x.float()[..., None] * (math.pi * torch.exp2(octaves))
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def time_embedding(times: Tensor, mask: Tensor) -> Tensor:
    """Embed seconds [V, F] relative to the mean of each query's frames: [V, B, F, 2·TIME_BANDS], periods 0.5–64 s."""
    share = mask.to(times.dtype)
    mean = (share * times[:, None]).sum(-1, keepdim=True) / share.sum(-1, keepdim=True)
    octaves = torch.arange(TIME_BANDS, dtype=torch.float32) * (7.0 / (TIME_BANDS - 1)) - 1.0
    angles = (times[:, None] - mean)[..., None] * (2 * math.pi / torch.exp2(octaves))
    return torch.cat([angles.sin(), angles.cos()], -1)
