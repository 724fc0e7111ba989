"""Fake of `cuda.bindings.runtime` without a device: memory and copies on fake streams.

Device addresses are not valid in this process. New memory is filled with NaN; use of freed memory, copies out of bounds
and copies from pageable memory raise AssertionError.
"""

from __future__ import annotations

import bisect
import ctypes
import enum
import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.fakes.streams import OK, FakeStreams, cudaError_t, cudaStreamCaptureMode


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


DEVICE_BASE = 0x7E00_0000_0000


class FakeCuda(FakeStreams):
    """Fake module. Breaking CUDA's rules raises AssertionError, which the runtime never catches.

    Args:
        eager: see `FakeStreams`.
        memory: memory of the device in bytes.
        sm: compute capability of the device.
        addressable: whether device addresses are valid in this process, for an engine that computes on the CPU.
    """

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaHostAllocDefault = 0

    def __init__(
        self,
        *,
        eager: tuple[int, ...] = (),
        memory: int = 2**32,
        sm: tuple[int, int] = (8, 7),
        addressable: bool = False,
    ) -> None:
        super().__init__(eager)
        self.memory, self.sm, self.addressable = memory, sm, addressable
        self.copied: Counter[str] = Counter()
        self.allocations: dict[int, np.ndarray] = {}
        self.starts: list[int] = []
        self.adopted: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.next_address = DEVICE_BASE
        self.current = threading.local()

    # Memory

    def view(self, address: int, size: int) -> np.ndarray:
        """Return bytes of device memory; raise AssertionError if they are not allocated."""
        if address in self.adopted:
            return self.adopted[address][:size]
        place = bisect.bisect_right(self.starts, address) - 1
        assert place >= 0, f"{address:#x} is not device memory"
        start = self.starts[place]
        block = self.allocations[start]
        assert address + size <= start + block.size, f"{size} bytes at {address:#x} leave their memory, or are freed"
        return block[address - start : address - start + size]

    def host(self, address: int, size: int) -> np.ndarray:
        for start, block in self.pinned.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size]
        raise AssertionError(f"{address:#x} is not pinned memory: the copy would not be asynchronous")

    def adopt(self, address: int, size: int) -> None:
        """Register memory that an engine has allocated itself as device memory."""
        place = bisect.bisect_right(self.starts, address) - 1
        if place < 0 or address >= self.starts[place] + self.allocations[self.starts[place]].size:
            self.adopted[address] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        with self.lock:
            self.calls["cudaMalloc"] += 1
            if self._capturing_here():
                return cudaError_t.cudaErrorStreamCaptureUnsupported, None
            if size > self.memory - sum(block.size for block in self.allocations.values()):
                return cudaError_t.cudaErrorMemoryAllocation, None
            block, address = np.full(size + 512, 0xFF, np.uint8), self.next_address
            start = -block.ctypes.data % 512
            self.next_address += -(-size // 512) * 512 + 512
            if self.addressable:
                address = block.ctypes.data + start
            self.allocations[address] = block[start : start + size]
            bisect.insort(self.starts, address)
            return OK, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        with self.lock:
            assert not self._capturing_here(), "cudaFree while capturing"
            self._drain_all()
            assert address in self.allocations, f"{address:#x} was freed before, or is inside of an allocation"
            del self.allocations[address]
            self.starts.remove(address)
            return (OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        with self.lock:
            assert not self._capturing_here(), "cudaHostAlloc while capturing"
            block = np.full(size, 0xFF, np.uint8)
            self.pinned[block.ctypes.data] = block
            return OK, block.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        with self.lock:
            self._drain_all()
            del self.pinned[address]
            return (OK,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.memory - sum(block.size for block in self.allocations.values()), self.memory

    # Copies

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        self.view(address, count)
        self.enqueue(stream, lambda: self.view(address, count).__setitem__(slice(None), value))
        return (OK,)

    def cudaMemcpyAsync(self, to: int, origin: int, count: int, kind: Any, stream: int) -> tuple[Any, ...]:
        return self.cudaMemcpy2DAsync(to, count, origin, count, count, 1, kind, stream)

    def cudaMemcpy2DAsync(  # noqa: PLR0917 - the signature of CUDA
        self, to: int, pitch: int, origin: int, source_pitch: int, width: int, height: int, kind: Any, stream: int
    ) -> tuple[Any, ...]:
        if width > pitch or width > source_pitch:
            return (cudaError_t.cudaErrorInvalidValue,)
        kinds = cudaMemcpyKind
        read = self.host if kind == kinds.cudaMemcpyHostToDevice else self.view
        write = self.host if kind == kinds.cudaMemcpyDeviceToHost else self.view
        with self.lock:
            for get, address, step in ((read, origin, source_pitch), (write, to, pitch)):
                get(address, (height - 1) * step + width)
            self.copied[kind.name] += width * height

        def work() -> None:
            for row in range(height):
                write(to + row * pitch, width)[:] = read(origin + row * source_pitch, width)

        self.enqueue(stream, work)
        return (OK,)

    # The device

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        assert device == 0
        self.current.device = device
        return (OK,)

    def is_set(self) -> bool:
        """Return whether the calling thread has set the device, so that calls of the driver have a context."""
        return hasattr(self.current, "device")

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return OK, 1

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = self.sm
        return OK, SimpleNamespace(name=b"Pretended GPU\0\0", major=major, minor=minor, integrated=1)

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 13040

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return OK, f"what CUDA says of {int(error)}".encode()
