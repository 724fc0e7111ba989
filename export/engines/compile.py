"""TensorRT: whether it takes a graph and compiles it. Runs on the device too, so without torch and transformers.

Either package will do: `tensorrt` (the vendor's index, JetPack) or TensorRT-RTX, which parses and compiles on a machine
without a GPU. Both are imported on use only.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from bridge_stg.runtime.errors import EngineError

PACKAGES = ("tensorrt", "tensorrt_rtx_bindings")
CAPACITY = 1024
"""KV positions that a parsed graph is given where the cache is updated in place: TensorRT wants a fixed number."""


Sizes = Mapping[str, tuple[int, int, int]]
"""By symbol of a dim: its least, usual and largest size. Dims that follow from each other must agree in each."""


def parse_in_tensorrt(path: str | os.PathLike[str], *, capacity: int = CAPACITY) -> list[str]:
    """Let TensorRT's parser read a graph.

    Args:
        path: the .onnx file; its external data lie beside it.
        capacity: S of a cache that is updated in place; other dims stay free.

    Returns:
        What the parser objects to, with the node's name; empty if it takes the graph.

    Raises:
        EngineError: no TensorRT package can be imported, or the file is no ONNX graph.
    """
    tensorrt = _tensorrt()
    return _parse(tensorrt, _network(tensorrt), path, capacity)


def compile_in_tensorrt(path: str | os.PathLike[str], sizes: Sizes, *, capacity: int = CAPACITY) -> bytes:
    """Compile a graph for one range of sizes, and return the engine. Precisions are those of the graph.

    Args:
        path: the .onnx file; its external data lie beside it.
        sizes: of every free dim of the inputs.
        capacity: S of a cache that is updated in place.

    Raises:
        EngineError: no TensorRT package can be imported, the file is no ONNX graph, a size is missing, or TensorRT
            refuses the graph.
    """
    return bytes(compile_graph(_tensorrt(), path, {"": sizes}, capacity=capacity).plan)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A serialized engine, as a buffer that TensorRT owns (large ones are not copied), and what was learnt of kernels.

    `timing` is None where this TensorRT keeps no timing cache.
    """

    plan: Any
    timing: bytes | None


Report = Callable[[str, int, int], Any]
"""Called with what is being done, the steps done, and their number."""


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
    """Compile a graph for several ranges of sizes, strongly typed: precision is what the graph says.

    Args:
        tensorrt: the package.
        path: the .onnx file; its external data lie beside it.
        profiles: sizes of every free dim of the inputs, by the profile's name; their order is that of the indices.
        capacity: S of a cache that is updated in place.
        sms: compute capabilities to compile for ahead of time (TensorRT-RTX); empty: the GPU that is here.
        workspace: bytes that what lies between layers may take; None: all of the device.
        timing: what an earlier compilation returned.
        report: see `Report`; may raise to stop.

    Raises:
        EngineError: see `compile_in_tensorrt`.
    """
    network = _network(tensorrt)
    if problems := _parse(tensorrt, network, path, CAPACITY if capacity is None else capacity):
        raise EngineError(f"{path}: TensorRT {tensorrt.__version__} refuses the graph: {problems[0]}")
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
        found = "; ".join(network.logger.messages[-3:]) or "it gave no reason"
        raise EngineError(f"{path}: TensorRT {tensorrt.__version__} cannot compile the graph: {found}")
    cache = config.get_timing_cache() if keeps_timing else None
    return Compiled(plan, None if cache is None else bytes(cache.serialize()))


def is_rtx(tensorrt: ModuleType) -> bool:
    """Tell TensorRT-RTX from TensorRT: it alone is told what to compile for."""
    return hasattr(tensorrt, "ComputeCapability")


