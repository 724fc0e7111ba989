"""Compile a graph with TensorRT or TensorRT-RTX. Runs on the device too, so it needs neither torch nor transformers.

TensorRT-RTX parses and compiles on a machine without a GPU.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from bridge_stg.export.graph.graph_check import load_graph
from bridge_stg.runtime.errors import EngineError

CAPACITY = 1024
"""Default KV positions of a cache that is updated in place: TensorRT needs a fixed number."""

ACTIVATIONS = "Total Activation Memory: "
"""Start of the log message with the activation memory of a profile in bytes; one per profile, in their order."""

Sizes = Mapping[str, tuple[int, int, int]]
"""Minimum, optimum and maximum size by symbol. Sizes that depend on each other must agree in all three."""

Report = Callable[[str, int, int], Any]
"""Called with the name of the phase, the steps done, and the number of steps."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A serialized engine, in a buffer that TensorRT owns, and the timing cache, if this TensorRT has one.

    `activations` are the bytes that each profile needs for tensors between layers, as the builder logs them; empty if
    it does not.
    """

    plan: Any
    timing: bytes | None
    activations: tuple[int, ...] = ()


@contextmanager
def _frames_cleared() -> Iterator[None]:
    """Drop the local variables of frames that an error passed through, except those that inner functions share.

    When it is deleted, TensorRT's builder takes a lock of all builders. The error would keep it until a garbage
    collection, which may run in a callback of the next builder, that is, under this lock.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


