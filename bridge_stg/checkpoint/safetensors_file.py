"""Read and write single tensors of safetensors files. Must not know models.

Files are read, not mapped, since mapped pages count as memory of the process. The format: the header's length in
8 bytes, a JSON header, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bridge_stg.runtime.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LARGEST_HEADER = 100_000_000
"""Bytes, as in the format's own readers."""
BLOCK_BYTES = 1 << 24


class Delta(Protocol):
    """What an adapter adds to a tensor; see `lora.LoraDelta`."""

    @property
    def a(self) -> StoredTensor:
        """The stored factor A."""

    @property
    def b(self) -> StoredTensor:
        """The stored factor B."""

    def add_to(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add the delta to a weight in place, given the values of A and B."""


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor in a safetensors file.

    Attributes:
        key: key in this project's spelling.
        shape: stored shape.
        dtype: stored dtype, also that of a merged tensor.
        path: the file.
        offset: first byte of the tensor in the file.
        length: size in bytes.
        delta: what an adapter adds to the tensor, or None.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    offset: int
    length: int
    delta: Delta | None = None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, in the order of the data.

    Raises:
        CheckpointError: the file is damaged or cut short, or holds a dtype that is not known.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header should have {length:,} bytes, the file has {size:,}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        tensors = [stored_tensor(name, values, path, 8 + length, size)
                   for name, values in header.items() if name != "__metadata__"]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("checkpoint.damaged", f"{path}: is not a whole safetensors file ({error})") from error
    return {tensor.key: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def stored_tensor(name: str, values: Mapping[str, Any], path: Path, start: int, size: int) -> StoredTensor:
    """Return one entry of a header; raises ValueError where its numbers do not agree with each other or the file."""
    if values["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {values['dtype']!r}")
    dtype, shape = DTYPES[values["dtype"]], tuple(int(n) for n in values["shape"])
    first, last = (int(n) for n in values["data_offsets"])
    if not 0 <= first <= last or start + last > size:
        raise ValueError(f"{name} ends at byte {start + last:,}, the file at {size:,}")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {list(shape)} has {last - first:,} bytes")
    return StoredTensor(key=name, shape=shape, dtype=dtype, path=path, offset=start + first, length=last - first)


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Return a tensor as it is stored, without what an adapter adds."""
    if not stored.length:
        return torch.empty(stored.shape, dtype=stored.dtype)
    buffer = bytearray(stored.length)
    try:
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.offset)
            view, done = memoryview(buffer), 0
            while done < stored.length:  # one call reads 2 GiB at most
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(f"ends {stored.length - done:,} bytes too early")
                done += count
    except OSError as error:
        raise CheckpointError("checkpoint.damaged", f"{stored.path}: {stored.key} cannot be read ({error})") from error
    return torch.frombuffer(buffer, dtype=stored.dtype).reshape(stored.shape)


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two tensors are stored alike, reading both a block at a time; adapters do not count."""
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
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        path: the file, made or replaced.
        layout: dtype and shape of every tensor, in the order of writing.
        read: returns the tensor of a key, as the layout says.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in layout.items():
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, (dtype, shape) in layout.items():
            value = read(key)
            if (value.dtype, tuple(value.shape)) != (dtype, shape):
                raise ValueError(f"{key}: {value.dtype} {list(value.shape)} is not what the layout says")
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
