"""KV buffers in device memory: bound as past and present, or appended to by the session."""

from __future__ import annotations

import numpy as np

from bridge_stg.runtime.backends.kv_cache import BufferedCache
from bridge_stg.runtime.bundle.manifest import CacheSpec
from bridge_stg.runtime.device.array import DeviceArray, download
from bridge_stg.runtime.device.context import DeviceContext


class DeviceKVCache(BufferedCache[DeviceArray]):
    """The zero-filled KV buffers of one batch on the chain's device."""

    def __init__(self, context: DeviceContext, spec: CacheSpec, *, batch: int, capacity: int) -> None:
        super().__init__(spec, batch=batch, capacity=capacity, zeros=context.zeros)
        self.context = context

    def read(self) -> dict[str, np.ndarray]:
        """See `KVCache.read`."""
        return dict(zip(self.buffers, download(list(self.buffers.values())), strict=True))
