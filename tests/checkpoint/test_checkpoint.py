"""Checkpoint folders: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge_stg.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.runtime.errors import CheckpointError


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
        with pytest.raises(CheckpointError, match=r"spatial_decoder\.vote\.0\.bias"):
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
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is not json": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
    "another model": (lambda f: change_config(f, model_type="llama"), "model_type is 'llama'"),
    "another backbone": (lambda f: change_config(f, backbone={"model_type": "llava"}), "backbone"),
    "unknown field": (lambda f: change_config(f, colour=1), "unknown field colour"),
    "tap beyond the layers": (lambda f: change_config(f, bridging={"num_queries": 3, "tapped_layers": [9]}), r"\[9\]"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 99), "not a whole safetensors file"),
    "missing key": (lambda f: change_weights(f, lambda t: t.pop("bridging.queries.weight")), "misses bridging.queries"),
    "extra key": (lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(1))), "unexpectedly, extra"),
    "wrong shape": (
        lambda f: change_weights(f, lambda t: t.update({"bridging.queries.weight": torch.ones(2, 2)})),
        r"bridging\.queries\.weight has shape \[2, 2\]",
    ),
    "not finite": (
        lambda f: change_weights(f, lambda t: t["bridging.queries.weight"].fill_(float("nan"))), "not finite"
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_damage_is_named(folder, name):
    damage, message = BREAKAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_pickle_is_refused_by_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin, but pickle files are never read"):
        load_checkpoint(folder)


@pytest.mark.parametrize("path, message", [("nowhere", "no such folder"), ("file", "is a file")])
def test_not_a_folder(tmp_path, path, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / path)


@pytest.mark.parametrize(
    "section, name, value, message",
    [
        ("spatial_decoder", "num_heads", 0, "num_heads is 0"),
        ("spatial_decoder", "num_heads", -1, "num_heads is -1"),
        ("spatial_decoder", "num_heads", 7, "does not divide by num_heads 7"),
        ("spatial_decoder", "num_layers", 10**12, "num_layers is 1000000000000"),
        ("spatial_decoder", "width", float("nan"), "width is NaN"),
        ("bridging", "num_queries", True, "num_queries is true"),
    ],
)
def test_sizes_that_no_model_has_are_refused(tiny_model, section, name, value, message):
    values = json.loads(json.dumps(tiny_model.config.to_dict()))
    values[section][name] = value
    with pytest.raises(CheckpointError, match=message):
        BridgeSTGConfig.from_dict(values)


def test_config_survives_json(tiny_model):
    text = json.dumps(tiny_model.config.to_dict())
    assert BridgeSTGConfig.from_dict(json.loads(text)) == tiny_model.config
