"""LoRA adapters: merged as by PEFT, and rejected if they are not plain LoRA of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from tests.bridge_stg.checkpoint.test_weight_store import open_store
from tests.bridge_stg.model.published import publish
from tests.errors import raises

BASE = "base_model.model."
LAYER = "model.language_model.layers.0."
QUERY, TABLE = LAYER + "self_attn.q_proj", "model.language_model.embed_tokens"
PATCHES, NORM = "model.visual.patch_embed.proj", "model.language_model.norm.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def published(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    publish(folder, "qwen3_vl", dtype=request.param)
    return folder


@pytest.fixture
def folder(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "model"))


def add_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(
        {BASE + name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )


def pair(store, module: str, rank: int = 2) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return A and B of a module by their names, and B A in the shape of its weight."""
    torch.manual_seed(1)
    shape = store[module + ".weight"].shape
    a, b = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
    product = torch.einsum("or,r...->o...", b.flatten(1), a)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, product


def expect(store, key: str, delta: torch.Tensor, base: torch.Tensor) -> None:
    assert not store.raw(key) and not torch.equal(store.read(key), base)
    assert store.read(key).dtype == base.dtype
    torch.testing.assert_close(store.read(key), (base.float() + delta).to(base.dtype))


@pytest.mark.parametrize("place", [".", "adapter"])
@pytest.mark.parametrize("module", [QUERY, PATCHES], ids=["linear", "convolution"])
def test_a_delta_is_added(folder, module, place):
    plain = open_store(folder)
    tensors, product = pair(plain, module)
    add_adapter(folder / place, tensors)
    merged = open_store(folder)
    expect(merged, module + ".weight", 3 * product, plain.read(module + ".weight"))
    others = [key for key in plain if key != module + ".weight"]
    assert all(merged.raw(key) and torch.equal(merged.read(key), plain.read(key)) for key in others)
    assert [tensor.length for tensor in merged.values()] == [tensor.length for tensor in plain.values()]


@pytest.mark.parametrize(
    "config, scale",
    [
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"k_proj": 1, r"layers\.0\.self_attn\.q_proj": 5}}, 5 / 2),
        ({"alpha_pattern": {"proj": 5}}, 6 / 2),
        ({"rank_pattern": {"q_proj": 2}, "r": 64}, 6 / 2),
    ],
    ids=["rank-stabilized", "alpha of a module", "pattern of another", "rank of a module"],
)
def test_the_scale_follows_the_config(folder, config, scale):
    plain = open_store(folder)
    tensors, product = pair(plain, QUERY)
    add_adapter(folder, tensors, **config)
    expect(open_store(folder), QUERY + ".weight", scale * product, plain.read(QUERY + ".weight"))


def test_embeddings_are_transposed(folder):
    plain = open_store(folder)
    rows, width = plain[TABLE + ".weight"].shape
    torch.manual_seed(1)
    a, b = torch.randn(2, rows), torch.randn(width, 2)
    add_adapter(folder, {f"{TABLE}.lora_embedding_A": a, f"{TABLE}.lora_embedding_B": b})
    expect(open_store(folder), TABLE + ".weight", 3 * (b @ a).T, plain.read(TABLE + ".weight"))


def test_whole_tensors_take_the_place_of_the_models(folder):
    plain = open_store(folder)
    value = torch.randn(plain[NORM].shape)
    add_adapter(folder, {NORM: value, **pair(plain, QUERY)[0]})
    merged = open_store(folder)
    assert torch.equal(merged.read(NORM), value) and merged.raw(NORM)


def test_a_large_weight_is_merged_in_blocks(folder, monkeypatch):
    monkeypatch.setattr("bridge_stg.checkpoint.lora.BLOCK_VALUES", 100)
    plain = open_store(folder)
    tensors, product = pair(plain, QUERY)
    add_adapter(folder, tensors)
    expect(open_store(folder), QUERY + ".weight", 3 * product, plain.read(QUERY + ".weight"))


def test_a_checkpoint_is_made_of_the_merged_model(folder, tmp_path):
    tensors, product = pair(open_store(folder), QUERY)
    base = open_store(folder).read(QUERY + ".weight")
    table, width = open_store(folder)[TABLE + ".weight"].shape
    tensors |= {f"{TABLE}.lora_embedding_A": torch.ones(2, table), f"{TABLE}.lora_embedding_B": torch.ones(width, 2)}
    add_adapter(folder, tensors)
    init_checkpoint(folder, tmp_path / "checkpoint")
    loaded = load_checkpoint(tmp_path / "checkpoint")
    weight = loaded.language_model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight, (base.float() + 3 * product).to(base.dtype).float())
    assert not (tmp_path / "checkpoint" / "adapter_config.json").exists()


def test_a_stored_head_equal_to_the_table_stays_as_it_was(folder, tmp_path):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": load_file(path)[TABLE + ".weight"]}, path)
    rows, width = open_store(folder)[TABLE + ".weight"].shape
    a, b = torch.ones(2, rows), torch.ones(width, 2)
    add_adapter(folder, {f"{TABLE}.lora_embedding_A": a, f"{TABLE}.lora_embedding_B": b})
    base = load_file(path)["lm_head.weight"].float()
    loaded = load_checkpoint(init_checkpoint(folder, tmp_path / "checkpoint"))
    assert not loaded.tied and torch.equal(loaded.language_model.lm_head.weight, base)
    assert not torch.equal(loaded.language_model.model.embed_tokens.weight, base)


