"""A tiny random model; tests/conftest.py saves and exports it once a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.demo.tiny_model import demo_config
from bridge_stg.model.config import BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle

Sessions = dict[str, dict[str, OnnxRuntimeSession]]


def tiny_config() -> BridgeSTGConfig:
    """The demo's configuration with smaller parts; one deepstack level, grouped heads, a tied head."""
    demo = demo_config()
    vision = {
        **demo.backbone["vision_config"], "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {
        **demo.backbone["text_config"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rope_parameters": {**demo.backbone["text_config"]["rope_parameters"], "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    return dataclasses.replace(
        demo,
        backbone={**demo.backbone, "vision_config": vision, "text_config": text},
        bridging=BridgingConfig(num_queries=3, tapped_layers=(1, 2)),
        spatial_decoder=SpatialDecoderConfig(width=32, num_layers=2, num_heads=4, ffn_width=64),
    )


def tiny_windowed_config() -> BridgeSTGConfig:
    """The same of the other family: windows of 4 × 4 patches in all blocks but one, sectioned MRoPE, an untied head."""
    tiny = tiny_config()
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14, "window_size": 56,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }  # fmt: skip
    text = {
        **tiny.backbone["text_config"], "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    backbone = {
        **tiny.backbone, "model_type": "qwen2_5_vl", "vision_config": vision, "text_config": text,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return dataclasses.replace(tiny, backbone=backbone, bridging=BridgingConfig(num_queries=3, tapped_layers=(0, 1)))


def random_model(config: BridgeSTGConfig | None = None) -> BridgeSTG:
    """Random weights, scaled so that outputs depend on inputs: a box head that begins at zero answers nothing."""
    torch.manual_seed(0)
    model = BridgeSTG(config or tiny_config())
    with torch.no_grad():
        for head in model.spatial_decoder.box_heads:
            torch.nn.init.normal_(head[-1].weight, std=1.0)
            torch.nn.init.normal_(head[-1].bias, std=0.3)
        for head in model.spatial_decoder.presence_heads:
            head[-1].weight.mul_(8)
        for linear in (m for m in model.language_model.modules() if isinstance(m, torch.nn.Linear)):
            if linear is not model.language_model.lm_head:
                linear.weight.mul_(4)
    return model.eval()


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> BridgeSTG:
    """The torch reference. Tests that change it work on a copy."""
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def sessions(exported: Bundle) -> Iterator[Sessions]:
    """Every variant of every graph in onnxruntime, by graph and variant."""
    opened = {
        name: {v: OnnxRuntimeSession(exported.graph_path(name, v), g, threads=1) for v, g in variants.items()}
        for name, variants in exported.manifest.graphs.items()
    }
    yield opened
    for variants in opened.values():
        for session in variants.values():
            session.close()
