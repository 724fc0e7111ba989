"""The device of one chain: a stream for its work, a second stream for uploads, and their memory.

All graphs of a chain share one context, so a graph reads what another one computed in place, in the order of the
stream and without waiting for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from bridge_stg.runtime.device.array import DeviceArray, HostResize
from bridge_stg.runtime.device.cuda import Cuda
from bridge_stg.runtime.device.memory import Block, MemoryPool, host_view
from bridge_stg.runtime.device.resize import DeviceResizer
from bridge_stg.runtime.errors import EngineError


class DeviceContext:
    """Shared by the sessions of a chain; freed when the last of them is closed. Safe to use from many threads.

    Attributes:
        stream: handle of the stream of all computation.
        uploads: handle of the stream on which inputs are uploaded in parallel.
        lock: to be held while putting work on the streams.
        device: name and properties of the device.
    """

    def __init__(self, cuda: Cuda | None = None) -> None:
        self.cuda = cuda or Cuda()
        self.device = self.cuda.facts()
        self.stream, self.uploads = self.cuda.stream(), self.cuda.stream()
        self.lock = threading.RLock()
        wait = partial(self.cuda, "cudaDeviceSynchronize")
        self.memory = MemoryPool(self.cuda.malloc, partial(self.cuda, "cudaFree"), wait)
        self.pinned = MemoryPool(self.cuda.malloc_host, partial(self.cuda, "cudaFreeHost"), wait)
        self.scratch: Block | None = None
        self._resizer: DeviceResizer | None = None
        self._kept: deque[tuple[Any, object]] = deque()
        self._users = 0
        self.closed = False

    def open(self) -> DeviceContext:
        """Count one more user."""
        self._check_open()
        self._users += 1
        return self

    def close(self) -> None:
        """Release one user; the last one waits for the running work and frees everything."""
        with self.lock:
            self._users -= 1
            if self._users > 0 or self.closed:
                return
            self.closed = True
            self.cuda("cudaDeviceSynchronize")
            while self._kept:
                self.cuda("cudaEventDestroy", self._kept.popleft()[0])
            self.scratch = self._resizer = None
            self.memory.close()
            self.pinned.close()
            for stream in (self.stream, self.uploads):
                self.cuda("cudaStreamDestroy", stream)

    @property
    def free_bytes(self) -> int:
        """Bytes of the device's memory that are free, or unused by this context's pool."""
        return int(self.cuda("cudaMemGetInfo")) + self.memory.unused_bytes

    def empty(self, shape: Sequence[int], dtype: np.dtype | type | str) -> DeviceArray:
        """Return an uninitialized array."""
        self._check_open()
        shape, dtype = tuple(int(size) for size in shape), np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return DeviceArray(self, self.memory.take(size), shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: np.dtype | type | str) -> DeviceArray:
        """Return an array of zeros."""
        array = self.empty(shape, dtype)
        if array.nbytes:
            with self.lock:
                self.cuda("cudaMemsetAsync", array.address, 0, array.nbytes, self.stream)
        return array

    def upload(self, array: np.ndarray) -> DeviceArray:
        """Return a copy of a host array on the device."""
        made = self.empty(array.shape, array.dtype)
        made.write(array)
        return made

    def pin(self, array: np.ndarray) -> Block:
        """Return a copy of a host array in pinned memory, to be kept until it has been uploaded."""
        block = self.pinned.take(array.nbytes)
        np.copyto(host_view(block, array.nbytes).view(array.dtype).reshape(array.shape), array)
        return block

    @property
    def resizer(self) -> DeviceResizer:
        """The resizer of images on this device, compiled at first use."""
        with self.lock:
            self._resizer = self._resizer or DeviceResizer(self)
            return self._resizer

    def resize(self, image: DeviceArray, size: tuple[int, int], on_host: HostResize) -> DeviceArray:
        """See `DeviceResizer.resize`."""
        return self.resizer.resize(image, size, on_host)

    def keep_alive(self, *objects: object) -> None:
        """Keep objects alive until the work that is on the stream now is done."""
        with self.lock:
            while self._kept and self.cuda.api.cudaEventQuery(self._kept[0][0])[0] == self.cuda.success:
                self.cuda("cudaEventDestroy", self._kept.popleft()[0])
            event = self.cuda.event()
            self.cuda("cudaEventRecord", event, self.stream)
            self._kept.append((event, objects))

    def reserve_scratch(self, size: int) -> Block:
        """Return memory of at least `size` bytes for the activations of all engines of the chain in turn.

        Only one of them runs at a time, since they share one stream. Growing waits for the running work.
        """
        with self.lock:
            if self.scratch is None or self.scratch.size < size:
                self.cuda("cudaStreamSynchronize", self.stream)
                self.scratch = None
                self.scratch = self.memory.take(size)
            return self.scratch

    def _check_open(self) -> None:
        if self.closed:
            message = "this device context is closed, with the sessions that shared it; load the bundle again"
            raise EngineError("engine.closed", message)
