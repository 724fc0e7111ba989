"""What is read from an adapter that peft saved computes what peft computes with it, or the adapter is rejected."""

from __future__ import annotations

import copy
import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from bridge_stg.checkpoint.lora import EMBEDDING, HEAD, SETTINGS
from bridge_stg.cli import run
from bridge_stg.model.config import SpatialDecoderConfig
from tests.bridge_stg.checkpoint.test_weight_store import open_store
from tests.bridge_stg.model.published import publish
from tests.errors import raises

IDS = torch.tensor([[5, 9, 17, 33, 64]])
QUERY = {"target_modules": ["q_proj"]}
TABLE_COPY = {**QUERY, "modules_to_save": ["embed_tokens"]}
EXACT = {"rtol": 0, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of tied layers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that publishes a model once, and returns its folder and a copy of it."""

    @lru_cache
    def made(family: str, tied: bool) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("models") / "model"
        return folder, publish(folder, family, tied=tied)

    return lambda family, tied: (made(family, tied)[0], copy.deepcopy(made(family, tied)[1]))


def train(model: Any, folder: Path, *, name: str = "default", **config: Any) -> None:
    """Save an adapter with random values."""
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **config), adapter_name=name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(folder)


@torch.no_grad()
def peft_runs(folder: Path, adapter: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of the model with the adapter, and the merged weights."""
    wrapped = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), adapter).eval()
    return wrapped(input_ids=IDS).logits, wrapped.merge_and_unload().state_dict()


@torch.no_grad()
def logits_of(folder: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.load_state_dict(weights)
    return model.eval()(input_ids=IDS).logits


LINEAR = {
    "every linear layer": {"target_modules": "all-linear"},
    "a convolution and all biases": {"target_modules": ["patch_embed.proj", "q_proj"], "bias": "all"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 11, "v_proj": 3},
    },
    "an anchored pattern": {**QUERY, "alpha_pattern": {r"^model.language_model.layers.0.self_attn.q_proj": 20}},
    "one layer": {
        **QUERY, "layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": r".*layers\.0.*"
    },
    "transposed weights, which these layers have not": {**QUERY, "fan_in_fan_out": True},
    "orthogonal": {**QUERY, "init_lora_weights": "orthogonal"},
    "a module": {**QUERY, "modules_to_save": ["layers.1.mlp"]},
    "a module that contains the deltas": {**QUERY, "modules_to_save": ["layers.1"]},
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_layers_are_those_of_peft(models, tmp_path, name):
    folder, model = models("qwen3_vl", True)
    train(model, tmp_path / "adapter", **LINEAR[name])
    logits, merged = peft_runs(folder, tmp_path / "adapter")
    store = open_store(folder, adapter=tmp_path / "adapter", tied=True)
    weights = {key: store.read(key) for key in store}
    assert store.tied and set(weights) == set(merged) - {HEAD}
    for key, value in weights.items():
        torch.testing.assert_close(value, merged[key], **EXACT)
    torch.testing.assert_close(logits_of(folder, {**weights, HEAD: weights[EMBEDDING]}), logits, **EXACT)


HEADS = {
    "a copy of the table": (TABLE_COPY, False),
    "a copy of the head": ({**QUERY, "modules_to_save": ["lm_head"]}, False),
    "copies of both": ({**QUERY, "modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "a copy of the language model": (
        {"target_modules": ["visual.merger.linear_fc1"], "modules_to_save": ["language_model"]}, False
    ),
    "a delta of the table": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "a delta of the head": ({"target_modules": ["lm_head"]}, False),
    "deltas of both": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "a copy and a delta": ({"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, False),
    "a delta and a copy": ({"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, False),
    "one copy": ({**TABLE_COPY, "ensure_weight_tying": True}, True),
    "one delta": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "one delta, two scales": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "alpha_pattern": {"embed_tokens": 3}}, False
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, tied", [*((name, True) for name in HEADS), ("copies of both", False), ("deltas of both", False)]
)
def test_the_head_and_the_table_are_those_of_peft(models, tmp_path, name, tied):
    config, stays_tied = HEADS[name]
    folder, model = models("qwen3_vl", tied)
    train(model, tmp_path / "adapter", **config)
    logits, _ = peft_runs(folder, tmp_path / "adapter")
    store = open_store(folder, adapter=tmp_path / "adapter", tied=tied)
    assert store.tied == (tied and stays_tied) == (HEAD not in store)
    weights = {key: store.read(key) for key in store}
    torch.testing.assert_close(logits_of(folder, {HEAD: weights[EMBEDDING], **weights}), logits, **EXACT)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_checkpoint_has_the_head_that_peft_leaves(models, tmp_path, family):
    folder, model = models(family, True)
    train(model, tmp_path / "adapter", **TABLE_COPY)
    made = init_checkpoint(
        folder, tmp_path / "checkpoint", adapter=tmp_path / "adapter", spatial_decoder=SpatialDecoderConfig(width=64)
    )
    wrapped = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path / "adapter")
    loaded, merged = load_checkpoint(made).language_model, wrapped.merge_and_unload()
    assert torch.equal(loaded.lm_head.weight, merged.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, merged.get_input_embeddings().weight)


@pytest.mark.parametrize("place", [".", "adapter"])
def test_an_adapter_saved_under_a_name_is_found(models, tmp_path, place, capsys):
    _, model = models("qwen3_vl", True)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((models("qwen3_vl", True)[0] / "tokenizer.json").read_bytes())
    train(model, folder / place, name="first", **QUERY)
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not open_store(folder).raw(key)
    train(models("qwen3_vl", True)[1], folder / place, name="second", **QUERY)
    command = ["init", "--backbone", str(folder), "--out", str(tmp_path / "checkpoint"), "--decoder-width", "64"]
    assert run(command) == 2 and "checkpoint.several_adapters" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
    assert run([*command, "--adapter", "second"]) == 0
    expected = open_store(folder, adapter=folder / place / "second").read(key)
    assert torch.equal(open_store(tmp_path / "checkpoint").read(key), expected)


@pytest.mark.parametrize(
    "name, value",
    [
        ("use_dora", True), ("lora_bias", True), ("trainable_token_indices", [1, 2]), ("init_lora_weights", "olora"),
        ("target_parameters", ["k_proj.weight"]),
    ],
)  # fmt: skip
def test_what_is_not_a_sum_is_rejected_by_name(models, tmp_path, name, value):
    folder, model = models("qwen2_5_vl", True)  # its projections have biases
    train(model, tmp_path / "adapter", **QUERY, **{name: value})
    with raises("checkpoint.unsupported_adapter", name, value):
        open_store(folder, "qwen2_5_vl", adapter=tmp_path / "adapter", tied=True)


def test_every_setting_of_peft_is_known():
    settings = {field.name for field in dataclasses.fields(LoraConfig)}
    assert {name for name, value in LoraConfig().to_dict().items() if value} <= SETTINGS
    assert settings - SETTINGS == {
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
        "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
        "velora_config",
    }  # fmt: skip