def without_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if "lora_A" in name}


REJECTED = {
    "DoRA": (lambda t: t, {"use_dora": True}, "unsupported", ["adapter_config.json", "use_dora True"]),
    "an alpha that is no number": (lambda t: t, {"lora_alpha": "x"}, "bad", ["adapter_config.json", "'x'"]),
    "an alpha beyond floats": (lambda t: t, {"lora_alpha": 10**400}, "bad", ["adapter_config.json"]),
    "a pattern with flags": (lambda t: t, {"alpha_pattern": {"(?i)Q": 3}}, "bad", ["adapter_config.json"]),
    "rank 0": (lambda t: {k: torch.ones(v.shape[0] * ("B" in k), 0) for k, v in t.items()}, {}, "bad", [QUERY]),
    "numbers": (lambda t: {k: torch.ones(()) for k in t}, {}, "bad", [QUERY]),
    "nothing": (lambda t: {}, {}, "bad", ["adapter_model.safetensors"]),
    "another method": (lambda t: t, {"peft_type": "IA3"}, "unsupported", ["peft_type 'IA3'"]),
    "a changed base": (
        lambda t: t, {"init_lora_weights": "pissa_niter_4"}, "unsupported", ["init_lora_weights 'pissa_niter_4'"]
    ),
    "A without B": (without_b, {}, "bad", [f"{QUERY}.lora_A.weight", "lora_B.weight"]),
    "a magnitude": (
        lambda t: t | {f"{QUERY}.lora_magnitude_vector": torch.ones(2)}, {}, "unsupported", ["lora_magnitude_vector"]
    ),
    "another module": (
        lambda t: {k.replace("q_proj", "w_proj"): v for k, v in t.items()}, {}, "bad", ["w_proj.weight"]
    ),
    "another width": (lambda t: {k: torch.ones(2, 5) for k in t}, {}, "bad", [QUERY, "[2, 5]"]),
    "another rank": (
        lambda t: {k: torch.ones(3, 32) if "lora_A" in k else v for k, v in t.items()}, {}, "bad", [QUERY, "[3, 32]"]
    ),
    "another tensor's shape": (lambda t: {NORM: torch.ones(3)}, {}, "bad", [NORM, "[3]", "[32]"]),
    "token rows": (lambda t: t, {"trainable_token_indices": [1, 2]}, "unsupported", ["trainable_token_indices [1, 2]"]),
    "a setting of another version": (lambda t: t, {"use_new": {"a": 1}}, "unsupported", ["use_new {'a': 1}"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_not_a_plain_adapter_of_this_model_is_rejected(folder, name):
    change, config, code, values = REJECTED[name]
    add_adapter(folder, change(pair(open_store(folder), QUERY)[0]), **config)
    with raises(f"checkpoint.{code}_adapter", *values):
        open_store(folder)


def test_half_an_adapter_is_rejected(folder):
    add_adapter(folder, pair(open_store(folder), QUERY)[0])
    (folder / "adapter_config.json").unlink()
    with raises("checkpoint.missing_file", "adapter_config.json"):
        open_store(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    with raises("checkpoint.missing_file", "adapter_model.safetensors", "pickle"):
        open_store(folder)


@pytest.mark.parametrize("places", [[".", "adapter"], ["adapter/first", "adapter/second"], ["first", "adapter/second"]])
def test_one_of_several_adapters_must_be_chosen(folder, places):
    plain = open_store(folder)
    tensors, product = pair(plain, QUERY)
    for scale, place in enumerate(places, 1):
        (folder / place).mkdir(parents=True, exist_ok=True)
        add_adapter(folder / place, tensors, lora_alpha=2 * scale)
    with raises("checkpoint.several_adapters", *places, "--adapter"):
        open_store(folder)
    with raises("checkpoint.not_found", "third"):
        open_store(folder, adapter="third")
    for scale, place in enumerate(places, 1):
        for chosen in (place, Path(place).name, folder / place):
            merged = open_store(folder, adapter=chosen)
            expect(merged, QUERY + ".weight", scale * product, plain.read(QUERY + ".weight"))


def test_an_adapter_that_only_replaces_tensors_is_written(folder, tmp_path):
    value = torch.full_like(open_store(folder).read(NORM), 3)
    add_adapter(folder / "named", {NORM: value})
    loaded = load_checkpoint(init_checkpoint(folder, tmp_path / "checkpoint"))
    assert torch.equal(loaded.language_model.model.norm.weight, value.float())


def test_values_that_overflow_are_named(tmp_path):
    publish(tmp_path / "model", "qwen3_vl", dtype=torch.float16)
    tensors = {name: 1e4 * value for name, value in pair(open_store(tmp_path / "model"), QUERY)[0].items()}
    add_adapter(tmp_path / "model", tensors)
    with raises("checkpoint.not_finite", f"{QUERY}.weight", "torch.float16"):
        open_store(tmp_path / "model").read(QUERY + ".weight")
