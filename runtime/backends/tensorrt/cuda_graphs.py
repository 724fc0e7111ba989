"""CUDA graphs of repeated steps: a decode step is many small kernels, which one launch puts on the stream.

A graph belongs to one set of shapes and addresses. A step that is seen for the second time is run once more and then
captured, in a new execution context (TensorRT needs shapes set and one run before a capture).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.errors import EngineError

MOST_GRAPHS = 16
"""Most graphs that are kept; the least recently used is freed first."""
MOST_SEEN = 256


@dataclass(eq=False)
class PreparedCall:
    """A call: `execute` puts its work on a stream, which writes `outputs`; `holds` must stay alive."""

    execute: Callable[[int], None]
    capturable: Callable[[int], bool]
    outputs: Mapping[str, DeviceArray]
    holds: Any


class StepGraphs:
    """The captured steps of one session. To be used under the chain's lock."""

    def __init__(self, context: DeviceContext) -> None:
        self._context = context
        self._stream = context.cuda.stream()  # capture records work without running it
        self._graphs: OrderedDict[Hashable, tuple[Any, PreparedCall]] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self.capture_error: str | None = None
        """Why steps of this engine cannot be captured; None while they can."""

    def __len__(self) -> int:
        return len(self._graphs)

    def launch(self, key: Hashable) -> Mapping[str, DeviceArray] | None:
        """Launch a captured step and return its outputs, which the next launch overwrites; None if not captured."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        graph, prepared = self._graphs[key]
        self._context.cuda("cudaGraphLaunch", graph, self._context.stream)
        return prepared.outputs

    def repeats(self, key: Hashable) -> bool:
        """Return whether a step was seen before and should be captured now."""
        if self.capture_error is not None:
            return False
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def run_and_capture(self, key: Hashable, prepared: PreparedCall) -> Mapping[str, DeviceArray]:
        """Run a step on the chain's stream, then capture it for the next time; return its outputs."""
        cuda, stream = self._context.cuda, self._context.stream
        prepared.execute(stream)
        cuda("cudaStreamSynchronize", stream)
        try:
            if not prepared.capturable(self._stream):
                raise EngineError("engine.failed", "this engine's work cannot be captured as a CUDA graph")
            self._graphs[key] = (self._capture(prepared), prepared)
        except EngineError as error:  # the step has run, and is run without a graph from now on
            self.capture_error = str(error)
            return prepared.outputs
        while len(self._graphs) > MOST_GRAPHS:
            _, (graph, _) = self._graphs.popitem(last=False)
            cuda("cudaGraphExecDestroy", graph)
        return prepared.outputs

    def close(self) -> None:
        """Free the graphs. The device must have finished."""
        for graph, _ in self._graphs.values():
            self._context.cuda("cudaGraphExecDestroy", graph)
        self._graphs.clear()
        self._context.cuda("cudaStreamDestroy", self._stream)

    def _capture(self, prepared: PreparedCall) -> Any:
        cuda = self._context.cuda
        # Thread-local, so allocations of other threads do not invalidate the capture.
        cuda("cudaStreamBeginCapture", self._stream, cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            prepared.execute(self._stream)
        except EngineError:
            cuda.api.cudaStreamEndCapture(self._stream)  # an invalid capture must be ended, too
            raise
        recorded = cuda("cudaStreamEndCapture", self._stream)
        try:
            return cuda("cudaGraphInstantiate", recorded, 0)
        finally:
            cuda("cudaGraphDestroy", recorded)
