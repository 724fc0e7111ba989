"""Checkpoint folders: round trips, and errors that name the damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge_stg.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from bridge_stg.model.config import BridgeSTGConfig
from tests.errors import raises


@pytest.fixture(scope="module")
def saved(tiny_model, tokenizer_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(tiny_model, folder, tokenizer_path, dtype=torch.float32)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def test_round_trip(tiny_model, folder):
    loaded = load_checkpoint(folder)
    assert loaded.config == tiny_model.config
    for (name, first), second in zip(tiny_model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(first, second), name
    assert loaded.tied and "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_keys_are_the_backbones_own(folder):
    keys = set(load_file(folder / "model.safetensors"))
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in keys
    assert "model.visual.blocks.0.attn.qkv.weight" in keys and "bridging.queries.weight" in keys


def test_half_precision_overflow_is_named(tiny_model, tokenizer_path, tmp_path):
    weight = tiny_model.spatial_decoder.vote[0].bias
    before = weight.data.clone()
    try:
        weight.data[0] = 1e6
        with raises("checkpoint.not_finite", "spatial_decoder.vote.0.bias", "torch.float16"):
            save_checkpoint(tiny_model, tmp_path / "c", tokenizer_path)
        assert not (tmp_path / "c").exists()
    finally:
        weight.data.copy_(before)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


BREAKAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "missing_file", ["config.json"]),
    "config is not json": (lambda f: (f / "config.json").write_text("{"), "bad_config", ["config.json"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "bad_config", ["config.json", "list"]),
    "another model": (lambda f: change_config(f, model_type="llama"), "wrong_model_type", ["'llama'"]),
    "another backbone": (
        lambda f: change_config(f, backbone={"model_type": "llava"}), "unsupported_backbone", ["config.json", "'llava'"]
    ),
    "unknown field": (lambda f: change_config(f, colour=1), "bad_config", ["config.json", "colour"]),
    "tap beyond the layers": (
        lambda f: change_config(f, bridging={"num_queries": 3, "tapped_layers": [9]}), "bad_config", ["[9]"]
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "missing_file", ["model.safetensors"]),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 99), "damaged", ["model.safetensors", "99"]
    ),
    "missing key": (
        lambda f: change_weights(f, lambda t: t.pop("bridging.queries.weight")), "missing_tensor",
        ["bridging.queries.weight"],
    ),
    "extra key": (
        lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(1))), "unexpected_tensor", ["extra"]
    ),
    "wrong shape": (
        lambda f: change_weights(f, lambda t: t.update({"bridging.queries.weight": torch.ones(2, 2)})),
        "wrong_shape", ["bridging.queries.weight", "[2, 2]"],
    ),
    "not finite": (
        lambda f: change_weights(f, lambda t: t["bridging.queries.weight"].fill_(float("nan"))),
        "not_finite", ["model.safetensors", "bridging.queries.weight"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "missing_file", ["tokenizer.json"]),
    "another token's id": (
        lambda f: (f / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"0": {"content": "red"}}}'),
        "bad_tokenizer", ["tokenizer_config.json", "'red'"],
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "bad_tokenizer", ["tokenizer.json"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_damage_is_named(folder, name):
    damage, code, values = BREAKAGES[name]
    damage(folder)
    with raises(f"checkpoint.{code}", *values):
        load_checkpoint(folder)


def test_pickle_is_rejected_by_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with raises("checkpoint.missing_file", "pytorch_model.bin", "pickle"):
        load_checkpoint(folder)


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_not_a_folder(tmp_path, path):
    (tmp_path / "file").write_text("")
    with raises("checkpoint.not_found", tmp_path / path):
        load_checkpoint(tmp_path / path)


@pytest.mark.parametrize(
    "section, name, value, printed",
    [
        ("spatial_decoder", "num_heads", 0, 0),
        ("spatial_decoder", "num_heads", -1, -1),
        ("spatial_decoder", "num_heads", 7, 7),
        ("spatial_decoder", "num_layers", 10**12, 10**12),
        ("spatial_decoder", "width", float("nan"), "NaN"),
        ("bridging", "num_queries", True, "true"),
    ],
)
def test_sizes_that_no_model_has_are_rejected(tiny_model, section, name, value, printed):
    values = json.loads(json.dumps(tiny_model.config.to_dict()))
    values[section][name] = value
    with raises("checkpoint.bad_config", name, printed):
        BridgeSTGConfig.from_dict(values)


NUMBERS = {
    "": ("image_mean", "image_std"),
    "bridging": ("num_queries", "tapped_layers"),
    "spatial_decoder": ("width", "num_layers", "num_heads", "ffn_width"),
    "frames": ("coarse_fps", "coarse_max_pixels", "max_coarse_groups", "fine_fps", "encoder_chunk_groups"),
    "prompt": ("time_decimals", "max_query_characters", "query"),
    "span": ("margin_s", "presence_threshold"),
    "losses": ("language", "l1", "giou", "presence", "heat", "contrastive", "contrastive_temperature", "auxiliary"),
    "backbone.vision_config": (
        "depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size",
        "temporal_patch_size", "out_hidden_size", "num_position_embeddings", "deepstack_visual_indexes", "in_channels",
    ),
    "backbone.text_config": (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    ),
    "backbone.text_config.rope_parameters": ("rope_theta", "mrope_section"),
}  # fmt: skip
WRONG = (-1, float("nan"), float("inf"), 1e30, 10**400, "2", True, [[]], "x" * 100_000)
"""Values that none of these fields may have; 0 and null are valid for some."""


def changed(values: dict, section: str, **changes: object) -> dict:
    values = json.loads(json.dumps(values))
    part = values
    for name in filter(None, section.split(".")):
        part = part[name]
    part.update(changes)
    return values


@pytest.mark.parametrize("section", NUMBERS)
def test_every_number_of_the_config_has_a_range(tiny_model, section):
    values = tiny_model.config.to_dict()
    for name in NUMBERS[section]:
        for value in WRONG:
            with raises("checkpoint.bad_config", name) as caught:
                BridgeSTGConfig.from_dict(changed(values, section, **{name: value}))
            assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "section, changes, named",
    [
        ("backbone.text_config", {"head_dim": 12}, ["head_dim", 12, "multiple of 8"]),
        ("backbone.text_config", {"num_key_value_heads": 3}, ["num_attention_heads", 4, "num_key_value_heads 3"]),
        ("backbone.vision_config", {"num_heads": 3}, ["hidden_size", 32, "num_heads 3"]),
        ("backbone.vision_config", {"num_heads": 16}, ["vision.head_dim", 2]),
        ("backbone.vision_config", {"out_hidden_size": 32}, ["out_hidden_size", 32, 64]),
        ("backbone.vision_config", {"num_position_embeddings": 15}, ["num_position_embeddings", 15]),
        ("backbone.vision_config", {"deepstack_visual_indexes": [0, 0]}, ["deepstack_visual_indexes", "[0, 0]"]),
        ("backbone.vision_config", {"deepstack_visual_indexes": [2]}, ["deepstack_visual_indexes", "0 to 1"]),
        ("backbone", {"vision_config": 7}, ["vision_config", 7]),
        ("spatial_decoder", {"num_heads": 7}, ["width", 32, "num_heads 7"]),
        ("prompt", {"time": "now"}, ["prompt.time", "{time}"]),
    ],
)
def test_sizes_that_contradict_each_other_are_rejected(tiny_model, section, changes, named):
    with raises("checkpoint.bad_config", *named):
        BridgeSTGConfig.from_dict(changed(tiny_model.config.to_dict(), section, **changes))


def test_a_model_larger_than_its_weights_is_never_built(folder):
    """The sizes are compared with the headers of the files first: this one would take 4 TB."""
    values = json.loads((folder / "config.json").read_text())
    values["backbone"]["text_config"] |= {"vocab_size": 2**24, "intermediate_size": 2**22}
    (folder / "config.json").write_text(json.dumps(values))
    with raises("checkpoint.wrong_shape", "embed_tokens", 2**24):
        load_checkpoint(folder)


def test_config_survives_json(tiny_model):
    text = json.dumps(tiny_model.config.to_dict())
    assert BridgeSTGConfig.from_dict(json.loads(text)) == tiny_model.config
