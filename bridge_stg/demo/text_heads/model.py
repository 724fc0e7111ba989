"""The demo model with text heads: the backbone of the demo checkpoint, and tokens for the text of boxes.

A side of a box is one token with the comma or bracket that follows it, as in Pix2Seq (Chen et al., arXiv 2109.10852).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge_stg.demo.tiny_model import demo_config, demo_tokenizer_json
from bridge_stg.model.config import BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.spec import TextSpec
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.heads.json_grammar import BOX, END, LABEL, START, TIME

SCALE = 100  # boxes are in hundredths of the frame
OPEN, SEPARATOR, CLOSE, STOP = "[", ", ", "]", "<|im_end|>"
TEXTS = (TIME, BOX, f'{LABEL}"', START, END, '"}', f'"}}{SEPARATOR}')
SIDES = (*(f"{value}, " for value in range(SCALE + 1)), *(f"{value}]" for value in range(SCALE + 1)))
"""Tokens of the sides of boxes: left, top and right, then bottom."""
SPACE = "Ġ"  # in byte-level vocabularies
VOCABULARY_STEP = 64
PLACE_NORM = 4.0  # of the position embeddings at the edges of the frame; visual hidden states have about 8


def text_tokenizer_json() -> dict[str, Any]:
    """Return the demo's `tokenizer.json` with `TEXTS` and `SIDES` as further tokens, in this order after all others.

    Text is split at them, and into words, digits and single other characters as before.
    """
    values = demo_tokenizer_json()
    first = values["added_tokens"][-1]["id"] + 1
    _, byte_level = values["pre_tokenizer"]["pretokenizers"]
    vocabulary = values["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in values["added_tokens"]}  # else they would come last
    vocabulary |= {text.replace(" ", SPACE): first + i for i, text in enumerate((*TEXTS, *SIDES))}
    texts = "|".join(map(re.escape, sorted(TEXTS, key=len, reverse=True)))
    sides = rf"(?:{SCALE}|[1-9]?[0-9])(?:, |\])"
    others = r" ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
    pieces = f"{texts}|{sides}|{others}"
    split = {"type": "Split", "pattern": {"Regex": pieces}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"]["pretokenizers"] = [split, {**byte_level, "use_regex": False}]
    return values


def write_text_tokenizer(path: Path) -> None:
    """Write the `tokenizer.json` of the demo with text heads."""
    path.write_text(json.dumps(text_tokenizer_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def first_side_id() -> int:
    """Return the id of the first of `SIDES`; the others follow."""
    return int(text_tokenizer_json()["model"]["vocab"][SIDES[0].replace(" ", SPACE)])


def text_config() -> BridgeSTGConfig:
    """Return the demo's configuration with text heads; coarse and fine frames are as large as those of bridge heads."""
    base = demo_config()
    stop = next(token["id"] for token in demo_tokenizer_json()["added_tokens"] if token["content"] == STOP)
    size = VOCABULARY_STEP * math.ceil((first_side_id() + len(SIDES)) / VOCABULARY_STEP)
    turn = f"{{message}}{STOP}\n<|im_start|>assistant\n"
    text = TextSpec(
        tube="track {query}.", span="find {query}.", image="locate {query}.", video_turn=turn,
        image_turn=f"<|vision_end|>{turn}", list_open=OPEN, list_separator=SEPARATOR, list_close=CLOSE,
        box_scale=SCALE, stop_ids=(stop,),
    )  # fmt: skip
    backbone = {**base.backbone, "text_config": {**base.backbone["text_config"], "vocab_size": size}}
    return dataclasses.replace(
        base, backbone=backbone, heads="text", text=text, bridging=BridgingConfig(),
        spatial_decoder=SpatialDecoderConfig(),
    )  # fmt: skip


def text_model(start: BridgeSTG, tokenizer: Tokenizer) -> BridgeSTG:
    """Return the model with text heads whose vision encoder and LLM begin as those of `start`, a demo checkpoint.

    A new token of `TEXTS` begins as the mean of the tokens that spelled it, one of `SIDES` with random waves over its
    value, so that neighbours are alike. Visual tokens of the demo checkpoint hardly tell their place in the frame, as
    bridge heads do not need it; so the position embeddings get a ramp over the rows and one over the columns.
    `tokenizer` is that of the new model.
    """
    assert start.tokenizer is not None
    model = BridgeSTG(text_config(), tokenizer)
    model.vision_encoder.load_state_dict(start.vision_encoder.state_dict())
    weights = start.language_model.state_dict()
    table = weights.pop("model.embed_tokens.weight")
    weights = {name: value for name, value in weights.items() if not name.startswith(("bridging", "lm_head"))}
    model.language_model.load_state_dict(weights, strict=False)
    first = first_side_id()
    with torch.no_grad():
        new = model.language_model.model.embed_tokens.weight
        new[: len(table)] = table
        for i, text in enumerate(TEXTS, first - len(TEXTS)):
            new[i] = table[start.tokenizer.encode(text)].mean(0)
        new[first : first + len(SIDES)] = side_embeddings(table)
        new[first + len(SIDES) :] = 0
        embeddings = model.vision_encoder.model.pos_embed.weight
        embeddings += place_ramps(*embeddings.shape)
    return model


def side_embeddings(table: Tensor) -> Tensor:
    """Return embeddings [len(SIDES), H] of about the size of those in `table`, from torch's random generator."""
    angles = torch.arange(SCALE + 1)[:, None] / SCALE * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    values = waves @ torch.randn(waves.shape[1], table.shape[1]) / math.sqrt(waves.shape[1] / 2)
    ends = 0.5 * torch.randn(2, 1, table.shape[1])  # what the comma and the bracket add
    return (values + ends).flatten(0, 1) * table.std()


def place_ramps(positions: int, channels: int) -> Tensor:
    """Return ramps [positions, channels] over a square grid of positions, along two random directions."""
    side = math.isqrt(positions)
    ramp = torch.linspace(-1, 1, side)
    places = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), -1).flatten(0, 1)
    return PLACE_NORM * places @ F.normalize(torch.randn(2, channels))
