"""New checkpoints from plain models: the backbone unchanged, new parts from a seed, nothing left after errors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from bridge_stg.checkpoint.safetensors_file import read_header
from bridge_stg.model.backbones import FAMILIES
from bridge_stg.model.config import BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.torch_session import torch_grounder
from tests.bridge_stg.model.published import publish
from tests.errors import raises

DECODER = SpatialDecoderConfig(width=32, num_layers=2, num_heads=2, ffn_width=64)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    publish(folder, "qwen3_vl", dtype=torch.bfloat16, max_shard_size="30KB")
    return folder


@pytest.fixture
def folder(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_backbone_is_unchanged_and_answers(tmp_path, family, tied):
    plain = publish(tmp_path / "model", family, tied=tied)
    out = init_checkpoint(tmp_path / "model", tmp_path / "made" / "checkpoint", spatial_decoder=DECODER)
    model = load_checkpoint(out)
    assert model.tied == tied and model.spec.vision.family == family
    expected = plain.state_dict()
    for key, value in model.vision_encoder.model.state_dict().items():
        assert torch.equal(value, expected[f"model.visual.{key}"]), key
    for key, value in model.language_model.model.state_dict().items():
        assert torch.equal(value, expected[f"model.language_model.{key}"]), key
    assert torch.equal(model.language_model.lm_head.weight, expected["lm_head.weight"])
    frames = np.random.default_rng(0).integers(0, 255, (8, 64, 96, 3), np.uint8)
    result = torch_grounder(model.eval()).ground(
        ((i / 4, frame) for i, frame in enumerate(frames)), "the red car", allow_none=False
    )
    assert result.found and result.size == (96, 64)


def test_weights_are_linked_with_their_index(folder, tmp_path):
    out = init_checkpoint(folder, tmp_path / "checkpoint")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and (out / "model.safetensors.index.json").is_file()
    for name in shards:
        assert (out / name).samefile(folder / name)
    assert {path.name for path in out.iterdir()} == {
        *shards, "model.safetensors.index.json", "config.json", "tokenizer.json", "bridging.safetensors",
        "spatial_decoder.safetensors",
    }  # fmt: skip
    values = json.loads((out / "config.json").read_text())
    assert values["model_type"] == "bridge_stg" and values["backbone"]["model_type"] == "qwen3_vl"


def test_weights_are_copied_where_the_disk_cannot_link(folder, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", fail)
    out = init_checkpoint(folder, tmp_path / "checkpoint")
    name = next(folder.glob("model-*.safetensors")).name
    assert not (out / name).samefile(folder / name) and (out / name).read_bytes() == (folder / name).read_bytes()


def test_another_dtype_is_written_anew(folder, tmp_path):
    linked = load_checkpoint(init_checkpoint(folder, tmp_path / "linked"))
    out = init_checkpoint(folder, tmp_path / "checkpoint", dtype=torch.float32)
    assert {tensor.dtype for tensor in read_header(out / "model.safetensors").values()} == {torch.float32}
    assert load_file(out / "model.safetensors")["model.visual.patch_embed.proj.bias"].dtype == torch.float32
    for first, second in zip(linked.state_dict().values(), load_checkpoint(out).state_dict().values()):
        assert torch.equal(first, second)


def made_parts(folder: Path, out: Path, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    init_checkpoint(folder, out, seed=seed, spatial_decoder=DECODER)
    return {name: load_file(out / f"{name}.safetensors") for name in ("bridging", "spatial_decoder")}


def test_the_new_parts_follow_from_the_seed(folder, tmp_path):
    state = torch.random.get_rng_state()
    first, again, other = (made_parts(folder, tmp_path / out, seed) for out, seed in (("a", 1), ("b", 1), ("c", 2)))
    for name, tensors in first.items():
        assert all(torch.equal(value, again[name][key]) for key, value in tensors.items())
        assert any(not torch.equal(value, other[name][key]) for key, value in tensors.items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_sizes_can_be_chosen(folder, tmp_path):
    bridging = BridgingConfig(num_queries=5, tapped_layers=(0, 2))
    out = init_checkpoint(folder, tmp_path / "checkpoint", bridging=bridging, spatial_decoder=DECODER)
    config = BridgeSTGConfig.load(out)
    assert config.bridging == bridging and config.spatial_decoder == DECODER
    assert load_checkpoint(out).language_model.bridging.weight.shape == (5, 32)


@pytest.mark.parametrize(("depth", "taps"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (28, (8, 17, 27))])
def test_default_taps_fit_any_depth(tmp_path, depth, taps):
    publish(tmp_path / "model", "qwen3_vl", depth=depth)
    said: list[str] = []
    model = load_checkpoint(init_checkpoint(tmp_path / "model", tmp_path / "checkpoint", progress=said.append))
    assert model.spec.language.tapped_layers == taps and len(model.spatial_decoder.aggregator.projections) == len(taps)
    assert f"tapped after layers {', '.join(map(str, taps))} of {depth}" in said[0]


@pytest.mark.parametrize(
    ("hidden_size", "width", "heads"), [(4, 8, 1), (36, 32, 1), (64, 64, 2), (200, 200, 4), (896, 256, 8)]
)
def test_the_default_decoder_is_no_wider_than_the_llm(hidden_size, width, heads):
    decoder = SpatialDecoderConfig.fitting(hidden_size)
    assert (decoder.width, decoder.num_heads, decoder.ffn_width) == (width, heads, 8 * width)


def test_the_image_processors_statistics_are_taken(folder, tmp_path):
    assert BridgeSTGConfig.load(init_checkpoint(folder, tmp_path / "a")).image_mean == (0.5, 0.5, 0.5)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}))
    config = BridgeSTGConfig.load(init_checkpoint(folder, tmp_path / "b"))
    assert config.image_mean == (0.1, 0.2, 0.3) and config.image_std == (1.0, 1.0, 1.0)
    path.write_text(json.dumps({"image_mean": 0.5}))
    with raises("checkpoint.bad_config", "preprocessor_config.json", "image_mean", 0.5):
        init_checkpoint(folder, tmp_path / "c")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add_a_layer(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text.pop("layer_types", None)
    change_config(folder, text_config={**text, "num_hidden_layers": 4})


def reduce_vocabulary(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config={**text, "vocab_size": 300})


def add_tokenizer_config(folder: Path) -> None:
    tokens = {"373": {"content": "<|new|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))


def rename_token(folder: Path, old: str, new: str) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(old, new))


BREAKAGES = {
    "no folder": (shutil.rmtree, "not_found", []),
    "no config": (lambda f: (f / "config.json").unlink(), "missing_file", ["config.json"]),
    "config is not json": (lambda f: (f / "config.json").write_text("{"), "bad_config", ["config.json"]),
    "another architecture": (
        lambda f: change_config(f, model_type="llava", architectures=["LlavaModel"]), "unsupported_backbone",
        ["'llava'", "qwen3_vl"],
    ),
    "a checkpoint of ours": (lambda f: change_config(f, model_type="bridge_stg"), "not_a_backbone", []),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "missing_file", ["tokenizer.json"]),
    "a text model's tokenizer": (
        lambda f: rename_token(f, "<|video_pad|>", "<|other|>"), "bad_tokenizer", ["tokenizer.json", "qwen3_vl"]
    ),
    "a smaller vocabulary": (reduce_vocabulary, "bad_tokenizer", ["tokenizer.json", "the id 373", "300"]),
    "another id in the tokenizer's config": (
        add_tokenizer_config, "bad_tokenizer", ["tokenizer_config.json", "<|new|>", "373"]
    ),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "missing_file", ["model.safetensors"]),
    "a larger model's config": (add_a_layer, "missing_tensor", ["model.language_model.layers.3.", "and 8 more"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_cannot_be_a_backbone_is_named(folder, tmp_path, name):
    damage, code, values = BREAKAGES[name]
    damage(folder)
    with raises(f"checkpoint.{code}", *values):
        init_checkpoint(folder, tmp_path / "checkpoint")
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


def test_an_existing_folder_is_not_replaced(folder, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with raises("output.exists", tmp_path / "checkpoint"):
        init_checkpoint(folder, tmp_path / "checkpoint")


def test_values_that_do_not_fit_the_dtype_are_named_and_nothing_is_left(tmp_path):
    model = publish(tmp_path / "model", "qwen3_vl")
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = 1e6
    model.save_pretrained(tmp_path / "model")
    with raises("checkpoint.not_finite", "language_model.norm.weight", "torch.float16"):
        init_checkpoint(tmp_path / "model", tmp_path / "checkpoint", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_detected_before_writing(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with raises("output.disk_full", tmp_path / "checkpoint", "0 MB"):
        init_checkpoint(folder, tmp_path / "checkpoint", dtype=torch.float32)
