"""The weights of a checkpoint folder, one tensor at a time, in whatever way the folder stores them.

One file, shards behind an index, separate files of the bridging and spatial parts, and a PEFT LoRA adapter, merged as
it is read, all look like one mapping of keys. Knows nothing of modules.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bridge_stg.checkpoint.lora import adapter_folder, deltas_and_replacements
from bridge_stg.checkpoint.safetensors_file import StoredTensor, read_header, read_tensor
from bridge_stg.runtime.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = ("bridging.safetensors", "spatial_decoder.safetensors")
"""Files that may lie beside the backbone's."""
PART_KEYS = ("bridging.", "spatial_decoder.")
"""Beginnings of the keys in them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class WeightStore(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint folder by key; iteration follows the files' order."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.folder, self._tensors = folder, dict(tensors)

    @classmethod
    def open(cls, folder: Path | str, *, key_prefixes: Mapping[str, str]) -> WeightStore:
        """Read the headers of a folder's files.

        Args:
            folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`; and, if they are apart,
                `bridging.safetensors` and `spatial_decoder.safetensors`; and a PEFT adapter, here or in `adapter/`.
            key_prefixes: beginnings of keys as published → ours; the longest that fits counts, other keys stay.

        Raises:
            CheckpointError: no weights, only pickle files, a damaged or missing file, a key in two files, or an adapter
                that cannot be merged.
        """
        folder = Path(folder)
        tensors: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            for name, tensor in read_header(path).items():
                key = our_key(name, key_prefixes)
                if key in tensors:
                    raise CheckpointError(
                        "checkpoint.duplicate_tensor",
                        f"{path} and {tensors[key].path} both hold {key}; remove it from one of them",
                    )
                if not key.endswith(".inv_freq"):  # old exports store rotary frequencies, which follow from the config
                    tensors[key] = replace(tensor, key=key)
        adapter = adapter_folder(folder)
        if adapter is not None:
            stored = read_header(adapter.weights)
            held = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
            deltas, replacements = deltas_and_replacements(
                adapter, held, tensors, lambda name: our_key(name, key_prefixes)
            )
            tensors |= {key: replace(tensor, key=key) for key, tensor in replacements.items()}
            tensors |= {key: replace(tensors[key], delta=delta) for key, delta in deltas.items()}
        return cls(folder, tensors)

    def __getitem__(self, key: str) -> StoredTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, as stored; what an adapter adds is merged and takes none."""
        return sum(tensor.length for tensor in self.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes of the backbone are stored in; small new parts may have one of their own."""
        backbone = [tensor for key, tensor in self.items() if not key.startswith(PART_KEYS)]
        sizes: Counter[torch.dtype] = Counter()
        for tensor in backbone or self.values():
            sizes[tensor.dtype] += tensor.length
        return sizes.most_common(1)[0][0]

    @property
    def files(self) -> list[Path]:
        """The files that tensors lie in, adapters included."""
        paths = dict.fromkeys(t.path for t in self.values())
        paths |= dict.fromkeys(t.delta.a.path for t in self.values() if t.delta is not None)
        return list(paths)

    def raw(self, key: str) -> bool:
        """Return whether the bytes on disk are the tensor as it is; otherwise `read` computes it."""
        return self[key].delta is None

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor in its stored dtype, an adapter's share merged in float32 and cast back.

        Raises:
            CheckpointError: the file cannot be read, or the merged values do not fit the dtype.
        """
        stored = self[key]
        value = read_tensor(stored)
        if stored.delta is not None:
            stored.delta.add_to(value, read_tensor(stored.delta.a), read_tensor(stored.delta.b))
            if not torch.isfinite(value).all():
                raise CheckpointError(
                    "checkpoint.not_finite", f"{stored.delta.a.path}: merged, {key} is not finite in {stored.dtype}"
                )
        return value


def our_key(name: str, prefixes: Mapping[str, str]) -> str:
    """Return a published key in this project's spelling."""
    for prefix in sorted(prefixes, key=len, reverse=True):
        if name.startswith(prefix):
            return prefixes[prefix] + name[len(prefix) :]
    return name


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a folder's model, adapters apart.

    Raises:
        CheckpointError: there are none, or one that the index names is missing or does not hold what it should.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError("checkpoint.not_found", f"{folder}: {found}; expected a folder with {WEIGHTS} or {INDEX}")
    parts = [folder / name for name in PARTS if (folder / name).is_file()]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS, *parts]
    if (folder / INDEX).is_file():
        return [*shards(folder / INDEX), *parts]
    raise CheckpointError(
        "checkpoint.missing_file", f"{folder / WEIGHTS}: no such file, nor {INDEX}{pickle_hint(folder)}"
    )


def shards(index: Path) -> list[Path]:
    """Return the files that an index names, in the order of their names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, set[str]] = {}
        for key, name in places.items():
            by_file.setdefault(str(name), set()).add(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "checkpoint.bad_index", f"{index}: expected a JSON object with a 'weight_map' of key to file ({error})"
        ) from None
    paths = []
    for name, keys in sorted(by_file.items()):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            problem = "is not in this folder" if Path(name).name == name else "is not a plain file name"
            raise CheckpointError(
                "checkpoint.missing_file", f"{index}: names {name!r}, which {problem}; download the whole checkpoint"
            )
        missing = sorted(keys - set(read_header(path)))
        if missing:
            raise CheckpointError(
                "checkpoint.missing_tensor", f"{path}: misses {list_keys(missing)}, which {index.name} says it holds"
            )
        paths.append(path)
    return paths


def pickle_hint(folder: Path) -> str:
    """Return what to do about the pickle files of a folder, empty if there are none."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name != "training_args.bin")
    if not pickles:
        return ""
    convert = (
        'python -c "import sys, torch; from safetensors.torch import save_file; w = {}; '
        "[w.update(torch.load(p, map_location='cpu', weights_only=True)) for p in sys.argv[2:]]; "
        "save_file({k: v.clone() for k, v in w.items()}, sys.argv[1], {'format': 'pt'})\" model.safetensors "
    )
    return (
        f" (found {pickles[0]}, but pickle files are never read, since they can run any program. Convert them in a "
        f"place that you trust, inside that folder: {convert}{' '.join(pickles)})"
    )


def list_keys(keys: list[str]) -> str:
    """Return the first three keys and how many more there are."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
