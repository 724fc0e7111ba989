"""TensorRT: whether it takes a graph and compiles it. Runs on the device too, so without torch and transformers.

Either package will do: `tensorrt` (the vendor's index, JetPack) or TensorRT-RTX, which parses and compiles on a machine
without a GPU. Both are imported on use only.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
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
    tensorrt = _tensorrt()
    network = _network(tensorrt)
    if problems := _parse(tensorrt, network, path, capacity):
        raise EngineError(f"{path}: TensorRT {tensorrt.__version__} refuses the graph: {problems[0]}")
    for layer in (network.value.get_layer(index) for index in range(network.value.num_layers)):
        if layer.type == tensorrt.LayerType.ATTENTION_OUTPUT:
            # Without a fused kernel for its dtype (fp32), attention may be taken apart.
            layer.__class__ = tensorrt.IAttentionOutputLayer
            layer.attention.decomposable = True
    config = network.builder.create_builder_config()
    profile = network.builder.create_optimization_profile()
    for tensor in (network.value.get_input(index) for index in range(network.value.num_inputs)):
        shapes = [_shape(path, tensor, sizes, place) for place in range(3)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    engine = network.builder.build_serialized_network(network.value, config)
    if engine is None:
        found = "; ".join(network.logger.messages[-3:]) or "it gave no reason"
        raise EngineError(f"{path}: TensorRT {tensorrt.__version__} cannot compile the graph: {found}")
    return bytes(engine)


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
    return SimpleNamespace(value=builder.create_network(0), builder=builder, logger=logger)


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
        raise EngineError(f'onnx cannot be imported ({error}). Install it: pip install "bridge-stg[export]"') from error
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
