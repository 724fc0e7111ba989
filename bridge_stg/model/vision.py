"""The vision encoder: uint8 frames to visual tokens for the LLM and a feature map for the spatial decoder.

Shared by the families: patches, attention within a group of frames, and the feature map. Each family's blocks are
transformers' submodules (see `backbones/`). The groups are the batch, so that the graph has no index arithmetic and no
data-dependent split. Must not know text, time or queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bridge_stg.model.recompute import Recomputed
from bridge_stg.runtime.bundle.spec import VisionSpec


def rms_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dim to a root mean square of 1, computed in fp32 (Zhang & Sennrich, arXiv 1910.07467)."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Windows(NamedTuple):
    """Index tables that gather patches into windows and back; see `runtime.chain.positions.window_tables`."""

    places: Tensor  # int64 [W, M]
    mask: Tensor  # bool [W, M]
    back: Tensor  # int64 [N]

    def split(self, x: Tensor) -> Tensor:
        """Gather x [G, heads, N, head_dim] into windows [G·W, heads, M, head_dim]."""
        (groups, heads, _, head_dim), (windows, places) = x.shape, self.places.shape
        x = x.index_select(2, self.places.flatten()).reshape(groups, heads, windows, places, head_dim)
        return x.transpose(1, 2).reshape(groups * windows, heads, places, head_dim)

    def visible(self, groups: int) -> Tensor:
        """Return the mask bool [G·W, 1, M, M]: every place of a window attends to its filled places."""
        windows, places = self.mask.shape
        mask = self.mask[None, :, None].expand(groups, windows, places, places)
        return mask.reshape(groups * windows, 1, places, places)

    def join(self, x: Tensor, groups: int) -> Tensor:
        """Return windows [G·W, M, heads, head_dim] as patches [G, N, heads · head_dim]."""
        (_, places, heads, head_dim), windows = x.shape, self.places.shape[0]
        return x.reshape(groups, windows * places, heads * head_dim).index_select(1, self.back)


class VisionEncoder(Recomputed):
    """Base of the encoders of all families.

    A family's encoder adds `hidden_states(frames, *tables)`, the residual stream after each block, `merge(states)`, and
    `forward(frames, *tables)` with its tables by name, in the order of `chain.positions.vision_tables`.

    Args:
        model: the family's vision model: `patch_embed.proj` is a Conv3d, `blocks` have an `attn` with `qkv` and `proj`.
        spec: geometry of the encoder.
    """

    model: Any  # transformers' module
    hidden_states: Callable[..., list[Tensor]]
    merge: Callable[[list[Tensor]], Tensor]
    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, spec: VisionSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        scale, shift = normalization(spec)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def patchify(self, frames: Tensor) -> Tensor:
        """Embed uint8 frames [G, P, height, width, 3] as patches [G, N, C] in merge order.

        The Conv3d of the backbone runs as a Conv2d over 3·P channels: TensorRT tensors have at most 8 dims.
        """
        groups, period, height, width, _ = frames.shape
        patch, merge = self.spec.patch_size, self.spec.merge_size
        rows, columns, channels = height // patch, width // patch, self.spec.hidden_size
        x = frames.to(self.scale.dtype) * self.scale + self.shift
        x = x.permute(0, 4, 1, 2, 3).reshape(groups, 3 * period, height, width)
        conv = self.model.patch_embed.proj
        weight = conv.weight.reshape(channels, 3 * self.spec.temporal_patch_size, patch, patch)
        x = F.conv2d(x, weight, conv.bias, stride=patch)
        x = x.reshape(groups, channels, rows // merge, merge, columns // merge, merge)
        # For some sizes the reshape is a view, which the mergers do not accept.
        return x.permute(0, 2, 4, 3, 5, 1).reshape(groups, rows * columns, channels).contiguous()

    def attend(self, block: Any, x: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None = None) -> Tensor:
        """Attend within each group, or within the windows of each: x [G, N, C], rotary tables [N, head_dim]."""
        attention = block.attn
        groups, patches, channels = x.shape
        heads, head_dim = attention.num_heads, self.spec.head_dim
        qkv = attention.qkv(x).reshape(groups, patches, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mask = None
        if windows is not None:
            query, key, value = windows.split(query), windows.split(key), windows.split(value)
            mask = windows.visible(groups)
        attend = ALL_ATTENTION_FUNCTIONS[self.model.config._attn_implementation]  # noqa: SLF001 - no public accessor
        out, _ = attend(attention, query, key, value, mask, scaling=attention.scaling, dropout=0.0, is_causal=False)
        if windows is not None:
            out = windows.join(out, groups)
        projected: Tensor = attention.proj(out.reshape(groups, patches, channels))
        return projected

    def residual(self, block: Any, x: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None = None) -> Tensor:
        """Run a block on x [G, N, C]; arguments as for `attend`."""
        x = x + self.attend(block, block.norm1(x), cos, sin, windows)
        output: Tensor = x + block.mlp(block.norm2(x))
        return output

    def feature_map(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return x [G, N, C] as an RMS-normalised map [G, rows, columns, C] in raster order."""
        merge = self.spec.merge_size
        groups, channels = x.shape[0], self.spec.hidden_size
        x = x.reshape(groups, rows // merge, columns // merge, merge, merge, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(groups, rows, columns, channels)
        return rms_normalize(x)

    def outputs(self, frames: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return visual_tokens [1+D, G·N/merge², H] and feature_map [G, h, w, C], taken before the patch merger."""
        rows, columns = (size // self.spec.patch_size for size in frames.shape[2:4])
        return self.merge(states), self.feature_map(states[-1], rows, columns)


def normalization(spec: VisionSpec) -> tuple[Tensor, Tensor]:
    """Return scale and shift [3] that normalize bytes 0–255 by the mean and deviation of the encoder's training."""
    std = torch.tensor(spec.image_std) * 255
    return 1 / std, -torch.tensor(spec.image_mean) * 255 / std


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to x [..., N, head_dim] with tables [N, head_dim], in fp32."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
