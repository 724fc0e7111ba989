"""CUDA's runtime as `cuda.bindings.runtime` shows it, without a device: streams, events, memory, graphs.

Nothing that is put on a stream runs before somebody waits for it, except on streams that are chosen to hurry; so a
missing wait reads or overwrites too early, whichever way round. Device addresses are no addresses of this process.
Fresh memory is full of NaN; memory that was freed, copies out of bounds and from pageable memory are caught.
"""

from __future__ import annotations

import bisect
import ctypes
import enum
import threading
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


OK = cudaError_t.cudaSuccess
DEVICE_BASE = 0x7E00_0000_0000


class Event:
    """`recorded` counts its recordings, `done` those that were reached; a wait is for the count at its time."""

    def __init__(self) -> None:
        self.recorded = self.done = 0
        self.stream: Stream | None = None
        self.alive = True


class Stream:
    def __init__(self, handle: int, eager: bool) -> None:
        self.handle, self.eager = handle, eager
        self.queue: deque[tuple[str, Any]] = deque()
        self.captured: list[Callable[[], None]] | None = None
        self.capturing_thread: int | None = None
        self.alive = True


class FakeCuda:
    """Stands in for the module. Breaking CUDA's rules raises AssertionError, which nothing in the runtime catches.

    Args:
        eager: numbers of the streams, by order of creation, that run at once what is put on them (if nothing that they
            wait for is missing).
        memory: bytes of the device.
        addressable: device addresses are addresses of this process after all, for an engine that computes on the CPU.
    """

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDisableTiming, cudaHostAllocDefault = 1, 2, 0

    def __init__(
        self,
        *,
        eager: tuple[int, ...] = (),
        memory: int = 2**32,
        sm: tuple[int, int] = (8, 7),
        addressable: bool = False,
    ) -> None:
        self.eager, self.memory, self.sm, self.addressable = eager, memory, sm, addressable
        self.lock = threading.RLock()
        self.calls: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.streams: dict[int, Stream] = {}
        self.made_streams = 0
        self.events: list[Event] = []
        self.allocations: dict[int, np.ndarray] = {}
        self.starts: list[int] = []
        self.adopted: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.next_address = DEVICE_BASE

    # Memory

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes of device memory; AssertionError where they were never allocated, or freed."""
        if address in self.adopted:
            return self.adopted[address][:size]
        place = bisect.bisect_right(self.starts, address) - 1
        assert place >= 0, f"{address:#x} is no device memory"
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
        """Take memory that an engine has allocated itself for the device's."""
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

    # Work

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        with self.lock:
            self._add(self._stream(stream), "work", work)

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        self.view(address, count)
        self.enqueue(stream, lambda: self.view(address, count).__setitem__(slice(None), value))
        return (OK,)

    def cudaMemcpyAsync(self, to: int, origin: int, count: int, kind: Any, stream: int) -> tuple[Any, ...]:
        return self.cudaMemcpy2DAsync(to, count, origin, count, count, 1, kind, stream)

    def cudaMemcpy2DAsync(
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

    # Streams and events

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaStreamNonBlocking
        with self.lock:
            handle = 0x5000 + 16 * self.made_streams
            self.streams[handle] = Stream(handle, self.made_streams in self.eager)
            self.made_streams += 1
            return OK, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        with self.lock:
            self._drain(self._stream(stream), len(self._stream(stream).queue))
            del self.streams[stream]
            return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        with self.lock:
            self.calls["cudaStreamSynchronize"] += 1
            found = self._stream(stream)
            assert found.captured is None, "a stream that captures cannot be waited for"
            self._drain(found, len(found.queue))
            return (OK,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        with self.lock:
            self._drain_all()
            return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: Event, flags: int) -> tuple[Any, ...]:
        with self.lock:
            assert event.alive and flags == 0
            self._add(self._stream(stream), "wait", (event, event.recorded))
            return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        with self.lock:
            self.events.append(Event())
            return OK, self.events[-1]

    def cudaEventDestroy(self, event: Event) -> tuple[Any, ...]:
        assert event.alive, "an event was destroyed twice"
        event.alive = False
        self.events.remove(event)
        return (OK,)

    def cudaEventRecord(self, event: Event, stream: int) -> tuple[Any, ...]:
        with self.lock:
            assert event.alive
            event.recorded += 1
            event.stream = self._stream(stream)
            self._add(event.stream, "record", (event, event.recorded))
            return (OK,)

    def cudaEventSynchronize(self, event: Event) -> tuple[Any, ...]:
        with self.lock:
            self.calls["cudaEventSynchronize"] += 1
            self._reach(event, event.recorded)
            return (OK,)

    def cudaEventQuery(self, event: Event) -> tuple[Any, ...]:
        return (OK if event.done >= event.recorded else cudaError_t.cudaErrorNotReady,)

    # Graphs

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        with self.lock:
            assert mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            found = self._stream(stream)
            assert found.captured is None
            found.captured, found.capturing_thread = [], threading.get_ident()
            return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        with self.lock:
            found = self._stream(stream)
            work, found.captured, found.capturing_thread = found.captured, None, None
            return OK, work

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
        assert flags == 0
        return OK, SimpleNamespace(work=list(graph), alive=True)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (OK,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Any, ...]:
        assert graph.alive, "a destroyed graph was launched"
        self.calls["cudaGraphLaunch"] += 1
        for work in graph.work:
            self.enqueue(stream, work)
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any, ...]:
        assert graph.alive
        graph.alive = False
        return (OK,)

    # The device

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        assert device == 0
        return (OK,)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return OK, 1

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = self.sm
        return OK, SimpleNamespace(name=b"Pretended GPU\0\0", major=major, minor=minor, integrated=1)

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 13040

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return OK, f"what CUDA says of {int(error)}".encode()

    # How work runs

    def _stream(self, handle: int) -> Stream:
        assert handle in self.streams, f"{handle:#x} is no stream: work belongs on a stream that was made for it"
        return self.streams[handle]

    def _capturing_here(self) -> bool:
        return any(s.capturing_thread == threading.get_ident() for s in self.streams.values())

    def _add(self, stream: Stream, kind: str, what: Any) -> None:
        if stream.captured is not None:
            assert kind == "work", "only work is captured here"
            stream.captured.append(what)
            return
        stream.queue.append((kind, what))
        self._hurry()

    def _hurry(self) -> None:
        """Let the eager streams run as far as nothing is missing."""
        moved = True
        while moved:
            moved = False
            for stream in list(self.streams.values()):
                while stream.eager and stream.queue:
                    kind, what = stream.queue[0]
                    if kind == "wait" and what[0].done < what[1]:
                        break
                    self._step(stream)
                    moved = True

    def _step(self, stream: Stream) -> None:
        kind, what = stream.queue.popleft()
        if kind == "work":
            what()
        elif kind == "record":
            what[0].done = max(what[0].done, what[1])
        else:
            self._reach(*what)

    def _reach(self, event: Event, count: int) -> None:
        """Run what stands before the recording of an event."""
        while event.done < count:
            assert event.stream is not None
            self._step(event.stream)

    def _drain(self, stream: Stream, steps: int) -> None:
        for _ in range(steps):
            if stream.queue:
                self._step(stream)

    def _drain_all(self) -> None:
        for stream in list(self.streams.values()):
            self._drain(stream, len(stream.queue))


