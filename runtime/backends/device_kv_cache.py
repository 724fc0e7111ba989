"""KV buffers in device memory, allocated once: bound as past and present, or appended to by the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, rows_to_fill
from bridge_stg.runtime.bundle.manifest import CacheSpec
from bridge_stg.runtime.device.array import DeviceArray, download
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import OutOfDeviceMemory
from bridge_stg.runtime.errors import EngineError


class DeviceKVCache:
    """The KV buffers of one batch, [batch, kv_heads, capacity, head_dim] each, zero-filled. See `session.KVCache`."""

    def __init__(self, context: DeviceContext, spec: CacheSpec, *, batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            message = f"a KV cache needs at least one row and one position, not {batch} rows of {capacity}"
            raise EngineError("engine.bad_cache", message)
        self.context, self.batch, self.capacity = context, batch, capacity
        shape = (batch, spec.kv_heads, capacity, spec.head_dim)
        try:
            self.buffers: dict[str, DeviceArray] = {name: context.zeros(shape, spec.dtype) for name in spec.past_names}
        except OutOfDeviceMemory as error:
            message = f"no memory for a KV cache of {batch} rows of {capacity} positions: {error}"
            raise EngineError("engine.out_of_memory", message) from error
        self._heads = spec.kv_heads
        self._position_bytes = spec.head_dim * np.dtype(spec.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def copy_prefix(self, source: KVCache, length: int, rows: Sequence[int] | None = None) -> None:
        """See `KVCache.copy_prefix`."""
        if not isinstance(source, DeviceKVCache) or source.context is not self.context:
            message = f"a KV cache on this device cannot be filled from another device's {type(source).__name__}"
            raise EngineError("engine.bad_cache", message)
        chosen = rows_to_fill(self, source, length, rows)
        for name, buffer in self.buffers.items():
            other = source.buffers.get(name)
            if other is None or (other.dtype, other.shape[1::2]) != (buffer.dtype, buffer.shape[1::2]):
                found = "missing" if other is None else f"{other.dtype} {list(other.shape)}"
                message = f"KV caches of different graphs: {name} is {found} in the source"
                raise EngineError("engine.bad_cache", message)
            for i, row in enumerate(chosen):
                origin = i if source.batch > 1 else 0
                self._copy_positions(other[origin : origin + 1], buffer[row : row + 1], length)

    def read(self) -> dict[str, np.ndarray]:
        """See `KVCache.read`."""
        return dict(zip(self.buffers, download(list(self.buffers.values())), strict=True))

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """See `KVCache.write`."""
        for name, buffer in self.buffers.items():
            value = values.get(name)
            if value is None or tuple(value.shape) != buffer.shape or value.dtype != buffer.dtype:
                found = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
                message = f"KV cache: {name} is {found}, expected {buffer.dtype} {list(buffer.shape)}"
                raise EngineError("engine.bad_cache", message)
        for name, buffer in self.buffers.items():
            buffer.write(values[name])

    def append(self, new: Mapping[str, DeviceArray], positions: np.ndarray) -> None:
        """Write rows [B, kv_heads, L, head_dim] by past name, row b from `positions[b]` on, in stream order."""
        together = len(set(positions.tolist())) == 1  # one copy per buffer, else one per row
        for name, buffer in self.buffers.items():
            rows, length = new[name], new[name].shape[2]
            if together:
                self._copy_positions(rows, buffer[:, :, int(positions[0]) :], length)
            else:
                for b, start in enumerate(positions.tolist()):
                    self._copy_positions(rows[b : b + 1], buffer[b : b + 1, :, start:], length)

    def _copy_positions(self, source: DeviceArray, target: DeviceArray, length: int) -> None:
        """Copy the first `length` positions of every head between views [rows, kv_heads, …] of two caches."""
        context, width = self.context, length * self._position_bytes
        with context.lock:
            context.cuda.copy_rows(
                (target.address, target.strides[1]),
                (source.address, source.strides[1]),
                width,
                len(target) * self._heads,
                kind=context.cuda.on_device,
                stream=context.stream,
            )
