"""Small random models of both families, in the folders that transformers' own `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from bridge_stg.demo.tiny_model import demo_config, write_demo_tokenizer

TOKENS = {
    key: demo_config().backbone[key]
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
}
VOCABULARY = demo_config().backbone["text_config"]["vocab_size"]


def small_config(family: str, *, tied: bool = True, depth: int = 3) -> Any:
    """Return transformers' config of a model of some 60,000 parameters."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    if family == "qwen3_vl":
        text |= {"head_dim": 8}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 16}
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **TOKENS)
    vision |= {"fullatt_block_indexes": [1], "patch_size": 14, "window_size": 56}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **TOKENS)


def publish(
    folder: Path, family: str, *, tied: bool = True, depth: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Write a folder as it is downloaded, and return the model in it. `options` are those of `save_pretrained`."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(small_config(family, tied=tied, depth=depth)).to(dtype).eval()
    model.save_pretrained(folder, **options)
    write_demo_tokenizer(folder / "tokenizer.json")
    return model
