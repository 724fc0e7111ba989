"""Save and load checkpoint folders: `config.json`, `tokenizer.json` and safetensors weights, never pickle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from bridge_stg.checkpoint.lora import HEAD
from bridge_stg.checkpoint.plain_folder import plain_config
from bridge_stg.checkpoint.safetensors_file import StoredTensor, save_file
from bridge_stg.checkpoint.weight_store import TOKENIZER, WEIGHTS, WeightStore, check_folder, list_keys
from bridge_stg.model.backbones import FAMILIES, backbone
from bridge_stg.model.config import BridgeSTGConfig, check_model_type, read_json
from bridge_stg.model.model import KEY_PREFIXES, BridgeSTG
from bridge_stg.runtime.chain import tokenizer as tokenizers
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import BridgeError, CheckpointError
from bridge_stg.runtime.host.files import temporary_sibling

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def checkpoint_key(name: str) -> str:
    """Return the checkpoint key of a parameter of `BridgeSTG`; raise KeyError if it has none."""
    for prefix, theirs in KEY_PREFIXES.items():
        if name.startswith(prefix):
            return theirs + name[len(prefix) :]
    raise KeyError(name)


def save_checkpoint(model: BridgeSTG, folder: Path, tokenizer: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a checkpoint folder.

    Args:
        model: the model, on the CPU.
        folder: the folder to create; files in an existing one are replaced.
        tokenizer: path of the tokenizer.json to copy.
        dtype: dtype of the stored weights.

    Raises:
        CheckpointError: a value does not fit the dtype.
    """
    tensors = {
        key: cast_weight(value.detach(), dtype, name=key).contiguous()
        for key, value in checkpoint_tensors(model).items()
    }
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(folder) as partial:
        partial.mkdir()
        model.config.save(partial)
        save_files({WEIGHTS: tensors}, partial)
        shutil.copyfile(tokenizer, partial / TOKENIZER)
        if not folder.exists():
            partial.rename(folder)
            return
        for file in partial.iterdir():
            os.replace(file, folder / file.name)


def cast_weight(value: torch.Tensor, dtype: torch.dtype, *, name: str) -> torch.Tensor:
    """Return a tensor in a dtype. Raises CheckpointError, which gives its `name`, if a value is not finite in it."""
    value = value.to(dtype)
    if not torch.isfinite(value).all():
        message = f"{name} has values that {dtype} cannot represent; save in fp32 or bf16 (--dtype)"
        raise CheckpointError("checkpoint.not_finite", message)
    return value


def save_files(files: Mapping[str, dict[str, torch.Tensor]], folder: Path) -> None:
    """Write safetensors files, given their tensors by file name and key."""
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors creates files that only their owner can read


def load_checkpoint(
    folder: Path | str, *, attention: str | None = None, adapter: Path | str | None = None
) -> BridgeSTG:
    """Load a checkpoint folder as a float32 model in eval mode.

    Args:
        folder: folder with config.json, weights (see `WeightStore.open`) and tokenizer.json: a checkpoint, or a plain
            model of `FAMILIES`, which gets text heads.
        attention: name in transformers' attention registry; None: the model's default.
        adapter: name or path of a LoRA adapter to merge; None: the only one in the folder, if any.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or of another shape.
    """
    model, store = open_checkpoint(folder, attention=attention, adapter=adapter)
    load_weights(model, store)
    return model.eval()


def load_weights(model: BridgeSTG, store: WeightStore) -> None:
    """Copy the weights of a checkpoint into its model. Raises CheckpointError if one has a value that is not finite."""
    with torch.no_grad():
        for key, target in checkpoint_tensors(model).items():
            value = store.read(key)
            if not torch.isfinite(value).all():
                message = f"{store[key].path}: {key} has values that are not finite numbers"
                raise CheckpointError("checkpoint.not_finite", message)
            target.copy_(value)


def load_config(folder: Path) -> BridgeSTGConfig:
    """Return the config of a checkpoint, or a new one with text heads for a plain model.

    Raises CheckpointError as `BridgeSTGConfig.load` and `plain_config` do.
    """
    path = folder / "config.json"
    values = read_json(path, hint="a checkpoint is a folder with a config.json")
    check_model_type(values, path)
    if values["model_type"] in FAMILIES:
        return plain_config(folder, values)
    return BridgeSTGConfig.from_dict(values, str(path))


def open_checkpoint(
    folder: Path | str, *, attention: str | None = None, adapter: Path | str | None = None
) -> tuple[BridgeSTG, WeightStore]:
    """Return a checkpoint's model with random weights, on torch's current default device, and its checked weights."""
    folder = Path(folder)
    check_folder(folder)
    config = load_config(folder)
    config, store = open_weights(folder, config, adapter=adapter)
    tokenizer = load_tokenizer(folder, config)
    where = folder / "config.json"
    with torch.device("meta"):  # before a model of wrong sizes takes memory
        check_weights(build_model(config, where=where), store)
    return build_model(config, tokenizer, where=where, attention=attention), store


