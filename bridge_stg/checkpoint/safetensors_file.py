"""Read and write single tensors of safetensors files. Must not know models.

Files are read, not mapped, since mapped pages count as memory of the process. The format is the length of the header in
8 bytes, a JSON header, and the data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from bridge_stg.runtime.bundle.manifest import Bytes
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host.parse import parse_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LARGEST_HEADER = 100_000_000
"""Largest header in bytes that the safetensors library accepts."""
BLOCK_BYTES = 1 << 24


class Delta(Protocol):
    """A low-rank change of a tensor, with stored factors A and B; see `lora.LoraDelta`."""

    a: StoredTensor
    b: StoredTensor

    def add_to(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add the delta to a weight in place, given the values of A and B."""


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor in a safetensors file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # also that of a merged tensor
    path: Path
    offset: int  # first byte in the file
    length: int  # bytes
    delta: Delta | None = None  # change by an adapter


@dataclass(frozen=True)
class Entry:
    """One tensor in the header of a file; the offsets count from the header's end."""

    dtype: str
    shape: tuple[Bytes, ...]
    data_offsets: tuple[Bytes, Bytes]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file in the order of the data; raise CheckpointError if it is damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise ValueError("it is a Git LFS pointer; `git lfs pull` replaces it with the weights")
            length = int.from_bytes(start, "little")
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header should have {length:,} bytes, the file has {size:,}")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = from_json(Mapping[str, Entry], header)  # type: ignore[type-abstract]
        tensors = [stored_tensor(name, entry, path, 8 + length, size) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.length))
        for one, after in itertools.pairwise(tensors):
            if one.offset + one.length > after.offset:
                raise ValueError(f"{one.key} and {after.key} overlap")
    except (OSError, ValueError) as error:
        raise CheckpointError("checkpoint.damaged", f"{path}: is not a complete safetensors file ({error})") from error
    return {tensor.key: tensor for tensor in tensors}


def stored_tensor(name: str, entry: Entry, path: Path, start: int, size: int) -> StoredTensor:
    """Return one entry of a header; raise ValueError if its numbers contradict each other or the file."""
    if entry.dtype not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {entry.dtype!r}")
    dtype, shape, (first, last) = DTYPES[entry.dtype], entry.shape, entry.data_offsets
    if first > last or start + last > size:
        raise ValueError(f"{name} ends at byte {start + last:,}, the file at {size:,}")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {list(shape)} has {last - first:,} bytes")
    return StoredTensor(key=name, shape=shape, dtype=dtype, path=path, offset=start + first, length=last - first)


def rename_key(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the longest matching prefix of a key."""
    for prefix in sorted(prefixes, key=len, reverse=True):
        if name.startswith(prefix):
            return prefixes[prefix] + name[len(prefix) :]
    return name


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read a stored tensor, without merging an adapter. Raises CheckpointError if the file is damaged."""
    if not stored.length:
        return torch.empty(stored.shape, dtype=stored.dtype)
    buffer = bytearray(stored.length)
    try:
        with open(stored.path, "rb") as file:
            file.seek(stored.offset)
            if (count := file.readinto(buffer)) < stored.length:
                raise OSError(f"the file ends {stored.length - count:,} bytes too early")
    except OSError as error:
        raise CheckpointError("checkpoint.damaged", f"{stored.path}: {stored.key} cannot be read ({error})") from error
    return torch.frombuffer(buffer, dtype=stored.dtype).reshape(stored.shape)


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two tensors have equal bytes on disk, reading both in blocks; adapters are ignored."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open(first.path, "rb") as one, open(second.path, "rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        for start in range(0, first.length, BLOCK_BYTES):
            count = min(BLOCK_BYTES, first.length - start)
            if one.read(count) != other.read(count):
                return False
    return True


def write_safetensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], torch.Tensor]
) -> None:
    """Write a safetensors file with one tensor in memory at a time: `read` returns that of a key of `layout`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in layout.items():
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, (dtype, shape) in layout.items():
            value = read(key)
            if (value.dtype, tuple(value.shape)) != (dtype, shape):
                raise ValueError(f"{key}: {value.dtype} {list(value.shape)} does not match the layout")
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def save_file(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory, with metadata. Raises OSError, which names the file."""
    try:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, dict(metadata))
    except safetensors.SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