def _allow_decomposed_attention(tensorrt: ModuleType, network: Any) -> None:
    """Let attention without a fused kernel for its dtype (fp32) be taken apart; with one it is fused all the same."""
    kind = getattr(tensorrt.LayerType, "ATTENTION_OUTPUT", None)  # from TensorRT 10.14
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if kind is not None and layer.type == kind:
            layer.__class__ = tensorrt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _profile(network: Any, path: str | os.PathLike[str], sizes: Sizes) -> Any:
    profile = network.builder.create_optimization_profile()
    for tensor in (network.value.get_input(index) for index in range(network.value.num_inputs)):
        profile.set_shape(tensor.name, *(_shape(path, tensor, sizes, place) for place in range(3)))
    return profile


def _capability(tensorrt: ModuleType, sm: int) -> Any:
    found = getattr(tensorrt.ComputeCapability, f"SM{sm}", None)
    if found is None:
        known = ", ".join(name[2:] for name in dir(tensorrt.ComputeCapability) if name.startswith("SM"))
        raise EngineError(f"TensorRT {tensorrt.__version__} compiles ahead of time for SM {known}, not for SM {sm}")
    return found


@contextmanager
def _interrupt_kept(monitor: Any) -> Iterator[None]:
    """Stop a monitor by Ctrl-C: its exception would come up in any callback, where TensorRT logs it and goes on."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def keep(number: int, frame: Any) -> None:
        try:
            before(number, frame)
        except BaseException as error:
            monitor.stopped = error

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(tensorrt: ModuleType, report: Report | None) -> Any:
    """Return a progress monitor that passes on the outermost phase that has steps."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[name-defined, misc]
        """An exception in a callback would go through TensorRT, so it is kept, and the compilation asked to stop."""

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
            except BaseException as error:
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _parse(tensorrt: ModuleType, network: Any, path: str | os.PathLike[str], capacity: int) -> list[str]:
    model = with_capacity(path, capacity)
    parser = tensorrt.OnnxParser(network.value, network.logger)
    if parser.parse(model, str(path)):
        return []
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    found = [f"{e.node_name() or 'graph'} ({e.node_operator() or 'no operator'}): {e.desc()}" for e in errors]
    return found or ["the parser refused the graph and gave no reason"]


def _network(tensorrt: ModuleType) -> Any:
    """Return an empty network beside its builder and its logger, which must live as long."""

    class Logger(tensorrt.ILogger):  # type: ignore[name-defined, misc]
        """Keeps errors instead of printing them: the parser's own list says it better, and a failed build has none."""

        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

    logger = Logger()
    builder = tensorrt.Builder(logger)
    # TensorRT-RTX and TensorRT 11 know no other kind of network; TensorRT 10 has to be told.
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flags = 0 if typed is None or is_rtx(tensorrt) else 1 << int(typed)
    return SimpleNamespace(value=builder.create_network(flags), builder=builder, logger=logger)


def _shape(path: str | os.PathLike[str], tensor: Any, sizes: Sizes, place: int) -> list[int]:
    shape = []
    for axis, size in enumerate(tensor.shape):
        symbol = tensor.get_dimension_name(axis) if size < 0 else ""
        if size < 0 and symbol not in sizes:
            known = ", ".join(sizes) or "none"
            raise EngineError(f"{path}: input {tensor.name!r} has a free dim {symbol!r}; sizes were given for {known}")
        shape.append(sizes[symbol][place] if size < 0 else size)
    return shape


def with_capacity(path: str | os.PathLike[str], capacity: int) -> bytes:
    """Return a graph, serialized, whose KV buffers hold `capacity` positions, if it updates them in place.

    Raises:
        EngineError: the file cannot be read as an ONNX graph, or onnx is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise EngineError(
            f'onnx cannot be imported ({error}). Install it: pip install "bridge-stg[calibrate]"'
        ) from error
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise EngineError(f"{path}: cannot be read as an ONNX graph ({error})") from error
    if any(node.op_type == "TensorScatter" for node in model.graph.node):
        for value in (*model.graph.input, *model.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == "S":
                    dim.dim_value = capacity
        del model.graph.value_info[:]
    return model.SerializeToString()


def _tensorrt() -> ModuleType:
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise EngineError(
        'no TensorRT can be imported. Install one: pip install "bridge-stg[rtx]" (compiles without a GPU), or tensorrt '
        "from the vendor's package index; JetPack brings its own."
    )
