"""The weights of a folder: every way of storing them gives the same tensors, and errors name the damage."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.model.backbones import FAMILIES, backbone
from tests.bridge_stg.model.published import publish
from tests.errors import raises

SHARDED = {"max_shard_size": "60KB"}
ATTENTION = "model.language_model.layers.0.self_attn.q_proj.weight"


def open_store(folder: Path, family: str = "qwen3_vl", **options: Any) -> WeightStore:
    return WeightStore.open(folder, key_prefixes=backbone({"model_type": family}).key_prefixes, **options)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    publish(folder, "qwen3_vl", **SHARDED)
    return folder


@pytest.fixture
def folder(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, SHARDED], ids=["one file", "shards"])
def test_what_transformers_saved_is_read(tmp_path, family, dtype, options):
    model = publish(tmp_path / "model", family, tied=False, dtype=dtype, **options)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > (1 if options else 0)
    store = open_store(tmp_path / "model", family)
    expected = model.state_dict()
    assert set(store) == set(expected) and store.dtype == dtype
    for key, value in expected.items():
        assert store.raw(key) and torch.equal(store.read(key), value), key
    assert {key: tensor.length for key, tensor in store.items()} == {key: v.nbytes for key, v in expected.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_older_folders_are_read(tmp_path, family):
    model = publish(tmp_path / "model", family)
    path = tmp_path / "model" / "model.safetensors"
    old = {}
    for key, value in model.state_dict().items():
        name = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        if key != "lm_head.weight":
            old[name] = value.contiguous()
    save_file(old, path)
    store = open_store(tmp_path / "model", family)
    assert torch.equal(store.read(ATTENTION), model.state_dict()[ATTENTION])
    init_checkpoint(tmp_path / "model", tmp_path / "checkpoint")
    loaded = load_checkpoint(tmp_path / "checkpoint").state_dict()
    for key, value in model.model.language_model.state_dict().items():
        assert torch.equal(loaded[f"language_model.model.{key}"], value), key


def test_each_tensor_says_where_its_bytes_are(folder):
    for stored in open_store(folder).values():
        content = stored.path.read_bytes()[stored.offset : stored.offset + stored.length]
        assert torch.equal(
            torch.frombuffer(bytearray(content), dtype=stored.dtype).reshape(stored.shape),
            load_file(stored.path)[stored.key],
        )


def test_scalars_and_empty_tensors_are_read(tmp_path):
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "flags": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "model.safetensors")
    store = open_store(tmp_path)
    assert all(torch.equal(store.read(key), value) for key, value in tensors.items())


def damage_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def rewrite_header(path: Path, **entry: object) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[next(key for key in header if key != "__metadata__")] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def add_entry(path: Path, entry: bytes) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(b"{", b"{" + entry + b",", 1)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


BREAKAGES = {
    "a shard is missing": (lambda f: shard(f).unlink(), "missing_file", ["index.json", "'model-00001"]),
    "a shard is cut": (lambda f: cut(shard(f), shard(f).stat().st_size - 5), "damaged", ["00001"]),
    "a shard is empty": (lambda f: cut(shard(f), 0), "damaged", ["00001"]),
    "a Git LFS pointer": (lambda f: shard(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "damaged",
                          ["00001", "git lfs pull"]),
    "no shape": (lambda f: rewrite_header(shard(f), shape=None), "damaged", ["00001"]),
    "another shape": (lambda f: rewrite_header(shard(f), shape=[1, 2, 3]), "damaged", ["[1, 2, 3]"]),
    "unknown dtype": (lambda f: rewrite_header(shard(f), dtype="F3"), "damaged", ["'F3'"]),
    "offsets outside": (lambda f: rewrite_header(shard(f), data_offsets=[-4, 0]), "damaged", ["data_offsets", -4]),
    "a shape of fractions": (lambda f: rewrite_header(shard(f), shape=[1.5, 2]), "damaged", ["shape[0]", 1.5]),
    "two negative sizes": (lambda f: rewrite_header(shard(f), shape=[-1, -3]), "damaged", ["shape[0]", -1]),
    "infinite sizes": (lambda f: rewrite_header(shard(f), shape=[float("inf")]), "damaged", ["shape[0]", "Infinity"]),
    "tensors that overlap": (lambda f: add_entry(shard(f), b'"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'),
                             "damaged", ["x and", "overlap"]),
    "a tensor twice": (lambda f: add_entry(shard(f), b'"x":{},"x":{}'), "damaged", ["'x'", "twice"]),
    "a header too deep": (lambda f: add_entry(shard(f), b'"x":' + b"[" * 10**5), "damaged", ["levels"]),
    "a header of exabytes": (lambda f: shard(f).write_bytes((2**60).to_bytes(8, "little") + b"{}"), "damaged",
                            ["1,152,921,504,606,846,976"]),
    "a shard lacks a key": (
        lambda f: damage_index(f, lambda v: v["weight_map"].update(more=shard(f).name)), "missing_tensor",
        ["00001", "more", "index.json"],
    ),
    "an index without a map": (lambda f: damage_index(f, lambda v: v.pop("weight_map")), "bad_index", ["'weight_map'"]),
    "an index that is a list": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"), "bad_index", ["'weight_map'"]
    ),
    "an index that leads outside": (
        lambda f: damage_index(f, lambda v: v["weight_map"].update(more="../x.safetensors")), "missing_file",
        ["'../x.safetensors'"],
    ),
    "a key twice": (
        lambda f: save_file({"lm_head.weight": torch.ones(1), ATTENTION: torch.ones(1)}, f / "bridging.safetensors"),
        "duplicate_tensor", [ATTENTION, "bridging.safetensors"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_damage_is_named(folder, name):
    damage, code, values = BREAKAGES[name]
    damage(folder)
    with raises(f"checkpoint.{code}", *values):
        open_store(folder)


def test_the_command_to_convert_pickles_works(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    torch.save({"a": tensors["a"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": tensors["b"], "same": tensors["b"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({}, tmp_path / "training_args.bin")
    with raises("checkpoint.missing_file", "pytorch_model-00001-of-00002.bin") as caught:
        open_store(tmp_path)
    command = shlex.split(str(caught.value).partition("convert them in that folder: ")[2].removesuffix(")"))
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, timeout=120)
    store = open_store(tmp_path)
    assert set(store) == {"a", "b", "same"} and torch.equal(store.read("same"), tensors["b"])


def load(folder: Path) -> object:
    checkpoint = folder.parent / "checkpoint"
    init_checkpoint(folder, checkpoint)
    return load_checkpoint(checkpoint)


def add_part(checkpoint: Path, change) -> None:
    path = checkpoint / "spatial_decoder.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


WRONG_KEYS = {
    "missing": (
        lambda t: [t.pop(k) for k in sorted(t) if "vote" in k],
        "missing_tensor", ["spatial_decoder.vote.0.bias", "and 1 more"],
    ),
    "unexpected": (lambda t: t.update(a=torch.ones(1), b=torch.ones(1)), "unexpected_tensor", ["a, b;"]),
    "shape": (
        lambda t: t.update({k: torch.ones(7) for k in t if "time." in k}),
        "wrong_shape", ["spatial_decoder.safetensors", "[7]", "more"],
    ),
    "integers": (
        lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if "vote" in k}),
        "unsupported_dtype", ["int8", "float32", "vote"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_keys_that_do_not_fit_are_named(folder, tmp_path, name):
    change, code, values = WRONG_KEYS[name]
    load(folder)
    add_part(tmp_path / "checkpoint", change)
    with raises(f"checkpoint.{code}", *values):
        load_checkpoint(tmp_path / "checkpoint")


def test_a_missing_head_names_the_setting(tmp_path):
    publish(tmp_path / "model", "qwen3_vl", tied=False)
    path = tmp_path / "model" / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != "lm_head.weight"}, path)
    with raises("checkpoint.missing_tensor", "lm_head.weight", "tie_word_embeddings"):
        load(tmp_path / "model")


@pytest.mark.parametrize("factor", [1, 2])
def test_a_stored_head_of_a_tied_model_must_equal_the_table(tmp_path, factor):
    model = publish(tmp_path / "model", "qwen3_vl")
    table = model.get_input_embeddings().weight.detach()
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": factor * table}, path)
    if factor == 1:
        loaded = load(tmp_path / "model")
        assert loaded.tied and torch.equal(loaded.language_model.lm_head.weight, table)
    else:
        with raises("checkpoint.tied_head", "model.safetensors", "lm_head.weight"):
            load(tmp_path / "model")
