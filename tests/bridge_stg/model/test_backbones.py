"""The interface of a backbone: what is refused, what published configs become, and building without memory."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from bridge_stg.checkpoint.safetensors_file import rename_key
from bridge_stg.model import backbones
from bridge_stg.model.backbones import FAMILIES, backbone
from bridge_stg.model.config import BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.bundle.contracts import graph_contract
from bridge_stg.runtime.chain.positions import vision_tables
from tests.bridge_stg.model.stock_models import TEXT, VISION
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[3]

QWEN2_5_VL_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70,
    "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936,
}  # fmt: skip
QWEN3_VL_2B = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 6144, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
    },
    "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl",
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653, "vision_start_token_id": 151652,
}  # fmt: skip
PUBLISHED = {"qwen3_vl": QWEN3_VL_2B, "qwen2_5_vl": QWEN2_5_VL_3B}


def checkpoint_config(values: dict[str, Any]) -> BridgeSTGConfig:
    family = backbone(values)
    return BridgeSTGConfig(
        backbone=values, prompt=family.prompt(), frames=family.frames(), image_mean=family.image_mean,
        image_std=family.image_std, bridging=BridgingConfig(num_queries=2),
        spatial_decoder=SpatialDecoderConfig(width=32, num_layers=1, num_heads=2, ffn_width=64),
    )  # fmt: skip


def small(family: str, **changes: Any) -> dict[str, Any]:
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**TEXT, "rope_parameters": rotary} | ({"head_dim": 16} if family == "qwen3_vl" else {})
    return {"model_type": family, "vision_config": {**VISION, "window_size": 56} if family == "qwen2_5_vl" else VISION,
            "text_config": text, **changes}  # fmt: skip


def test_another_architecture_is_named_with_what_is_supported_and_the_way_on() -> None:
    named = ("'llava'", "LlavaForConditionalGeneration", *FAMILIES, "docs/adapters.md")
    with raises("checkpoint.unsupported_backbone", *named):
        backbone({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    assert (ROOT / "docs" / "adapters.md").is_file()


REJECTED = {
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "unsupported_dtype", ["awq"]),
    "no vision": ({"vision_config": None}, "bad_config", ["vision_config"]),
    "no text": ({"text_config": None}, "bad_config", ["text_config"]),
    "no number": ({"vision_config": {**VISION, "depth": "many"}}, "bad_config", ["vision_config.depth", '"many"']),
    "no heads": ({"vision_config": {**VISION, "num_heads": 0}}, "bad_config", ["vision_config.num_heads", "is 0"]),
    "too deep": ({"text_config": {**TEXT, "num_hidden_layers": 10**12}}, "bad_config", ["num_hidden_layers", 10**12]),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_configs_are_rejected(family: str, name: str) -> None:
    changes, code, values = REJECTED[name]
    with raises(f"checkpoint.{code}", *values):
        backbone({"model_type": family}).config(small(family, **changes))


def test_what_the_graphs_do_not_support_is_rejected() -> None:
    family = backbone({"model_type": "qwen2_5_vl"})
    values = small("qwen2_5_vl")
    sliding = {**values["text_config"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    with raises("checkpoint.unsupported_backbone", "use_sliding_window"):
        family.config({**values, "text_config": sliding})
    rotary = {**values["text_config"]["rope_parameters"], "rope_type": "dynamic", "factor": 2.0}
    with raises("checkpoint.unsupported_backbone", "rope_type 'dynamic'"):
        family.config({**values, "text_config": {**values["text_config"], "rope_parameters": rotary}})
    short = {**values["text_config"]["rope_parameters"], "mrope_section": [2, 2, 2]}
    with raises("checkpoint.bad_config", "mrope_section", 6):
        BridgeSTG(checkpoint_config({**values, "text_config": {**values["text_config"], "rope_parameters": short}}))


def test_published_configs_are_understood() -> None:
    spec = checkpoint_config(QWEN3_VL_2B).model_spec()
    assert (spec.vision.position_grid, spec.vision.deepstack_levels, spec.vision.window_patches) == (48, 3, 0)
    assert (spec.language.num_layers, spec.language.kv_heads, spec.language.head_dim) == (28, 8, 128)
    assert spec.language.tapped_layers == (8, 17, 27) and spec.vision.tokens_per_second is None
    spec = checkpoint_config(QWEN2_5_VL_3B).model_spec()
    assert (spec.vision.position_grid, spec.vision.deepstack_levels, spec.vision.window_patches) == (0, 0, 8)
    assert (spec.language.num_layers, spec.language.kv_heads, spec.language.head_dim) == (36, 2, 128)
    assert (spec.language.hidden_size, spec.vision.tokens_per_second) == (2048, 2.0)
    assert spec.vision.image_mean[0] == pytest.approx(0.4815, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_read_and_not_changed(family: str) -> None:
    values = copy.deepcopy(PUBLISHED[family])
    config = checkpoint_config(values)
    config.model_spec()
    assert values == PUBLISHED[family]
    assert BridgeSTGConfig.from_dict(config.to_dict()).model_spec() == config.model_spec()


@pytest.mark.parametrize("family, parameters", [("qwen3_vl", 2_127_532_032), ("qwen2_5_vl", 3_754_622_976)])
def test_a_published_shape_builds_without_memory(family: str, parameters: int) -> None:
    with torch.device("meta"):
        model = BridgeSTG(checkpoint_config(PUBLISHED[family]))
    own = model.language_model.bridging.weight.numel() + sum(p.numel() for p in model.spatial_decoder.parameters())
    assert sum(p.numel() for p in model.parameters()) - own == parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # though the config says bfloat16
    assert model.tied


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_buffers_are_what_no_checkpoint_holds(family: str) -> None:
    config = checkpoint_config(small(family))
    real = BridgeSTG(config)
    with FakeTensorMode():
        fake = BridgeSTG(config)
    missing = {name for name, _ in real.named_buffers()} - set(real.state_dict())
    computed = fake.fixed_buffers()
    assert set(computed) == missing
    for name, buffer in real.named_buffers():
        if name in missing:
            assert torch.equal(computed[name], buffer), name


def test_published_keys_become_ours() -> None:
    prefixes = backbone(QWEN2_5_VL_3B).key_prefixes
    renamed = {
        "visual.blocks.0.attn.qkv.weight": "model.visual.blocks.0.attn.qkv.weight",
        "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "model.visual.merger.ln_q.weight": "model.visual.merger.ln_q.weight",
        "model.language_model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "spatial_decoder.vote.0.bias": "spatial_decoder.vote.0.bias",
        "bridging.queries.weight": "bridging.queries.weight",
    }
    assert {key: rename_key(key, prefixes) for key in renamed} == renamed


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_lists_the_tables_that_the_host_computes(family: str) -> None:
    spec = checkpoint_config(PUBLISHED[family]).model_spec()
    contract = graph_contract("vision_encoder", spec, variant="test", opset=24)
    tables = vision_tables(spec.vision, 10, 14)
    assert [tensor.name for tensor in contract.inputs] == ["frames", *tables]
    for tensor in contract.inputs[1:]:
        table = tables[tensor.name]
        assert tensor.dtype == str(table.dtype)
        sizes = {"N": 140, "W": len(tables.get("window_index", ()))}
        assert table.shape == tuple(sizes.get(dim, dim) for dim in tensor.dims)
    assert set(contract.ranges) == {dim for tensor in contract.inputs for dim in tensor.dims if isinstance(dim, str)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_checkpoints_frames_fit_the_family(family: str) -> None:
    spec = checkpoint_config(PUBLISHED[family]).model_spec()
    token = (spec.vision.patch_size * spec.vision.merge_size) ** 2
    frames = spec.frames
    for pixels in (frames.coarse_min_pixels, frames.coarse_max_pixels, frames.fine_min_pixels, frames.fine_max_pixels):
        assert pixels % token == 0
    most = frames.max_coarse_groups * (frames.coarse_max_pixels // token + 20)
    assert most < spec.language.max_positions


def test_the_worked_example_of_the_document_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/adapters.md adds Qwen2-VL: its code runs here, against transformers' own vision model and decoder."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = ModuleType("bridge_stg.model.backbones.qwen2_vl")
    exec(compile(code, "docs/adapters.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backbones, "FAMILIES", (*FAMILIES, "qwen2_vl"))

    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    theirs = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
            text_config={**TEXT, "rope_parameters": rotary},
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = BridgeSTG(checkpoint_config(theirs.config.to_dict())).eval()
    ours.vision_encoder.model.load_state_dict(theirs.model.visual.state_dict())
    ours.language_model.model.load_state_dict(theirs.model.language_model.state_dict())

    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 56, 84, 3), np.uint8)
    outputs = TorchSession("vision_encoder", ours).infer({"frames": frames, **vision_tables(ours.spec.vision, 4, 6)})
    x = (torch.from_numpy(frames).float() / 255 - torch.tensor(ours.spec.vision.image_mean)) / torch.tensor(
        ours.spec.vision.image_std
    )
    x = x.reshape(1, 2, 2, 2, 14, 3, 2, 14, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(24, -1)
    positions = torch.arange(5).expand(3, 1, 5) * torch.tensor([1, 2, 3])[:, None, None]
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        tokens = theirs.model.visual(x, grid_thw=torch.tensor([[1, 4, 6]])).pooler_output
        hidden = theirs.model.language_model(input_ids=ids, position_ids=positions).last_hidden_state
        language = ours.language_model
        states = language.hidden_states(language.embed(ids), positions, None, None, None)
    np.testing.assert_allclose(outputs["visual_tokens"][0], tokens.numpy(), atol=1e-4 * float(tokens.abs().max()))
    np.testing.assert_allclose(language.model.norm(states[-1]).detach(), hidden, atol=1e-4 * float(hidden.abs().max()))
