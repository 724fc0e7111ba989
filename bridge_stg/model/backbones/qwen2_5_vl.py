"""Qwen2.5-VL (arXiv 2502.13923): most blocks of the encoder attend in windows, and MRoPE is split in sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)

from bridge_stg.model.backbones.interface import Backbone, build
from bridge_stg.model.vision import VisionEncoder, Windows
from bridge_stg.runtime.bundle.spec import FramesSpec, PromptSpec, VisionSpec


class Qwen2_5VLEncoder(VisionEncoder):  # noqa: N801
    """Encode groups of frames; the blocks of `fullatt_block_indexes` attend to the whole group, others in windows.

    transformers reorders the patches window by window, and back at the end. Here they stay in merge order, and only
    queries, keys and values are gathered: what comes out is the same, and feature maps need no order of their own.
    """

    def hidden_states(
        self, frames: Tensor, cos: Tensor, sin: Tensor, window_index: Tensor, window_mask: Tensor, window_place: Tensor
    ) -> list[Tensor]:
        """Return the residual stream [G, N, C] after each block, in merge order."""
        x = self.patchify(frames)
        windows = Windows(window_index, window_mask, window_place)
        states = []
        for index, block in enumerate(self.model.blocks):
            full = index in self.model.fullatt_block_indexes
            x = x + self.attend(block, block.norm1(x), cos, sin, None if full else windows)
            x = x + block.mlp(block.norm2(x))
            states.append(x)
        return states

    def merge(self, states: list[Tensor]) -> Tensor:
        """Return visual tokens [1, G·N/merge², H]."""
        merged: Tensor = self.model.merger(states[-1].flatten(0, 1))
        return merged[None]

    def forward(
        self,
        frames: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        window_index: Tensor,
        window_mask: Tensor,
        window_place: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Encode frames.

        Args:
            frames: uint8 [G, P, height, width, 3], RGB.
            rotary_cos: float32 [N, head_dim], see `bridge_stg.runtime.chain.positions.vision_tables`.
            rotary_sin: float32 [N, head_dim].
            window_index: int64 [W, M], see `bridge_stg.runtime.chain.positions.window_tables`.
            window_mask: bool [W, M].
            window_place: int64 [N].

        Returns:
            visual_tokens [1, G·N/merge², H] and feature_map [G, h, w, C], taken before the patch merger.
        """
        states = self.hidden_states(frames, rotary_cos, rotary_sin, window_index, window_mask, window_place)
        return self.outputs(frames, states)


class Qwen2_5VL(Backbone):  # noqa: N801
    """The adapter."""

    family = "qwen2_5_vl"
    key_prefixes = {
        "visual.": "model.visual.",
        "model.layers.": "model.language_model.layers.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.norm.": "model.language_model.norm.",
        "language_model.": "model.language_model.",
    }
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)

    def build_config(self, values: Mapping[str, Any]) -> Qwen2_5_VLConfig:
        """See `Backbone.build_config`. Published configs are flat: the text's values stand beside `vision_config`."""
        return Qwen2_5_VLConfig(**values)

    def vision_spec(self, config: Any, *, mean: Sequence[float], std: Sequence[float]) -> VisionSpec:
        """See `Backbone.vision_spec`."""
        vision = config.vision_config
        merge = vision.spatial_merge_size
        return VisionSpec(
            family=self.family,
            patch_size=vision.patch_size,
            merge_size=merge,
            temporal_patch_size=vision.temporal_patch_size,
            hidden_size=vision.hidden_size,
            head_dim=vision.hidden_size // vision.num_heads,
            deepstack_levels=0,
            position_grid=0,
            rope_theta=float(vision.rope_parameters["rope_theta"]),
            image_mean=tuple(mean),
            image_std=tuple(std),
            window_patches=vision.window_size // merge // vision.patch_size * merge,
            tokens_per_second=float(vision.tokens_per_second),
        )

    def vision_encoder(self, config: Any, spec: VisionSpec, *, attention: str) -> VisionEncoder:
        """See `Backbone.vision_encoder`."""
        model = build(Qwen2_5_VisionTransformerPretrainedModel, config.vision_config, attention=attention)
        return Qwen2_5VLEncoder(model, spec)

    def text_model(self, config: Any, *, attention: str) -> nn.Module:
        """See `Backbone.text_model`."""
        return build(Qwen2_5_VLTextModel, config.text_config, attention=attention)

    def rotary_axes(self, text_config: Any) -> Tensor:
        """Sectioned MRoPE: first the frequencies that read the time, then those of the row, then of the column."""
        sections = text_config.rope_parameters.get("mrope_section", (16, 24, 24))
        return torch.tensor([i % 3 for i, length in enumerate(sections) for _ in range(length)])

    def prompt(self) -> PromptSpec:
        """The chat template opens with a system message. It prints no times; those are Bridge-STG's own."""
        return PromptSpec(head="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")

    def frames(self) -> FramesSpec:
        """One visual token covers 28 × 28 pixels: up to 128 tokens a coarse group, 256 a fine frame."""
        token = 28 * 28
        return FramesSpec(
            coarse_fps=2.0, coarse_max_pixels=128 * token, coarse_min_pixels=16 * token, max_coarse_groups=64,
            fine_fps=4.0, fine_max_pixels=256 * token, fine_min_pixels=64 * token, max_fine_frames=64,
        )  # fmt: skip


BACKBONE = Qwen2_5VL()
