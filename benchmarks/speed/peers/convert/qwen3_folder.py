"""Write the text part of a Qwen3-VL checkpoint as a Qwen3ForCausalLM folder, for language-model runtimes.

A Qwen3-VL text model is a Qwen3 with three-axis positions; on text the axes are equal, and so are the two models.
The weights are copied byte by byte.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from protocol import PeerError

TEXT, HEAD = "model.language_model.", "lm_head.weight"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
END = "<|im_end|>"
_COPY = 64 * 2**20


def write_qwen3_folder(checkpoint: Path, folder: Path) -> Path:
    """Write config.json, model.safetensors and the tokenizer unless they exist; return the folder.

    Raises:
        PeerError: the checkpoint is not a Qwen3-VL, or lacks a text part.
    """
    if (folder / "config.json").exists():
        return folder
    backbone = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["backbone"]
    if backbone.get("model_type") != "qwen3_vl":
        raise PeerError(f"{checkpoint}: model_type is {backbone.get('model_type')}, expected qwen3_vl")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = copy_text_weights(checkpoint, partial / "model.safetensors")
    end = write_tokenizer(checkpoint, partial)
    config = qwen3_config(backbone, dtype, end)
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def qwen3_config(backbone: Mapping[str, Any], dtype: str, end: int) -> dict[str, Any]:
    """Return a Qwen3 configuration with all defaults written out, since some readers do not know them.

    Args:
        backbone: configuration of a Qwen3-VL.
        dtype: name of the dtype in transformers.
        end: id of the token that ends an answer.
    """
    text = backbone["text_config"]
    heads = text["num_attention_heads"]
    theta = text["rope_parameters"]["rope_theta"]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_hidden_layers": text["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": text.get("num_key_value_heads", heads),
        "head_dim": text.get("head_dim", 128),
        "max_position_embeddings": text["max_position_embeddings"],
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "hidden_act": text.get("hidden_act", "silu"),
        "attention_bias": text.get("attention_bias", False),
        "attention_dropout": 0.0,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_scaling": None,
        "use_sliding_window": False,
        "tie_word_embeddings": backbone.get("tie_word_embeddings", False),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": dtype,
    }


def copy_text_weights(checkpoint: Path, target: Path) -> str:
    """Write the tensors of the text part with the names of a Qwen3; return their dtype as transformers names it.

    Raises:
        PeerError: no tensors found, or they have several dtypes or one that peers do not read.
    """
    found = {_name(key): (path, at, entry) for path, at, key, entry in _stored(checkpoint) if _name(key)}
    dtypes = {entry["dtype"] for _, _, entry in found.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        kinds = ", ".join(sorted(dtypes)) or "none"
        raise PeerError(f"{checkpoint}: dtypes of the text weights: {kinds}; expected one of {', '.join(DTYPES)}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (_, _, entry) in found.items():
        begin, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        header[name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for path, at, entry in found.values():
            begin, stop = entry["data_offsets"]
            _copy(path, at + begin, stop - begin, out)
    return DTYPES[dtypes.pop()]


def write_tokenizer(checkpoint: Path, folder: Path) -> int:
    """Copy the tokenizer, write its configuration for transformers, and return the id that ends an answer."""
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return next((token["id"] for token in added if token["content"] == END), 0)


def _name(key: str) -> str:
    """Return a tensor's name in a Qwen3, empty if it does not belong to the text part."""
    return "model." + key.removeprefix(TEXT) if key.startswith(TEXT) else key if key == HEAD else ""


def _stored(checkpoint: Path) -> Iterator[tuple[Path, int, str, dict[str, Any]]]:
    """Yield file, offset of the file's data, key and header entry of each tensor."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for key, entry in header.items():
            if key != "__metadata__":
                yield path, 8 + size, key, entry


def _copy(path: Path, start: int, size: int, out: Any) -> None:
    with open(path, "rb") as file:
        file.seek(start)
        while size:
            piece = file.read(min(size, _COPY))
            if not piece:
                raise PeerError(f"{path}: ends before its last tensor")
            out.write(piece)
            size -= len(piece)
