"""The weights of a checkpoint folder as one mapping by key, read one tensor at a time.

A folder may contain one file, or shards and an index; separate files of the bridging and spatial parts; and a PEFT LoRA
adapter, which is merged while reading. Must not know modules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bridge_stg.checkpoint.lora import EMBEDDING, HEAD, LoraDelta, deltas_and_replacements, find_adapter
from bridge_stg.checkpoint.safetensors_file import StoredTensor, read_header, read_tensor, rename_key, same_bytes
from bridge_stg.model.config import MODEL_TYPE
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host.parse import parse_json_file

WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
PART_FILES = ("bridging.safetensors", "spatial_decoder.safetensors")
"""Optional files of the bridging and spatial parts."""
PART_KEYS = ("bridging.", "spatial_decoder.")
"""Prefixes of the keys in them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class WeightStore(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint folder by key, in the order of the files.

    `tied` is whether the head is the embedding table, and therefore left out.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor], *, tied: bool) -> None:
        self.folder, self.tied, self._tensors = folder, tied, dict(tensors)

    @classmethod
    def open(
        cls, folder: Path | str, *, key_prefixes: Mapping[str, str], tied: bool = False,
        adapter: Path | str | None = None,
    ) -> WeightStore:  # fmt: skip
        """Read the headers of a folder's files.

        Args:
            folder: folder with `model.safetensors`, or shards and `model.safetensors.index.json`; optionally with
                `bridging.safetensors`, `spatial_decoder.safetensors` and a PEFT adapter; see `find_adapter`.
            key_prefixes: see `Backbone.key_prefixes`.
            tied: whether the config ties the head to the embedding table. An adapter that changes one of the two
                unties them, as peft does.
            adapter: name or path of the adapter; None: the only one in the folder, if any.

        Raises:
            CheckpointError: weights are missing, damaged or pickled, a key is in two files, a tied head differs from
                the table, or the adapter cannot be merged.
        """
        folder = Path(folder)
        tensors: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            for name, tensor in read_header(path).items():
                key = rename_key(name, key_prefixes)
                if key in tensors:
                    message = f"{path} and {tensors[key].path} both contain {key}; remove it from one of them"
                    raise CheckpointError("checkpoint.duplicate_tensor", message)
                if not key.endswith(".inv_freq"):  # old exports store rotary frequencies, which follow from the config
                    tensors[key] = replace(tensor, key=key)
        tied = tied and EMBEDDING in tensors
        if tied:
            table = tensors[EMBEDDING]
            if not same_values(tensors.get(HEAD, table), table):
                message = f"{tensors[HEAD].path}: {HEAD} differs from the embedding table, but config.json ties the two"
                hint = 'set "tie_word_embeddings" to false in it, or remove the tensor'
                raise CheckpointError("checkpoint.tied_head", f"{message}; {hint}")
            tensors[HEAD] = replace(table, key=HEAD)
        if (found := find_adapter(folder, adapter)) is not None:
            stored = read_header(found.weights)
            held = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
            deltas, replacements = deltas_and_replacements(found, held, tensors, key_prefixes, tied=tied)
            tensors |= {key: replace(tensor, key=key) for key, tensor in replacements.items()}
            tensors |= {key: replace(tensors[key], delta=delta) for key, delta in deltas.items()}
        if tied and (tied := same_values(tensors[HEAD], tensors[EMBEDDING])):
            del tensors[HEAD]
        return cls(folder, tensors, tied=tied)

    def __getitem__(self, key: str) -> StoredTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most bytes of the backbone; the bridging and spatial parts may have another."""
        backbone = [tensor for key, tensor in self.items() if not key.startswith(PART_KEYS)]
        sizes: Counter[torch.dtype] = Counter()
        for tensor in backbone or self.values():
            sizes[tensor.dtype] += tensor.length
        return sizes.most_common(1)[0][0]

    @property
    def files(self) -> list[Path]:
        """All files with tensors, including an adapter's."""
        paths = dict.fromkeys(t.path for t in self.values())
        paths |= dict.fromkeys(t.delta.a.path for t in self.values() if t.delta is not None)
        return list(paths)

    def raw(self, key: str) -> bool:
        """Return whether the stored bytes are the tensor, with no adapter to merge."""
        return self[key].delta is None

    def read(self, key: str) -> torch.Tensor:
        """Read a tensor in its stored dtype; an adapter is merged in float32 and cast back.

        Raises:
            CheckpointError: the file cannot be read, or the merged values do not fit the dtype.
        """
        stored = self[key]
        value = read_tensor(stored)
        if stored.delta is not None:
            stored.delta.add_to(value, read_tensor(stored.delta.a), read_tensor(stored.delta.b))
            if not torch.isfinite(value).all():
                message = f"{stored.delta.a.path}: {key} is not finite in {stored.dtype} after merging"
                raise CheckpointError("checkpoint.not_finite", message)
        return value


