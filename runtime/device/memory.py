"""Blocks of device memory and of pinned host memory that are allocated once and reused.

A block without references may still be in use by earlier work on the chain's stream. Only later work on the same stream
reuses it, so the order of the stream separates both without waiting.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from bridge_stg.runtime.device.cuda import OutOfDeviceMemory

ALIGNMENT = 256
"""Alignment in bytes that TensorRT needs of every tensor's address."""


class Block:
    """Memory of a pool, returned to it when the last array that uses it is gone.

    `wait_before_reuse` is set for memory that other libraries use, on streams that the pool does not know.
    """

    def __init__(self, pool: MemoryPool, address: int, size: int) -> None:
        self._pool, self.address, self.size = pool, address, size
        self.wait_before_reuse = False

    def __del__(self) -> None:
        # May run at any time in any thread, so it must not call CUDA.
        self._pool.give(self.address, self.size, self.wait_before_reuse)


class MemoryPool:
    """Blocks of one kind of memory; safe to use from many threads. `wait` waits for all work on the device."""

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], object], wait: Callable[[], object]):
        self._allocate, self._free, self._wait = allocate, free, wait
        self._lock = threading.Lock()
        self._unused: dict[int, list[tuple[int, bool]]] = {}
        self._returned: deque[tuple[int, int, bool]] = deque()
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> Block:
        """Return an uninitialized block of at least `size` bytes.

        Raises:
            OutOfDeviceMemory: it does not fit, even after the unused blocks were freed.
        """
        size = size_class(size)
        with self._lock:
            self._sort_in()
            unused = self._unused.get(size)
            address, lent = unused.pop() if unused else (0, False)
        if lent:
            self._wait()
        return Block(self, address or self._fresh(size), size)

    def give(self, address: int, size: int, lent: bool) -> None:
        """Take a block back. Takes no lock: finalizers call it, possibly while this thread holds the lock."""
        self._returned.append((address, size, lent))

    @property
    def unused_bytes(self) -> int:
        """Bytes of blocks that wait to be used again."""
        with self._lock:
            self._sort_in()
            return sum(size * len(blocks) for size, blocks in self._unused.items())

    def close(self) -> None:
        """Free all memory, including blocks in use. The device must have finished."""
        with self._lock:
            addresses, self._sizes = list(self._sizes), {}
            self._unused.clear()
            self._returned.clear()
        for address in addresses:
            self._free(address)

    def _fresh(self, size: int) -> int:
        try:
            address = self._allocate(size)
        except OutOfDeviceMemory:
            self._free_unused()
            address = self._allocate(size)
        with self._lock:
            self._sizes[address] = size
        return address

    def _sort_in(self) -> None:
        while self._returned:
            address, size, lent = self._returned.popleft()
            if address in self._sizes:
                self._unused.setdefault(size, []).append((address, lent))

    def _free_unused(self) -> None:
        self._wait()
        with self._lock:
            self._sort_in()
            addresses = [address for blocks in self._unused.values() for address, _ in blocks]
            self._unused.clear()
            for address in addresses:
                del self._sizes[address]
        for address in addresses:
            self._free(address)


def size_class(size: int) -> int:
    """Round a size up, by at most 1/8 (and to at least 4 KiB), so that blocks of similar sizes can be reused."""
    step = max(4096, 1 << max(0, size.bit_length() - 4))
    return max(step, -(-size // step) * step)


def host_view(block: Block, size: int, offset: int = 0) -> np.ndarray:
    """Return bytes of a pinned block as an array uint8 [size]; it must not outlive the block."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(block.address + offset))
