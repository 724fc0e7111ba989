"""Copy weights from a checkpoint to a graph's external data: read, cast and written once, some rows at a time.

All variants of a graph share one file of external data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from bridge_stg.checkpoint.safetensors_file import StoredTensor
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.graph.weight_file import WeightFile
from bridge_stg.runtime.errors import CheckpointError

INLINE_BYTES = 256
"""Smaller tensors stay in the .onnx file, as do integers: engines need shapes and indices at once."""

BLOCK_BYTES = 32 * 2**20
"""Stored bytes that are read and cast at a time."""

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16,
}  # fmt: skip


class StoredWeight(ir.LazyTensor):  # type: ignore[misc]  # onnx_ir is not typed
    """A weight of a graph whose values are read from a checkpoint on use, and cast to the graph's dtype.

    The checkpoint's shape may be another view of the same values.
    """

    def __init__(self, store: WeightStore, key: str, *, dtype: ir.DataType, shape: Sequence[int]) -> None:
        super().__init__(self._read, dtype, ir.Shape(shape), name=key)
        self.store, self.key = store, key

    def reshaped(self, shape: Sequence[int]) -> StoredWeight:
        """Return the same values in another shape."""
        return StoredWeight(self.store, self.key, dtype=self.dtype, shape=shape)

    def cast(self, dtype: ir.DataType) -> StoredWeight:
        """Return the same weight in another dtype."""
        return StoredWeight(self.store, self.key, dtype=dtype, shape=[int(size) for size in self.shape])

    def pieces(self) -> Iterator[memoryview]:
        """Yield the values' bytes, some rows at a time; raise CheckpointError if a value does not fit the dtype."""
        dtype = TORCH_DTYPES[self.dtype]
        for block in row_blocks(self.store, self.key):
            cast = block.to(dtype)
            if cast.numel() and not torch.isfinite(torch.stack(cast.aminmax())).all():  # NaN is passed on
                raise _overflow(self.store[self.key], block, dtype)
            yield cast.contiguous().flatten().view(torch.uint8).numpy().data

    def _read(self) -> ir.TensorProtocol:
        """Return the whole tensor, for passes that need the values of small weights."""
        values = np.frombuffer(b"".join(self.pieces()), self.dtype.numpy())
        return ir.tensor(values.reshape([int(size) for size in self.shape]), dtype=self.dtype, name=self.key)


def row_blocks(
    store: WeightStore, key: str, *, block_bytes: int | None = None, buffer: bytearray | None = None
) -> Iterator[torch.Tensor]:
    """Yield a weight's rows in their stored dtype, in blocks of at most `block_bytes` (default `BLOCK_BYTES`).

    A weight with an adapter is one block. With a `buffer`, blocks that fit are read into it, and are only valid until
    the next one. Raises CheckpointError if the file cannot be read.
    """
    stored = store[key]
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, (block_bytes or BLOCK_BYTES) * rows // max(stored.length, 1))
    if not store.raw(key) or (step >= rows and buffer is None):
        yield store.read(key)
        return
    row_bytes = stored.length // max(rows, 1)
    with open(stored.path, "rb", buffering=0) as file:
        file.seek(stored.offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            size = count * row_bytes
            memory = bytearray(size) if buffer is None or len(buffer) < size else memoryview(buffer)[:size]
            _fill(memory, file, key)
            yield torch.frombuffer(memory, dtype=stored.dtype).reshape(count, *stored.shape[1:])


def read_rows(store: WeightStore, key: str, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows of a weight in its stored dtype. Raises CheckpointError if the file cannot be read."""
    stored = store[key]
    if not store.raw(key):
        return store.read(key)[list(rows)]
    row_bytes = stored.length // stored.shape[0]
    buffer = bytearray(len(rows) * row_bytes)
    with open(stored.path, "rb", buffering=0) as file:
        for index, row in enumerate(rows):
            file.seek(stored.offset + row * row_bytes)
            _fill(memoryview(buffer)[index * row_bytes : (index + 1) * row_bytes], file, key)
    return torch.frombuffer(buffer, dtype=stored.dtype).reshape(len(rows), *stored.shape[1:])


def _fill(memory: bytearray | memoryview, file: io.FileIO, key: str) -> None:
    if file.readinto(memory) != len(memory):
        raise CheckpointError("checkpoint.damaged", f"{file.name}: the file ends before the end of {key}")


def write_weights(models: Sequence[ir.Model], file: Path) -> None:
    """Move the weights of several variants of a graph into one file; equal bytes are written once.

    The graphs refer to the file by its name, so their .onnx files must be saved next to it. Raises CheckpointError if a
    weight cannot be read, or does not fit its dtype.
    """
    known: dict[tuple[str, str], ir.ExternalTensor] = {}
    with WeightFile(file) as weights:
        for model in models:
            for name, value in sorted(model.graph.initializers.items()):
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE_BYTES or not tensor.dtype.is_floating_point():
                    continue
                if not isinstance(tensor, StoredWeight):
                    value.const_value = weights.write(name, tensor.dtype, tensor.shape, [tensor.tobytes()])
                    continue
                source = tensor.key, tensor.dtype.name  # equal weights of two graphs are found without reading them
                if source not in known:
                    known[source] = weights.write(name, tensor.dtype, tensor.shape, tensor.pieces())
                value.const_value = weights.alias(known[source], name, tensor.shape)


def _overflow(stored: StoredTensor, block: torch.Tensor, dtype: torch.dtype) -> CheckpointError:
    values, where = block.float(), f"{stored.path}: {stored.key}"
    if not torch.isfinite(values).all():
        return CheckpointError("checkpoint.not_finite", f"{where} has values that are not finite")
    found, most = float(values.abs().max()), torch.finfo(dtype).max
    name = "fp16" if dtype == torch.float16 else "bf16"
    message = f"{where} has the value {found:.3g}, above {most:.3g} of {name}; export with --dtype bf16 or --dtype fp32"
    return CheckpointError("checkpoint.not_finite", message)
