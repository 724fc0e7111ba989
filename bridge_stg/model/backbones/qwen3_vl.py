"""Qwen3-VL (arXiv 2511.21631): learned positions in the encoder, deepstack, and times printed in the prompt."""

from __future__ import annotations

import dataclasses
import math
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel

from bridge_stg.model.backbones.interface import Backbone, vision_geometry
from bridge_stg.model.vision import VisionEncoder
from bridge_stg.runtime.bundle.spec import Deviations, FramesSpec, Means, PromptSpec, VisionSpec


class Qwen3VLEncoder(VisionEncoder):
    """Encode groups of frames; every block attends to the whole group."""

    def hidden_states(
        self, frames: Tensor, pos_index: Tensor, pos_weight: Tensor, cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        """Return the residual stream [G, N, C] after each block, in merge order."""
        x = self.patchify(frames)
        x = x + (self.model.pos_embed(pos_index) * pos_weight[..., None]).sum(1)
        states = []
        for block in self.model.blocks:
            x = self.run_block(self.residual, block, x, cos, sin)
            states.append(x)
        return states

    def merge(self, states: list[Tensor]) -> Tensor:
        """Return visual tokens [1+D, G·N/merge², H]: the merger's output, then one row per deepstack level."""
        levels = zip(self.model.deepstack_visual_indexes, self.model.deepstack_merger_list, strict=True)
        deep = [merger(states[level].flatten(0, 1)) for level, merger in sorted(levels, key=itemgetter(0))]
        return torch.stack([self.model.merger(states[-1].flatten(0, 1)), *deep])

    def forward(
        self, frames: Tensor, pos_index: Tensor, pos_weight: Tensor, rotary_cos: Tensor, rotary_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode frames uint8 [G, P, height, width, 3], given the tables of `chain.positions.vision_tables`.

        Returns visual_tokens [1+D, G·N/merge², H] and feature_map [G, h, w, C], taken before the patch merger.
        """
        return self.outputs(frames, self.hidden_states(frames, pos_index, pos_weight, rotary_cos, rotary_sin))


class Qwen3VL(Backbone):
    """Adapter of Qwen3-VL."""

    family = "qwen3_vl"
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    token_side = 32
    config_class = Qwen3VLConfig
    vision_class = Qwen3VLVisionModel
    text_class = Qwen3VLTextModel
    encoder_class = Qwen3VLEncoder

    def vision_spec(self, config: Any, *, mean: Means, std: Deviations) -> VisionSpec:
        """See `Backbone.vision_spec`."""
        vision = config.vision_config
        levels, grid = vision.deepstack_visual_indexes, math.isqrt(vision.num_position_embeddings)
        if len(set(levels)) < len(levels) or any(level >= vision.depth for level in levels):
            expected = f"expected different blocks, 0 to {vision.depth - 1}"
            raise ValueError(f"vision_config.deepstack_visual_indexes is {list(levels)}, {expected}")
        if grid**2 != vision.num_position_embeddings:
            found = f"vision_config.num_position_embeddings is {vision.num_position_embeddings}"
            raise ValueError(f"{found}, expected the square of a number")
        return vision_geometry(self.family, config, mean, std, deepstack_levels=len(levels), position_grid=grid)

    def rotary_axes(self, text_config: Any) -> Tensor:
        """Return interleaved MRoPE: time, row, column, time, row, column …, then only time at the low frequencies."""
        _, rows, columns = text_config.rope_parameters.get("mrope_section", (24, 20, 20))
        axes = torch.zeros(text_config.head_dim // 2, dtype=torch.int64)
        axes[1 : 3 * rows : 3] = 1
        axes[2 : 3 * columns : 3] = 2
        return axes

    def prompt(self) -> PromptSpec:
        """Return the chat template, which has no system message; the processor prints each group's time as text.

        The template's own markers stay around all groups (since transformers 5.10; earlier, they were replaced).
        """
        return PromptSpec(
            head="<|im_start|>user\n<|vision_start|>",
            query="<|vision_end|>Find {query}.<|im_end|>\n<|im_start|>assistant\n",
            track="<|vision_end|>Track {query}, first at {box}.<|im_end|>\n<|im_start|>assistant\n",
        )

    def text_frames(self, *, image_pixels: int | None, video_pixels: int | None) -> FramesSpec:
        """See `Backbone.text_frames`; the video processor limits the pixels of all frames together."""
        frames = super().text_frames(image_pixels=image_pixels, video_pixels=None)
        if video_pixels is None:
            return frames
        # Two frames are one group, the temporal patch of every published model.
        return dataclasses.replace(frames, max_visual_tokens=max(1, video_pixels // (2 * self.token_side**2)))


BACKBONE = Qwen3VL()
