"""Small random models of both families by transformers' own classes, the same weights in ours, and stock prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from bridge_stg.checkpoint.checkpoint import checkpoint_key
from bridge_stg.checkpoint.safetensors_file import rename_key
from bridge_stg.model.backbones import backbone
from bridge_stg.model.config import BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.chain.positions import VisualGrid, vision_tables
from bridge_stg.runtime.chain.prompt import Segment
from bridge_stg.runtime.heads.generate import stock_segment
from tests.bridge_stg.checkpoint.plain_folders import randomize

VOCAB, IMAGE, VIDEO, START, END = 128, 124, 125, 126, 127
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TEXT = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
VISION = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
          "deepstack_visual_indexes": [0, 2]}  # fmt: skip
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES = ("qwen3_vl", "qwen2_5_vl")


def stock_model(family: str) -> PreTrainedModel:
    """Return transformers' model with random weights that make every output depend on every input."""
    torch.manual_seed(0)
    if family == "qwen3_vl":
        config = Qwen3VLConfig(
            vision_config={**VISION, "num_position_embeddings": 16},
            text_config={**TEXT, "head_dim": 16, "rope_parameters": {**ROTARY, "mrope_section": [4, 2, 2]}},
            tie_word_embeddings=True, **IDS,
        )  # fmt: skip
        model: PreTrainedModel = Qwen3VLForConditionalGeneration(config)
    else:
        config = Qwen2_5_VLConfig(
            vision_config={**VISION, "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2},
            text_config={**TEXT, "rope_parameters": {**ROTARY, "mrope_section": [2, 3, 3]}},
            tie_word_embeddings=False, **IDS,
        )  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    return randomize(model, tied=family == "qwen3_vl")


def our_model(folder: Path) -> BridgeSTG:
    """Return a Bridge-STG over the backbone that `save_pretrained` wrote into a folder."""
    values = json.loads((folder / "config.json").read_text())
    family = backbone(values)
    config = BridgeSTGConfig(
        backbone=values, image_mean=family.image_mean, image_std=family.image_std, frames=family.frames(),
        prompt=family.prompt(), bridging=BridgingConfig(num_queries=3, tapped_layers=(0, 2)),
        spatial_decoder=SpatialDecoderConfig(width=32, num_layers=1, num_heads=2, ffn_width=64),
    )  # fmt: skip
    model = BridgeSTG(config).eval()
    stored = {
        rename_key(key, family.key_prefixes): value for key, value in load_file(folder / "model.safetensors").items()
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not checkpoint_key(name).startswith(("bridging.", "spatial_decoder.")):
                parameter.copy_(stored.pop(checkpoint_key(name)))
    assert not stored
    return model


@dataclass
class Picture:
    """An image (one frame) or a video, uint8 [frames, height, width, 3]."""

    frames: np.ndarray
    interval_s: float | None = None
    """Seconds between groups; None: an image."""


def picture(seed: int, rows: int, columns: int, *, side: int, frames: int | None = None) -> Picture:
    """Return random smooth-ish frames of rows × columns visual tokens, of `side` pixels each."""
    rng = np.random.default_rng(seed)
    shape = (frames or 1, rows * side // 4, columns * side // 4, 3)
    pixels = rng.integers(0, 256, shape, np.uint8).repeat(4, 1).repeat(4, 2)
    return Picture(pixels, None if frames is None else 0.75)


@dataclass
class StockPrompt:
    """Text ids and pictures in order, as the family's own processor writes them."""

    model: BridgeSTG
    parts: list[list[int] | Picture]
    ids: list[int] = field(default_factory=list)
    grids: list[VisualGrid] = field(default_factory=list)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    """What transformers takes besides ids, one entry a picture."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if isinstance(part, list):
                self.ids += part
            else:
                self._add(part)

    def _add(self, part: Picture) -> None:
        vision = self.model.spec.vision
        patch, merge, period = vision.patch_size, vision.merge_size, vision.temporal_patch_size
        frames = torch.from_numpy(part.frames).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (vision.image_mean, vision.image_std))
        frames = (frames - mean) / std
        if part.interval_s is None:
            image = Qwen2VLImageProcessorPil.patchify(None, frames[0].numpy(), patch, merge, period)
            pixels, (groups, rows, columns) = torch.from_numpy(image[0].copy()), (1, *image[1:])
            self.ids += [START, *[IMAGE] * (rows * columns // merge**2), END]
            kind = "image"
        else:
            video = Qwen3VLVideoProcessor.patchify(None, frames[None], patch, merge, period)
            pixels, (groups, rows, columns) = video[0][0], video[1:]
            tokens = rows * columns // merge**2
            if self.model.spec.vision.family == "qwen3_vl":  # each group behind its time
                for group in range(groups):
                    self.ids += [20 + group, 7, START, *[VIDEO] * tokens, END]
            else:
                self.ids += [START, *[VIDEO] * (groups * tokens), END]
                self.inputs.setdefault("second_per_grid_ts", []).append(part.interval_s)
            kind = "video"
        self.grids.append(VisualGrid(groups, rows // merge, columns // merge, part.interval_s))
        self.inputs.setdefault("pixel_values" + "_videos" * (kind == "video"), []).append(pixels)
        self.inputs.setdefault(f"{kind}_grid_thw", []).append(torch.tensor([[groups, rows, columns]]))

    def segment(self, first_row: int = 1) -> Segment:
        """Return the prompt for our loop."""
        return stock_segment(self.model.spec.vision, self.ids, (IMAGE, VIDEO), self.grids, first_row=first_row)

    def visual_tokens(self) -> np.ndarray:
        """Return [1+D, n, H] of all pictures."""
        spec = self.model.spec
        session, empty = TorchSession("vision_encoder", self.model), spec.language.hidden_size
        tokens = [np.zeros((1 + spec.vision.deepstack_levels, 0, empty), np.float32)]
        for part in self.parts:
            if isinstance(part, list):
                continue
            period, (height, width) = spec.vision.temporal_patch_size, part.frames.shape[1:3]
            frames = part.frames.repeat(period, 0) if part.interval_s is None else part.frames
            frames = np.concatenate([frames, frames[-1:].repeat(-len(frames) % period, 0)])
            tables = vision_tables(spec.vision, height // spec.vision.patch_size, width // spec.vision.patch_size)
            feeds = {"frames": frames.reshape(-1, period, height, width, 3), **tables}
            tokens.append(session.infer(feeds)["visual_tokens"])
        return np.concatenate(tokens, 1)


def visual_rows(prompts: list[StockPrompt]) -> tuple[np.ndarray, list[Segment]]:
    """Return visual_tokens [1+D, V, H] of a batch, with the zero row, and its segments."""
    tokens, segments, first = [prompt.visual_tokens() for prompt in prompts], [], 1
    for prompt, mine in zip(prompts, tokens):
        segments.append(prompt.segment(first))
        first += mine.shape[1]
    # Two zero rows where there is no picture, as in a grounding call whose tokens are all text.
    zeros = np.zeros_like(tokens[0], shape=(tokens[0].shape[0], 2 if first == 1 else 1, tokens[0].shape[2]))
    return np.concatenate([zeros, *tokens], 1), segments


def stock_inputs(prompts: list[StockPrompt]) -> dict[str, Any]:
    """Return what transformers' model takes for a batch: padded on the left, with a mask."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    names = {name for prompt in prompts for name in prompt.inputs}
    for name in names:
        values = [value for prompt in prompts for value in prompt.inputs.get(name, [])]
        inputs[name] = values if name == "second_per_grid_ts" else torch.cat(values)
    if names:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs
