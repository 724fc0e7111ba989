"""The demo model: a tiny stock Qwen3-VL, its tokenizer and its sizes. Trained by `bridge_stg.demo.training`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from bridge_stg.demo.questions import QUERY_WORDS
from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
from bridge_stg.demo.synthetic import DIRECTION_NAMES
from bridge_stg.model.config import BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.runtime.bundle.spec import FramesSpec, KnowsSpec, PromptSpec

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|image_pad|>", "<|video_pad|>")  # fmt: skip
WORDS = (
    *NAMES, *COLOUR_NAMES, *DIRECTION_NAMES,
    "the", "a", "an", "find", "track", "where", "is", "show", "me", "object", "thing", "moving", "moves",
    "that", "which", "goes", "going", "first", "at", "in", "of", "to", "none", "seconds", "user",
    "assistant", "system", "and", "then", "image", "video", "when", "does", "appear", "locate", "it",
    "describe",
)  # fmt: skip


def demo_tokenizer_json() -> dict[str, Any]:
    """Return a `tokenizer.json` in lower case: whole words, single digits, and bytes for everything else."""
    byte_characters = _byte_characters()
    vocabulary: dict[str, int] = {}
    for piece in itertools.chain(byte_characters, WORDS, (byte_characters[ord(" ")] + word for word in WORDS)):
        vocabulary.setdefault(piece, len(vocabulary))
    added = [
        {"id": len(vocabulary) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": None, "decoder": bytes_,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocabulary, "merges": []},
    }  # fmt: skip


def demo_config() -> BridgeSTGConfig:
    """Return the demo's configuration: 5 M parameters, coarse frames of 192², fine frames of 288² pixels."""
    tokenizer = demo_tokenizer_json()
    first_special = tokenizer["added_tokens"][0]["id"]
    ids = {token: first_special + i for i, token in enumerate(SPECIAL_TOKENS)}
    backbone = {
        "model_type": "qwen3_vl",
        "vision_config": {
            "depth": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 192, "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, 2],
        },
        "text_config": {
            "vocab_size": 64 * -(-(first_special + len(SPECIAL_TOKENS)) // 64), "hidden_size": 192,
            "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 32, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                                "mrope_interleaved": True},
        },
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }  # fmt: skip
    return BridgeSTGConfig(
        backbone=backbone,
        bridging=BridgingConfig(num_queries=4, tapped_layers=(2, 3, 4)),
        spatial_decoder=SpatialDecoderConfig(width=128, num_layers=3, num_heads=4, ffn_width=512),
        frames=FramesSpec(
            coarse_fps=2.0, coarse_max_pixels=192 * 192, coarse_min_pixels=64 * 64, max_coarse_groups=64,
            fine_fps=8.0, fine_max_pixels=288 * 288, fine_min_pixels=96 * 96, max_fine_frames=64, window_s=12.0,
        ),
        prompt=PromptSpec(),
        knows=KnowsSpec(
            f"This model knows {len(NAMES)} drawn things ({', '.join(NAMES)}) in {len(COLOUR_NAMES)} colours "
            f"({', '.join(COLOUR_NAMES)}), in synthetic clips.", QUERY_WORDS,
        ),
    )  # fmt: skip


def write_demo_tokenizer(path: Path) -> None:
    """Write the demo's `tokenizer.json`."""
    path.write_text(json.dumps(demo_tokenizer_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _byte_characters() -> list[str]:
    """Return the printable character of each byte, as in byte-level BPE of `tokenizers`."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(shifted)) for byte in range(256)]
