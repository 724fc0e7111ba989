"""Qwen2.5-VL (arXiv 2502.13923): windowed attention in most blocks of the encoder, and MRoPE in sections."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)

from bridge_stg.model.backbones.interface import Backbone, vision_geometry
from bridge_stg.model.vision import VisionEncoder, Windows
from bridge_stg.runtime.bundle.spec import Deviations, Means, PromptSpec, TextSpec, VisionSpec


class Qwen2_5VLEncoder(VisionEncoder):
    """Encode groups of frames; the blocks of `fullatt_block_indexes` attend to the whole group, others in windows.

    transformers reorders the patches by window, and back at the end. Here they stay in merge order, and only queries,
    keys and values are gathered: the results are equal, and feature maps need no reordering.
    """

    def hidden_states(  # noqa: PLR0917 - the graph's inputs
        self, frames: Tensor, cos: Tensor, sin: Tensor, window_index: Tensor, window_mask: Tensor, window_place: Tensor
    ) -> list[Tensor]:
        """Return the residual stream [G, N, C] after each block, in merge order."""
        x = self.patchify(frames)
        windows = Windows(window_index, window_mask, window_place)
        states = []
        for index, block in enumerate(self.model.blocks):
            full = index in self.model.fullatt_block_indexes
            x = self.run_block(self.residual, block, x, cos, sin, None if full else windows)
            states.append(x)
        return states

    def merge(self, states: list[Tensor]) -> Tensor:
        """Return visual tokens [1, G·N/merge², H]."""
        merged: Tensor = self.model.merger(states[-1].flatten(0, 1))
        return merged[None]

    def forward(  # noqa: PLR0917 - the graph's inputs
        self, frames: Tensor, rotary_cos: Tensor, rotary_sin: Tensor, window_index: Tensor, window_mask: Tensor,
        window_place: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Encode frames uint8 [G, P, height, width, 3], given the tables of `chain.positions.vision_tables`.

        Returns visual_tokens [1, G·N/merge², H] and feature_map [G, h, w, C], taken before the patch merger.
        """
        states = self.hidden_states(frames, rotary_cos, rotary_sin, window_index, window_mask, window_place)
        return self.outputs(frames, states)


class Qwen2_5VL(Backbone):
    """Adapter of Qwen2.5-VL."""

    family = "qwen2_5_vl"
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)
    token_side = 28
    config_class = Qwen2_5_VLConfig  # published configs are flat: text values are siblings of `vision_config`
    vision_class = Qwen2_5_VisionTransformerPretrainedModel
    text_class = Qwen2_5_VLTextModel
    encoder_class = Qwen2_5VLEncoder

    def vision_spec(self, config: Any, *, mean: Means, std: Deviations) -> VisionSpec:
        """See `Backbone.vision_spec`."""
        vision = config.vision_config
        merge = vision.spatial_merge_size
        if (least := merge * vision.patch_size) > vision.window_size:
            raise ValueError(f"vision_config.window_size is {vision.window_size}, expected at least {least}")
        return vision_geometry(
            self.family, config, mean, std, deepstack_levels=0, position_grid=0,
            window_patches=vision.window_size // merge // vision.patch_size * merge,
            tokens_per_second=float(vision.tokens_per_second),
        )  # fmt: skip

    def rotary_axes(self, text_config: Any) -> Tensor:
        """Return sectioned MRoPE: first the frequencies of the time, then of the row, then of the column."""
        sections = text_config.rope_parameters.get("mrope_section", (16, 24, 24))
        return torch.tensor([i % 3 for i, length in enumerate(sections) for _ in range(length)])

    def prompt(self) -> PromptSpec:
        """Return the chat template, which begins with a system message; the printed times are added by Bridge-STG."""
        return PromptSpec(head="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")

    def text_prompt(self) -> PromptSpec:
        """Return the chat template around the adjacent groups of a video, whose times are positions."""
        prompt = self.prompt()
        return dataclasses.replace(prompt, head=prompt.head + prompt.group_open, prints_times=False)

    def text(self) -> TextSpec:
        """Return the default messages, since the family has none for tubes; boxes are pixels of the resized frame."""
        return dataclasses.replace(super().text(), image_head=self.text_prompt().head, box_scale=0)


BACKBONE = Qwen2_5VL()
