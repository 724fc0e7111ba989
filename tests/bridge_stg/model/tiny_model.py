"""A tiny random model with the demo's tokenizer, whose outputs depend on its inputs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from bridge_stg.demo.tiny_model import demo_config
from bridge_stg.model.config import BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.spec import FramesSpec
from bridge_stg.runtime.chain.prompt import Tokenizer


def tiny_config() -> BridgeSTGConfig:
    """Return the demo's configuration, shrunk."""
    config = demo_config()
    backbone = copy.deepcopy(dict(config.backbone))
    backbone["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                                  "out_hidden_size": 64, "num_position_embeddings": 16,
                                  "deepstack_visual_indexes": [0]}  # fmt: skip
    backbone["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    backbone["text_config"]["rope_parameters"] = {
        **backbone["text_config"]["rope_parameters"],
        "mrope_section": [4, 2, 2],
    }
    return dataclasses.replace(
        config,
        backbone=backbone,
        bridging=BridgingConfig(num_queries=3, tapped_layers=(0, 2)),
        spatial_decoder=SpatialDecoderConfig(width=32, num_layers=2, num_heads=2, ffn_width=64),
        frames=FramesSpec(coarse_fps=2, coarse_max_pixels=64 * 64, fine_fps=4, fine_max_pixels=96 * 96,
                          fine_min_pixels=64 * 64, max_fine_frames=16),
    )  # fmt: skip


def make_tiny_model(tokenizer_path: Path) -> BridgeSTG:
    torch.manual_seed(0)
    model = BridgeSTG(tiny_config(), Tokenizer.from_file(tokenizer_path)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.6 / parameter[0].numel() ** 0.5)
        torch.nn.init.normal_(model.language_model.model.embed_tokens.weight)
        torch.nn.init.normal_(model.language_model.bridging.weight)
        for head in model.spatial_decoder.box_heads:
            torch.nn.init.normal_(head[-1].weight, std=1.5)
    return model