@_frames_cleared()
def compile_graph(
    tensorrt: ModuleType,
    path: str | os.PathLike[str],
    profiles: Mapping[str, Sizes],
    *,
    capacity: int | None = None,
    sms: Sequence[int] = (),
    workspace: int | None = None,
    timing: bytes = b"",
    report: Report | None = None,
) -> Compiled:
    """Compile a graph for several ranges of sizes, strongly typed: its precision is that of the graph.

    Args:
        tensorrt: package of TensorRT or TensorRT-RTX.
        path: .onnx file, with its external data next to it.
        profiles: by name of the profile, sizes of every free dim of the inputs; in the order of their indices.
        capacity: KV positions of a cache that is updated in place.
        sms: compute capabilities to compile for ahead of time (TensorRT-RTX); empty for this machine's GPU.
        workspace: bytes for tensors between layers; None for the whole device.
        timing: timing cache of an earlier compilation.
        report: called with the progress; may raise to stop.

    Raises:
        EngineError: the file is not an ONNX graph, a size is missing, or TensorRT cannot compile the graph.
    """
    network = empty_network(tensorrt)
    if problems := parse_graph(tensorrt, network, path, CAPACITY if capacity is None else capacity):
        message = f"{path}: TensorRT {tensorrt.__version__} cannot parse the graph: {problems[0]}"
        raise EngineError("engine.rejected_graph", message)
    _allow_decomposed_attention(tensorrt, network.value)
    config = network.builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # 10 bits of mantissa are not fp32
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # so that a report can name the graph's nodes
    for sizes in profiles.values():
        config.add_optimization_profile(_profile(network, path, sizes))
    if sms:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(_capability(tensorrt, sm), index)
    if workspace is not None:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace)
    keeps_timing = not is_rtx(tensorrt)
    if keeps_timing:
        config.set_timing_cache(config.create_timing_cache(timing), False)
    config.progress_monitor = monitor = _monitor(tensorrt, report)
    with _interrupt_kept(monitor):
        plan = network.builder.build_serialized_network(network.value, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is None:
        reason = "; ".join(network.logger.messages[-3:]) or "it gave no reason"
        message = f"{path}: TensorRT {tensorrt.__version__} cannot compile the graph: {reason}"
        raise EngineError("engine.build_failed", message)
    cache = config.get_timing_cache() if keeps_timing else None
    activations = tuple(network.logger.activations)
    kept = activations if len(activations) == len(profiles) else ()
    return Compiled(plan, None if cache is None else bytes(cache.serialize()), kept)


def is_rtx(tensorrt: ModuleType) -> bool:
    """Return whether a package is TensorRT-RTX: only it has compute capabilities to compile for."""
    return hasattr(tensorrt, "ComputeCapability")


def _allow_decomposed_attention(tensorrt: ModuleType, network: Any) -> None:
    """Allow attention without a fused kernel for its dtype (fp32) to be decomposed; others are fused as before."""
    kind = getattr(tensorrt.LayerType, "ATTENTION_OUTPUT", None)  # from TensorRT 10.14
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if kind is not None and layer.type == kind:
            layer.__class__ = tensorrt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _profile(network: Any, path: str | os.PathLike[str], sizes: Sizes) -> Any:
    profile = network.builder.create_optimization_profile()
    for tensor in map(network.value.get_input, range(network.value.num_inputs)):
        profile.set_shape(tensor.name, *_shapes(path, tensor, sizes))
    return profile


def _capability(tensorrt: ModuleType, sm: int) -> Any:
    found = getattr(tensorrt.ComputeCapability, f"SM{sm}", None)
    if found is None:
        known = ", ".join(name[2:] for name in dir(tensorrt.ComputeCapability) if name.startswith("SM"))
        message = f"TensorRT {tensorrt.__version__} compiles ahead of time for SM {known}, not for SM {sm}"
        raise EngineError("engine.unsupported_device", message)
    return found


@contextmanager
def _interrupt_kept(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C and other signals stop the monitor: TensorRT would log an exception of a callback, and continue."""
    is_main = threading.current_thread() is threading.main_thread()
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)} if is_main else set()
    before: dict[int, Any] = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}

    def keep(number: int, frame: Any) -> None:
        try:
            before[number](number, frame)
        except BaseException as error:  # noqa: BLE001  # raised again after the compilation
            monitor.stopped = error

    for number in before:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _monitor(tensorrt: ModuleType, report: Report | None) -> Any:
    """Return a progress monitor that calls `report`."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[name-defined, misc]
        """Keeps an exception of a callback, which must not pass through TensorRT, and stops the compilation."""

        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if self.stopped is None and report is not None:
                    report(phase, step, self.steps.get(phase, 0))
            except BaseException as error:  # noqa: BLE001  # raised again after the compilation
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def parse_graph(tensorrt: ModuleType, network: Any, path: str | os.PathLike[str], capacity: int) -> list[str]:
    """Parse a graph into an empty network; return TensorRT's errors, each with the node's name."""
    model = with_capacity(path, capacity)
    parser = tensorrt.OnnxParser(network.value, network.logger)
    if parser.parse(model, str(path)):
        return []
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    found = [f"{e.node_name() or 'graph'} ({e.node_operator() or 'no operator'}): {e.desc()}" for e in errors]
    return found or ["the parser gave no reason"]


def empty_network(tensorrt: ModuleType) -> Any:
    """Return an empty network as `value`, with its `builder` and `logger`, which must live as long."""

    class Logger(tensorrt.ILogger):  # type: ignore[name-defined, misc]
        """Keeps errors instead of printing them: a failed build has no other reason. Reads sizes from the log."""

        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.activations: list[int] = []

        def log(self, severity: Any, message: str) -> None:
            if message.startswith(ACTIVATIONS):
                self.activations.append(int(message.removeprefix(ACTIVATIONS).split()[0]))
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

    logger = Logger()
    builder = tensorrt.Builder(logger)
    # TensorRT-RTX and TensorRT 11 have no other kind of network; TensorRT 10 needs a flag.
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flags = 0 if typed is None or is_rtx(tensorrt) else 1 << int(typed)
    return SimpleNamespace(value=builder.create_network(flags), builder=builder, logger=logger)


def _shapes(path: str | os.PathLike[str], tensor: Any, sizes: Sizes) -> tuple[list[int], list[int], list[int]]:
    """Return the minimum, optimum and maximum shape of an input."""
    shapes: tuple[list[int], list[int], list[int]] = [], [], []
    for axis, size in enumerate(tensor.shape):
        symbol = tensor.get_dimension_name(axis) if size < 0 else ""
        if size < 0 and symbol not in sizes:
            found = f"{path}: input {tensor.name!r} has a free dim {symbol!r}"
            raise EngineError("engine.bad_profile", f"{found}; sizes were given for {', '.join(sizes) or 'none'}")
        for shape, chosen in zip(shapes, sizes[symbol] if size < 0 else (size,) * 3, strict=True):
            shape.append(chosen)
    return shapes


def with_capacity(path: str | os.PathLike[str], capacity: int) -> bytes:
    """Return a serialized graph with a fixed number of KV positions, if it updates its cache in place."""
    model = load_graph(path)
    if any(node.op_type == "TensorScatter" for node in model.graph.node):
        for value in (*model.graph.input, *model.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == "S":
                    dim.dim_value = capacity
        del model.graph.value_info[:]
    return bytes(model.SerializeToString())
