"""KV buffers in numpy or device memory, allocated once and updated in place. Knows nothing of engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from bridge_stg.runtime.backends.session import KVCache
from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec
from bridge_stg.runtime.device.array import DeviceArray, download
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import OutOfDeviceMemory
from bridge_stg.runtime.errors import EngineError

Buffer = TypeVar("Buffer", np.ndarray, DeviceArray)
Cache = TypeVar("Cache", bound="BufferedCache[Any]")


class BufferedCache(Generic[Buffer]):
    """The KV buffers of one batch by past name, [batch, kv_heads, capacity, head_dim] each. See `KVCache`.

    `zeros` allocates one buffer: (shape, dtype). Raises EngineError if a size is not positive, or for lack of memory.
    """

    context: DeviceContext | None = None

    def __init__(
        self, spec: CacheSpec, *, batch: int, capacity: int, zeros: Callable[[tuple[int, ...], str], Buffer]
    ) -> None:
        if batch < 1 or capacity < 1:
            message = f"a KV cache needs at least one row and one position, not {batch} rows of {capacity}"
            raise EngineError("engine.bad_cache", message)
        self.batch, self.capacity = batch, capacity
        shape = (batch, spec.kv_heads, capacity, spec.head_dim)
        try:
            self.buffers: dict[str, Buffer] = {name: zeros(shape, spec.dtype) for name in spec.past_names}
        except (MemoryError, OutOfDeviceMemory) as error:
            message = f"not enough memory for a KV cache of {batch} rows of {capacity} positions: {error}"
            raise EngineError("engine.out_of_memory", message) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def rows(self: Cache, start: int, stop: int) -> Cache:
        """Return a cache that shares the memory of some rows of this one."""
        part = copy.copy(self)
        part.batch = stop - start
        part.buffers = {name: buffer[start:stop] for name, buffer in self.buffers.items()}
        return part

    def copy_prefix(self, source: KVCache, length: int) -> None:
        """See `KVCache.copy_prefix`."""
        if not isinstance(source, type(self)) or source.context is not self.context:
            message = f"a {type(self).__name__} cannot be filled from a {type(source).__name__} of another backend"
            raise EngineError("engine.bad_cache", message)
        if source.batch not in (1, self.batch):
            message = f"{source.batch} rows of a KV cache cannot be copied into {self.batch}"
            raise EngineError("engine.bad_cache", message)
        if not 0 <= length <= min(self.capacity, source.capacity):
            message = f"{length} positions cannot be copied between KV caches of {source.capacity} and {self.capacity}"
            raise EngineError("engine.bad_cache", message)
        for name, buffer in self.buffers.items():
            other = source.buffers.get(name)
            if other is None or (other.dtype, other.shape[1::2]) != (buffer.dtype, buffer.shape[1::2]):
                message = f"KV caches of different graphs: {name} is {_found(other)} in the source"
                raise EngineError("engine.bad_cache", message)
            for row in range(self.batch):
                buffer[row, :, :length] = other[row if source.batch > 1 else 0, :, :length]

    def read(self) -> dict[str, np.ndarray]:
        """See `KVCache.read`."""
        return {name: np.array(buffer) for name, buffer in self.buffers.items()}

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """See `KVCache.write`."""
        for name, buffer in self.buffers.items():
            value = values.get(name)
            if value is None or tuple(value.shape) != buffer.shape or value.dtype != buffer.dtype:
                message = f"KV cache: {name} is {_found(value)}, expected {_found(buffer)}"
                raise EngineError("engine.bad_cache", message)
        for name, buffer in self.buffers.items():
            buffer[:] = values[name]

    def append(self, new: Mapping[str, Buffer], positions: np.ndarray) -> None:
        """Write rows [B, kv_heads, L, head_dim] by past name, row b from `positions[b]` on."""
        starts = positions.tolist()
        for name, buffer in self.buffers.items():
            rows, length = new[name], new[name].shape[2]
            if len(set(starts)) == 1:  # one copy per buffer
                buffer[:, :, starts[0] : starts[0] + length] = rows
            else:
                for b, start in enumerate(starts):
                    buffer[b, :, start : start + length] = rows[b]


def _found(array: Any) -> str:
    return "missing" if array is None else f"{array.dtype} {list(array.shape)}"


class DeviceKVCache(BufferedCache[DeviceArray]):
    """The zero-filled KV buffers of one batch on the chain's device."""

    def __init__(self, context: DeviceContext, spec: CacheSpec, *, batch: int, capacity: int) -> None:
        super().__init__(spec, batch=batch, capacity=capacity, zeros=context.zeros)
        self.context = context

    def read(self) -> dict[str, np.ndarray]:
        """See `KVCache.read`."""
        return dict(zip(self.buffers, download(list(self.buffers.values())), strict=True))


def cache_spec(graph: GraphSpec) -> CacheSpec:
    """Return a graph's cache contract. Raises EngineError if it has no KV cache."""
    if graph.cache is None:
        raise EngineError("engine.bad_cache", f"{graph}: has no KV cache, so none can be allocated.")
    return graph.cache


def own_cache(
    graph: GraphSpec, cache: KVCache | None, kind: type[Cache], context: DeviceContext | None = None
) -> Cache | None:
    """Return the cache of a call. Raises EngineError if it is of another backend or device."""
    if cache is None or (isinstance(cache, kind) and cache.context is context):
        return cache
    raise EngineError("engine.bad_cache", f"{graph}: a KV cache of type {type(cache).__name__} is another backend's.")
