"""CUDA graphs of steps that repeat: a token's work is many small kernels, which one launch puts on the stream.

A graph belongs to one set of shapes and addresses. What is seen for the second time is run once more as it is and then
captured, in an execution context of its own (as TensorRT asks: shapes set and the work run once before a capture).
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
"""Graphs that are kept; the longest unused go first."""
MOST_SEEN = 256


@dataclass(eq=False)
class Scales:
    """A call that can be run: `execute` puts its work on a stream; it writes `outputs`; `holds` must stay alive."""

    execute: Callable[[int], None]
    capturable: Callable[[int], bool]
    outputs: Mapping[str, DeviceArray]
    holds: Any


class StepGraphs:
    """The captured steps of one session. To be used under the chain's lock."""

    def __init__(self, context: DeviceContext) -> None:
        self._context = context
        self._stream = context.cuda.stream()  # captured work is recorded, not run: it needs no order
        self._graphs: OrderedDict[Hashable, tuple[Any, Scales]] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self.refusal: str | None = None
        """Why steps are not captured any more: this engine cannot be."""

    def __len__(self) -> int:
        return len(self._graphs)

    def launch(self, key: Hashable) -> Mapping[str, DeviceArray] | None:
        """Put a captured step on the chain's stream and return its outputs, which the next launch overwrites."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        graph, prepared = self._graphs[key]
        self._context.cuda("cudaGraphLaunch", graph, self._context.stream)
        return prepared.outputs

    def repeats(self, key: Hashable) -> bool:
        """Whether a step was seen before and should be captured now."""
        if self.refusal is not None:
            return False
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def run_and_capture(self, key: Hashable, prepared: Scales) -> Mapping[str, DeviceArray]:
        """Put a step on the chain's stream as it is, then capture it for the next time; return its outputs."""
        cuda, stream = self._context.cuda, self._context.stream
        prepared.execute(stream)
        cuda("cudaStreamSynchronize", stream)
        try:
            if not prepared.capturable(self._stream):
                raise EngineError("this engine's work cannot be captured as a CUDA graph")
            self._graphs[key] = (self._capture(prepared), prepared)
        except EngineError as error:  # it ran, and goes on running without
            self.refusal = str(error)
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

    def _capture(self, prepared: Scales) -> Any:
        cuda = self._context.cuda
        # Thread-local: what other threads allocate meanwhile does not spoil the capture.
        cuda("cudaStreamBeginCapture", self._stream, cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            prepared.execute(self._stream)
        except EngineError:
            cuda.api.cudaStreamEndCapture(self._stream)  # it is spoiled, and must be ended all the same
            raise
        recorded = cuda("cudaStreamEndCapture", self._stream)
        try:
            return cuda("cudaGraphInstantiate", recorded, 0)
        finally:
            cuda("cudaGraphDestroy", recorded)
