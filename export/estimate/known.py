"""Configs of published models, so that an estimate needs no download: what `config.json` says of their sizes.

Sources: https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct/blob/main/config.json, and those of Qwen3-VL-4B-Instruct,
Qwen3-VL-8B-Instruct, Qwen2.5-VL-3B-Instruct and Qwen2.5-VL-7B-Instruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOKENS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653
}  # fmt: skip


def _qwen3(
    hidden: int, inner: int, layers: int, heads: int, *, tied: bool, vision: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl", "tie_word_embeddings": tied, **TOKENS,
        "text_config": {
            "vocab_size": 151_936, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                "mrope_interleaved": True},
        },
        "vision_config": {
            "num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": hidden, "num_position_embeddings": 2304, **vision,
        },
    }  # fmt: skip


def _qwen2_5(
    hidden: int, inner: int, layers: int, heads: int, *, kv_heads: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": tied, **TOKENS,
        "text_config": {
            "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        },
    }  # fmt: skip


SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "qwen3-vl-2b": _qwen3(2048, 6144, 28, 16, tied=True, vision=SMALL),
    "qwen3-vl-4b": _qwen3(2560, 9728, 36, 32, tied=True, vision=SMALL),
    "qwen3-vl-8b": _qwen3(4096, 12_288, 36, 32, tied=False, vision=LARGE),
    "qwen2.5-vl-3b": _qwen2_5(2048, 11_008, 36, 16, kv_heads=2, vocab=151_936, tied=True),
    "qwen2.5-vl-7b": _qwen2_5(3584, 18_944, 28, 28, kv_heads=4, vocab=152_064, tied=False),
}
"""Name → values of config.json."""