def same_values(head: StoredTensor, table: StoredTensor) -> bool:
    """Return whether a head equals the embedding table; `ensure_weight_tying` gives both the same delta."""
    if (head.path, head.offset) != (table.path, table.offset) and not same_bytes(head, table):
        return False
    first, second = head.delta, table.delta
    if not isinstance(first, LoraDelta) or not isinstance(second, LoraDelta):
        return first is second
    pairs = ((first.a, second.b), (first.b, second.a))
    return first.scale == second.scale and all(torch.equal(read_tensor(a), read_tensor(b).T) for a, b in pairs)


def check_folder(folder: Path, expected: str = f"a checkpoint with config.json, {WEIGHTS} and {TOKENIZER}") -> None:
    """Raise CheckpointError if a path is not a folder."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder, and nothing is downloaded"
        raise CheckpointError("checkpoint.not_found", f"{folder}: {found}; expected the folder of {expected}")


def require_new(out: Path, *, source: Path, overwrite: bool = False) -> None:
    """Check that a checkpoint made from the folder `source` may be put at `out`.

    Raises:
        CheckpointError: `output.exists`: `out` exists, and `overwrite` is not set or it is not a checkpoint of this
            project; `output.is_input`: the source is in it.
    """
    if not os.path.lexists(out) and out.name not in ("", ".."):
        return
    if not overwrite:
        message = f"{out} already exists. Pass --overwrite to replace it, or another --out."
        raise CheckpointError("output.exists", message)
    try:
        kind = parse_json_file(out / "config.json").get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != MODEL_TYPE or out.is_symlink():
        message = f"{out} is not a checkpoint of this project; only a checkpoint is replaced. Choose another --out."
        raise CheckpointError("output.exists", message)
    if source.resolve().is_relative_to(out.resolve()):
        raise CheckpointError("output.is_input", f"{source} is in {out}, which is to be replaced; choose another --out")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder's model, without adapters; raise if one is missing."""
    check_folder(folder)
    parts = [folder / name for name in PART_FILES if (folder / name).is_file()]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS, *parts]
    if (folder / INDEX).is_file():
        return [*shards(folder / INDEX), *parts]
    message = f"{folder / WEIGHTS}: no such file, nor {INDEX}{pickle_hint(folder)}"
    raise CheckpointError("checkpoint.missing_file", message)


def shards(index: Path) -> list[Path]:
    """Return the files of an index, sorted. Raises CheckpointError if the index is invalid or one is missing."""
    try:
        places = parse_json_file(index)["weight_map"]
        by_file: dict[str, set[str]] = {}
        for key, name in places.items():
            by_file.setdefault(str(name), set()).add(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{index}: expected a JSON object with a 'weight_map' of key to file ({error})"
        raise CheckpointError("checkpoint.bad_index", message) from None
    paths = []
    for name, keys in sorted(by_file.items()):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            problem = "is not in this folder" if Path(name).name == name else "is not a plain file name"
            message = f"{index}: names {name!r}, which {problem}; download the whole checkpoint"
            raise CheckpointError("checkpoint.missing_file", message)
        missing = sorted(keys - set(read_header(path)))
        if missing:
            message = f"{path}: lacks {list_keys(missing)}, which {index.name} expects there"
            raise CheckpointError("checkpoint.missing_tensor", message)
        paths.append(path)
    return paths


def pickle_hint(folder: Path) -> str:
    """Return how to convert the pickle files of a folder; empty without any."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name != "training_args.bin")
    if not pickles:
        return ""
    convert = (
        'python -c "import sys, torch; from safetensors.torch import save_file; w = {}; '
        "[w.update(torch.load(p, map_location='cpu', weights_only=True)) for p in sys.argv[2:]]; "
        "save_file({k: v.clone() for k, v in w.items()}, sys.argv[1], {'format': 'pt'})\" model.safetensors "
    )
    return (
        f" (found {pickles[0]}, but pickle files are never read, since they can run any program. On a machine that may "
        f"run them, convert them in that folder: {convert}{' '.join(pickles)})"
    )


def list_keys(keys: list[str]) -> str:
    """Format the first three keys and the number of others."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