def open_weights(
    folder: Path | str, config: BridgeSTGConfig, *, adapter: Path | str | None = None
) -> tuple[BridgeSTGConfig, WeightStore]:
    """Open the weights of a folder, whose keys may be those of the backbone's published folders.

    The config returned is that of the weights: an adapter may untie the head from the embedding table.
    """
    tied = config.backbone_config().tie_word_embeddings
    prefixes = backbone(config.backbone).key_prefixes
    store = WeightStore.open(folder, key_prefixes=prefixes, tied=tied, adapter=adapter)
    return config.untied() if tied and not store.tied else config, store


def load_tokenizer(folder: Path, config: BridgeSTGConfig) -> Tokenizer:
    """Load a folder's tokenizer; raise CheckpointError if it is missing, invalid or another model's."""
    if not (folder / TOKENIZER).is_file():
        message = f"{folder / TOKENIZER}: no such file; the model cannot read a query without it"
        raise CheckpointError("checkpoint.missing_file", message)
    try:
        tokenizer = tokenizers.load_tokenizer(folder / TOKENIZER, config.model_spec())
        path = folder / "tokenizer_config.json"
        added = read_json(path, hint="").get("added_tokens_decoder") if path.is_file() else None
        for number, token in (added or {}).items():
            if (found := tokenizer.id_of(token["content"])) != int(number):
                message = f"{path}: gives {token['content']!r} the id {number}, {TOKENIZER} gives {found}"
                raise CheckpointError("checkpoint.bad_tokenizer", f"{message}; save both together")
    except Exception as error:
        detail = (
            str(error) if isinstance(error, BridgeError) else f"{folder}: its tokenizer is damaged ({error!r:.200})"
        )
        raise CheckpointError("checkpoint.bad_tokenizer", detail) from error
    return tokenizer


def build_model(
    config: BridgeSTGConfig, tokenizer: Tokenizer | None = None, *, where: Path, attention: str | None = None
) -> BridgeSTG:
    """Build a model with random weights. Raises CheckpointError, naming the config's file `where`, if it cannot."""
    try:
        return BridgeSTG(config, tokenizer, **({} if attention is None else {"attention": attention}))
    except CheckpointError:
        raise
    except Exception as error:  # transformers validates configs with many exception types
        message = f"{where}: cannot build the backbone ({error!s:.300})"
        raise CheckpointError("checkpoint.bad_config", message) from error


def checkpoint_tensors(model: BridgeSTG) -> dict[str, torch.Tensor]:
    """Return a model's parameters by checkpoint key; a tied head is left out."""
    return {
        checkpoint_key(name): value
        for name, value in model.state_dict().items()
        if not (name.startswith("language_model.lm_head.") and model.tied)
    }


def check_weights(model: BridgeSTG, store: Mapping[str, StoredTensor], *, missing_ok: tuple[str, ...] = ()) -> None:
    """Check that a store has exactly the tensors of a model, with the right shapes and readable dtypes.

    Args:
        model: the model; may consist of meta or fake tensors.
        store: the weights.
        missing_ok: prefixes of keys that may be missing.

    Raises:
        CheckpointError: the message names the first three wrong keys and the number of others.
    """
    needed = {key: tuple(value.shape) for key, value in checkpoint_tensors(model).items()}
    held = dict(store)
    needed = {key: shape for key, shape in needed.items() if key in held or not key.startswith(missing_ok)}
    where = weights_path(store)
    for code, verb, keys in (
        ("checkpoint.missing_tensor", "misses", needed.keys() - held.keys()),
        ("checkpoint.unexpected_tensor", "has unexpected", held.keys() - needed.keys()),
    ):
        if keys:
            reason = "config.json describes another model"
            if verb == "misses" and keys == {HEAD}:
                reason = (
                    '"tie_word_embeddings" is false in config.json; set it to true if the embedding table is the head'
                )
            raise CheckpointError(code, f"{where}: {verb} {list_keys(sorted(keys))}; {reason}")
    wrong = [key for key, shape in needed.items() if held[key].shape != shape]
    if wrong:
        first = wrong[0]
        also = f"; also of another shape: {list_keys(wrong[1:])}" if len(wrong) > 1 else ""
        message = f"{held[first].path}: {first} has shape {list(held[first].shape)}, expected {list(needed[first])}"
        raise CheckpointError("checkpoint.wrong_shape", f"{message} by config.json{also}")
    wrong = [key for key in needed if held[key].dtype not in FLOATS]
    if wrong:
        kind = str(held[wrong[0]].dtype).removeprefix("torch.")
        message = f"{held[wrong[0]].path}: {list_keys(wrong)} have dtype {kind}, expected float32, float16 or bfloat16"
        hint = "quantized checkpoints are not supported, use the one that it was made from"
        raise CheckpointError("checkpoint.unsupported_dtype", f"{message}; {hint}")


def weights_path(store: Mapping[str, StoredTensor]) -> Path:
    """Return the path that errors about a whole store name: its only file, or the folder of several."""
    paths = list(dict.fromkeys(tensor.path for tensor in store.values()))
    return paths[0] if len(paths) == 1 else paths[0].parent if paths else Path(WEIGHTS)
