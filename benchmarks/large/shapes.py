"""Write random checkpoints with the shapes of published models, tensor by tensor."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridge_stg.checkpoint.checkpoint import build_model, checkpoint_tensors
from bridge_stg.checkpoint.weight_store import TOKENIZER
from bridge_stg.demo.tiny_model import write_demo_tokenizer
from bridge_stg.export.estimate.known import KNOWN, TOKENS
from bridge_stg.model.backbones import backbone
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.runtime.bundle.spec import PromptSpec

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_vl_150m": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True, "image_token_id": 5, "video_token_id": 6,
        "vision_start_token_id": 3, "vision_end_token_id": 4,
        "text_config": {
            "vocab_size": 20_000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 9,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                "mrope_interleaved": True},
        },
        "vision_config": {
            "depth": 8, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 1024, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [2, 5],
        },
    },
    # Qwen2.5-0.5B's text model in Qwen3-VL form, with a vision encoder of ViT-B's width and depth.
    "qwen3_vl_0_5b": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True, **TOKENS,
        "text_config": {
            "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10],
                                "mrope_interleaved": True},
        },
        "vision_config": {
            "depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 896, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [2, 5, 8],
        },
    },
    "qwen3_vl_2b": KNOWN["qwen3-vl-2b"],
    "qwen2_5_vl_3b": KNOWN["qwen2.5-vl-3b"],
}  # fmt: skip
"""config.json of each backbone by name. The first is small enough for quick runs, and large enough to be streamed."""


SCALES = {"spatial_decoder.box_heads.": 0.4, "spatial_decoder.heat_": 6.0}
"""Scale of random weights by key prefix. Without it six successive box heads would shrink most boxes to zero, and the
heat map would be flat, so that every query would start from the same box."""


def config_of(shape: str) -> BridgeSTGConfig:
    """Return the configuration of a shape, with the family's frames and normalization and the demo's prompt."""
    values = SHAPES[shape]
    family = backbone(values)
    return BridgeSTGConfig(
        backbone=values,
        frames=family.frames(),
        prompt=PromptSpec(),
        image_mean=family.image_mean,
        image_std=family.image_std,
    )


def write_checkpoint(shape: str, folder: Path, *, seed: int = 0) -> None:
    """Write a checkpoint folder in bf16, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    with torch.device("meta"):
        shapes = {key: tuple(v.shape) for key, v in checkpoint_tensors(build_model(config, where=folder)).items()}
    header, end = {}, 0
    for key, size in shapes.items():
        begin, end = end, end + 2 * math.prod(size)
        header[key] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, size in shapes.items():
            values = random_weight(key, size, torch.Generator().manual_seed(seed + zlib.crc32(key.encode())))
            file.write(values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    write_demo_tokenizer(folder / TOKENIZER)
    config.save(folder)


def random_weight(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return random values that preserve the magnitude of activations, so that taps and boxes depend on the input.

    Matrices have a standard deviation of 1/√inputs times `SCALES`; norms are near 1 and biases near 0.
    """
    if len(shape) == 1:
        around = 1.0 if "norm" in key.rpartition(".")[0].rpartition(".")[2] and key.endswith("weight") else 0.0
        return around + 0.02 * torch.randn(shape, generator=generator)
    scale = next((scale for start, scale in SCALES.items() if key.startswith(start)), 1.0)
    return scale * torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
