"""Checkpoint folders: `config.json`, `model.safetensors`, `tokenizer.json`. Never pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bridge_stg.config import BridgeSTGConfig
from bridge_stg.model import KEY_PREFIXES, BridgeSTG
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.prompt import Tokenizer

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"


def checkpoint_key(name: str) -> str:
    """Return the name in a checkpoint of a parameter of `BridgeSTG`."""
    for prefix, theirs in KEY_PREFIXES.items():
        if name.startswith(prefix):
            return theirs + name[len(prefix) :]
    raise KeyError(name)


def save_checkpoint(model: BridgeSTG, folder: Path, tokenizer: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a checkpoint folder, by rename.

    Raises:
        CheckpointError: a value does not fit the dtype, or the folder cannot be written.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        if name.startswith("language_model.lm_head.") and model.tied:
            continue
        stored = value.detach().to(dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise CheckpointError(f"{checkpoint_key(name)} holds values that {dtype} cannot; save in float32")
        tensors[checkpoint_key(name)] = stored
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.config.save(partial)
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        shutil.copyfile(tokenizer, partial / TOKENIZER)
        partial.chmod(0o755)
        for file in partial.iterdir():
            folder.mkdir(exist_ok=True)
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(folder: Path | str, *, attention: str | None = None) -> BridgeSTG:
    """Read a checkpoint folder into a float32 model in eval mode.

    Args:
        folder: holds config.json, model.safetensors and tokenizer.json.
        attention: name in transformers' attention registry; the model's default if None.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError(
            f"{folder}: {found}; a checkpoint is a folder with config.json, {WEIGHTS} and {TOKENIZER}"
        )
    config = BridgeSTGConfig.load(folder)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    path = folder / WEIGHTS
    if not path.is_file():
        hint = f" (found {pickles[0]}, but pickle files are never read: convert it to safetensors)" if pickles else ""
        raise CheckpointError(f"{path}: no such file{hint}")
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(f"{folder / TOKENIZER}: no such file; the model cannot read a query without it")
    try:
        tokenizer = Tokenizer.from_file(folder / TOKENIZER)
    except Exception as error:
        raise CheckpointError(str(error)) from error
    try:
        options = {} if attention is None else {"attention": attention}
        model = BridgeSTG(config, tokenizer, **options)
    except CheckpointError:
        raise
    except Exception as error:  # transformers validates configs with many exception types
        raise CheckpointError(f"{folder / 'config.json'}: the backbone cannot be built from it ({error})") from error
    _load_weights(model, path)
    return model.eval()


def _load_weights(model: BridgeSTG, path: Path) -> None:
    """Copy each tensor of the file into the model, naming what is missing, unexpected or of another shape."""
    targets = {checkpoint_key(n): p for n, p in model.state_dict().items()
               if not (n.startswith("language_model.lm_head.") and model.tied)}  # fmt: skip
    try:
        with safe_open(path, "pt") as file:
            found = set(file.keys())
            if model.tied:
                found.discard("lm_head.weight")
            _check_keys(path, "misses", sorted(set(targets) - found))
            _check_keys(path, "holds, unexpectedly,", sorted(found - set(targets)))
            for key, target in targets.items():
                shape = tuple(file.get_slice(key).get_shape())
                if shape != tuple(target.shape):
                    raise CheckpointError(
                        f"{path}: {key} has shape {list(shape)}, but config.json asks for {list(target.shape)}"
                    )
                value = file.get_tensor(key)
                if not value.is_floating_point() or not torch.isfinite(value.float()).all():
                    raise CheckpointError(f"{path}: {key} holds values that are not finite numbers")
                target.copy_(value)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from error


def _check_keys(path: Path, verb: str, keys: list[str]) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise CheckpointError(f"{path}: {verb} {', '.join(keys[:3])}{more}; config.json describes another model")
