"""Fakes of CUDA's streams, events and graphs, which define the order in which work runs.

Work on a stream runs only when something waits for it, except on eager streams, where it runs at once. So a missing
wait reads or overwrites data too early, in either direction.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorDeviceUninitialized = 201
    cudaErrorNoKernelImageForDevice = 209
    cudaErrorUnsupportedPtxVersion = 222
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


OK = cudaError_t.cudaSuccess


class Event:
    """Event: `recorded` counts its recordings, `done` the reached ones; a wait is for the count when it was issued."""

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


class FakeStreams:
    """The part of the fake CUDA that orders work. Breaking CUDA's rules raises AssertionError.

    Args:
        eager: indices of eager streams in order of creation; they run work at once, unless they wait for an event.
    """

    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2

    def __init__(self, eager: tuple[int, ...] = ()) -> None:
        self.eager = eager
        self.lock = threading.RLock()
        self.calls: Counter[str] = Counter()
        self.streams: dict[int, Stream] = {}
        self.made_streams = 0
        self.events: list[Event] = []

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        with self.lock:
            self._add(self._stream(stream), "work", work)

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

    # How work runs

    def _stream(self, handle: int) -> Stream:
        assert handle in self.streams, f"{handle:#x} is not a stream; work must use a stream that was created"
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
        """Run the work of eager streams up to the first event that they wait for."""
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
        """Run the work before the recording of an event."""
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