class FakeNvrtc:
    """The compiler `cuda.bindings.nvrtc`; it takes what it is given for right."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def nvrtcCreateProgram(self, source: bytes, name: bytes, count: int, headers: Any, names: Any) -> tuple[Any, ...]:
        assert b'extern "C" __global__ void resample(' in source and (count, headers, names) == (0, [], [])
        return OK, source

    def nvrtcCompileProgram(self, program: bytes, count: int, options: list[bytes]) -> tuple[Any, ...]:
        assert count == len(options) == 1 and options[0].startswith(b"--gpu-architecture=compute_")
        return (cudaError_t.cudaErrorInvalidValue if self.fails else OK,)

    def nvrtcGetPTXSize(self, program: bytes) -> tuple[Any, ...]:
        return OK, 64

    def nvrtcGetPTX(self, program: bytes, code: bytes) -> tuple[Any, ...]:
        assert len(code) == 64
        return (OK,)

    def nvrtcDestroyProgram(self, program: bytes) -> tuple[Any, ...]:
        return (OK,)


class FakeDriver:
    """The part of `cuda.bindings.driver` that launches the one kernel; it computes the same in numpy."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.launches = 0

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        return OK, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return OK, name

    def cuLaunchKernel(self, kernel: bytes, *arguments: Any) -> tuple[Any, ...]:
        blocks, _, _, threads, _, _, shared, stream, (values, kinds), extra = arguments
        assert kernel == b"resample" and (shared, extra) == (0, 0) and len(values) == len(kinds) == 10
        origin, to, first, count, weights, taps, outer, size_to, size_from, inner = values
        assert (blocks - 1) * threads < outer * size_to * inner <= blocks * threads

        def table(address: int, *shape: int) -> np.ndarray:
            return self.cuda.view(address, 4 * int(np.prod(shape))).view(np.int32).reshape(shape)

        def work() -> None:
            pixels = self.cuda.view(origin, outer * size_from * inner).reshape(outer, size_from, inner).astype(np.int64)
            made = self.cuda.view(to, outer * size_to * inner).reshape(outer, size_to, inner)
            starts, counts, factors = table(first, size_to), table(count, size_to), table(weights, size_to, taps)
            for place in range(size_to):
                seen = slice(starts[place], starts[place] + counts[place])
                total = (factors[place, : counts[place], None] * pixels[:, seen]).sum(1) + (1 << 21)
                made[:, place] = (total >> 22).clip(0, 255)

        self.launches += 1
        self.cuda.enqueue(stream, work)
        return (OK,)
