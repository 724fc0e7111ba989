"""The vision encoder: uint8 frames to visual tokens for the LLM and a feature map for the spatial decoder.

Runs transformers' own Qwen3-VL vision submodules, with the temporal patches as the batch, so that no index arithmetic
and no data-dependent split enters the graph. Knows nothing of text, time and queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from bridge_stg.runtime.spec import VisionSpec


def rms_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dim to a root mean square of 1, computed in fp32 (Zhang & Sennrich, arXiv 1910.07467)."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class VisionEncoder(nn.Module):
    """Encode groups of frames with the backbone's vision model (Qwen3-VL, arXiv 2511.21631)."""

    def __init__(self, model: Qwen3VLVisionModel, spec: VisionSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        std = torch.tensor(spec.image_std) * 255
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -torch.tensor(spec.image_mean) * 255 / std, persistent=False)

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
        return x.permute(0, 2, 4, 3, 5, 1).reshape(groups, rows * columns, channels)

    def attend(self, block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within each group: x [G, N, C], rotary tables [N, head_dim]."""
        attention = block.attn
        groups, patches, channels = x.shape
        heads, head_dim = attention.num_heads, self.spec.head_dim
        qkv = attention.qkv(x).reshape(groups, patches, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attend = ALL_ATTENTION_FUNCTIONS[self.model.config._attn_implementation]
        out, _ = attend(attention, query, key, value, None, scaling=attention.scaling, dropout=0.0, is_causal=False)
        return attention.proj(out.reshape(groups, patches, channels))

    def hidden_states(self, frames: Tensor, pos_index: Tensor, pos_weight: Tensor, cos: Tensor, sin: Tensor) -> list:
        """Return the residual stream [G, N, C] after each block, in merge order."""
        x = self.patchify(frames)
        x = x + (self.model.pos_embed(pos_index) * pos_weight[..., None]).sum(1)
        states = []
        for block in self.model.blocks:
            x = x + self.attend(block, block.norm1(x), cos, sin)
            x = x + block.mlp(block.norm2(x))
            states.append(x)
        return states

    def merge(self, states: list[Tensor]) -> Tensor:
        """Return visual tokens [1+D, G·N/merge², H]: the merger's output, then one row a deepstack level."""
        levels = list(self.model.deepstack_visual_indexes)
        deep = [merger(states[level].flatten(0, 1)) for merger, level in zip(self.model.deepstack_merger_list, levels)]
        return torch.stack([self.model.merger(states[-1].flatten(0, 1)), *deep])

    def feature_map(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return x [G, N, C] as an RMS-normalised map [G, rows, columns, C] in raster order."""
        merge = self.spec.merge_size
        groups, channels = x.shape[0], self.spec.hidden_size
        x = x.reshape(groups, rows // merge, columns // merge, merge, merge, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(groups, rows, columns, channels)
        return rms_normalize(x)

    def forward(
        self, frames: Tensor, pos_index: Tensor, pos_weight: Tensor, rotary_cos: Tensor, rotary_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode frames.

        Args:
            frames: uint8 [G, P, height, width, 3], RGB.
            pos_index: int64 [N, 4], see `bridge_stg.runtime.positions.vision_tables`.
            pos_weight: float32 [N, 4].
            rotary_cos: float32 [N, head_dim].
            rotary_sin: float32 [N, head_dim].

        Returns:
            visual_tokens [1+D, G·N/merge², H] and feature_map [G, h, w, C], taken before the patch merger.
        """
        rows, columns = (size // self.spec.patch_size for size in frames.shape[2:4])
        states = self.hidden_states(frames, pos_index, pos_weight, rotary_cos, rotary_sin)
        return self.merge(states), self.feature_map(states[-1], rows, columns)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to x [..., N, head_dim] with tables [N, head_dim], in fp32."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
