"""Checkpoint folders: `config.json`, weights as `WeightStore` reads them, `tokenizer.json`. Never pickle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from bridge_stg.checkpoint.safetensors_file import StoredTensor, same_bytes
from bridge_stg.checkpoint.weight_store import PARTS, WEIGHTS, WeightStore, list_keys
from bridge_stg.model.backbones import backbone
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.model.model import KEY_PREFIXES, BridgeSTG
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import CheckpointError

TOKENIZER = "tokenizer.json"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
PART_FILES = dict(zip(("bridging", "spatial_decoder"), PARTS))
READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def checkpoint_key(name: str) -> str:
    """Return the name in a checkpoint of a parameter of `BridgeSTG`."""
    for prefix, theirs in KEY_PREFIXES.items():
        if name.startswith(prefix):
            return theirs + name[len(prefix) :]
    raise KeyError(name)


def save_checkpoint(
    model: BridgeSTG,
    folder: Path,
    tokenizer: Path,
    *,
    dtype: torch.dtype = torch.float16,
    parts_dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint folder, by rename.

    Args:
        model: on the CPU.
        folder: made, or its files replaced.
        tokenizer: a tokenizer.json to copy.
        dtype: what values are stored in.
        parts_dtype: stores the bridging and spatial parts in this, in files of their own; None: with the rest.

    Raises:
        CheckpointError: a value does not fit the dtype, or the folder cannot be written.
    """
    files: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}}
    for key, value in checkpoint_tensors(model).items():
        name = WEIGHTS if parts_dtype is None else PART_FILES.get(key.partition(".")[0], WEIGHTS)
        stored = value.detach().to(dtype if name == WEIGHTS else parts_dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise CheckpointError(
                "checkpoint.not_finite", f"{key} holds values that {stored.dtype} cannot; save in float32"
            )
        files.setdefault(name, {})[key] = stored
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.config.save(partial)
        for name, tensors in files.items():
            save_file(tensors, partial / name, {"format": "pt"})
            (partial / name).chmod(0o644)  # the package makes files for their owner alone
        shutil.copyfile(tokenizer, partial / TOKENIZER)
        partial.chmod(0o755)
        if not folder.exists():
            partial.rename(folder)
            return
        for file in partial.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(folder: Path | str, *, attention: str | None = None) -> BridgeSTG:
    """Read a checkpoint folder into a float32 model in eval mode.

    Args:
        folder: holds config.json, weights (see `WeightStore.open`) and tokenizer.json.
        attention: name in transformers' attention registry; the model's default if None.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    check_folder(folder)
    config = BridgeSTGConfig.load(folder)
    store = open_weights(folder, config)
    tokenizer = load_tokenizer(folder)
    model = build_model(config, tokenizer, where=folder / "config.json", attention=attention)
    check_weights(model, store)
    targets = checkpoint_tensors(model)
    with torch.no_grad():
        for key, target in targets.items():
            value = store.read(key)
            if not torch.isfinite(value).all():
                raise CheckpointError(
                    "checkpoint.not_finite", f"{store[key].path}: {key} holds values that are not finite numbers"
                )
            target.copy_(value)
    return model.eval()


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if a path is not a folder."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError(
            "checkpoint.not_found",
            f"{folder}: {found}; a checkpoint is a folder with config.json, {WEIGHTS} and {TOKENIZER}",
        )


def open_weights(folder: Path | str, config: BridgeSTGConfig) -> WeightStore:
    """Return the weights of a folder by this project's keys, whichever way the backbone's family has spelled them."""
    return WeightStore.open(folder, key_prefixes=backbone(config.backbone).key_prefixes)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a folder's tokenizer.

    Raises:
        CheckpointError: it is missing, or is not a tokenizer.
    """
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(
            "checkpoint.missing_file", f"{folder / TOKENIZER}: no such file; the model cannot read a query without it"
        )
    try:
        return Tokenizer.from_file(folder / TOKENIZER)
    except Exception as error:
        raise CheckpointError("checkpoint.bad_tokenizer", str(error)) from error


def build_model(
    config: BridgeSTGConfig, tokenizer: Tokenizer | None = None, *, where: Path, attention: str | None = None
) -> BridgeSTG:
    """Return a model of a config, its weights not yet set; where it cannot be built, name the file that says so."""
    try:
        return BridgeSTG(config, tokenizer, **({} if attention is None else {"attention": attention}))
    except CheckpointError:
        raise
    except Exception as error:  # transformers validates configs with many exception types
        raise CheckpointError(
            "checkpoint.bad_config", f"{where}: the backbone cannot be built from it ({error})"
        ) from error


def checkpoint_tensors(model: BridgeSTG) -> dict[str, torch.Tensor]:
    """Return a model's parameters by their keys in a checkpoint; a tied head has none of its own."""
    return {
        checkpoint_key(name): value
        for name, value in model.state_dict().items()
        if not (name.startswith("language_model.lm_head.") and model.tied)
    }


def check_weights(model: BridgeSTG, store: Mapping[str, StoredTensor], *, missing_ok: tuple[str, ...] = ()) -> None:
    """Check that a store holds what a model needs: no key is missing, unexpected, or of another shape or kind.

    Args:
        model: may be on the meta device, or of fake tensors.
        store: the weights.
        missing_ok: beginnings of keys that need not be there.

    Raises:
        CheckpointError: the message names the first three keys and how many more there are.
    """
    needed = {key: tuple(value.shape) for key, value in checkpoint_tensors(model).items()}
    held = dict(store)
    needed = {key: shape for key, shape in needed.items() if key in held or not key.startswith(missing_ok)}
    if model.tied and HEAD in held:
        check_tied_head(held.pop(HEAD), held.get(EMBEDDING))
    where = weights_path(store)
    for code, verb, keys in (
        ("checkpoint.missing_tensor", "misses", needed.keys() - held.keys()),
        ("checkpoint.unexpected_tensor", "unexpectedly contains", held.keys() - needed.keys()),
    ):
        if keys:
            message = f"{where}: {verb} {list_keys(sorted(keys))}; config.json describes another model"
            raise CheckpointError(code, message)
    wrong = [key for key, shape in needed.items() if held[key].shape != shape]
    if wrong:
        first = wrong[0]
        also = f"; also of another shape: {list_keys(wrong[1:])}" if len(wrong) > 1 else ""
        raise CheckpointError(
            "checkpoint.wrong_shape",
            f"{held[first].path}: {first} has shape {list(held[first].shape)}, but config.json asks for "
            f"{list(needed[first])}{also}",
        )
    wrong = [key for key in needed if held[key].dtype not in READABLE]
    if wrong:
        kind = str(held[wrong[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            "checkpoint.unsupported_dtype",
            f"{held[wrong[0]].path}: {list_keys(wrong)} hold {kind} values; expected float32, float16 or bfloat16: "
            "quantized checkpoints are not read, use the one that it was made from",
        )


def check_tied_head(head: StoredTensor, embedding: StoredTensor | None) -> None:
    """Raise CheckpointError if a head is stored that the config says is the embedding table, and it is another one.

    A stored copy of the table is left unread: what an adapter adds to the table, it then adds to the head too.
    """
    same = embedding is not None and head.delta is None and same_bytes(head, embedding)
    if not same:
        raise CheckpointError(
            "checkpoint.tied_head",
            f"{head.path}: {HEAD} is not the embedding table, but config.json ties the two; "
            'set "tie_word_embeddings" to false in its "backbone", or remove the tensor',
        )


def weights_path(store: Mapping[str, StoredTensor]) -> Path:
    """Return what an error about all of a store should name: its one file, or the folder of several."""
    paths = list(dict.fromkeys(tensor.path for tensor in store.values()))
    return paths[0] if len(paths) == 1 else paths[0].parent if paths else Path(WEIGHTS)
