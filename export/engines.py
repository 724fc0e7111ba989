"""TensorRT: whether its parser takes a graph. Runs on the device too, so without torch and transformers.

Either package will do: `tensorrt` (the vendor's index, JetPack) or TensorRT-RTX, which parses and compiles on a machine
without a GPU. Both are imported on use only.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from bridge_stg.runtime.errors import EngineError

PACKAGES = ("tensorrt", "tensorrt_rtx_bindings")
CAPACITY = 1024
"""KV positions that a parsed graph is given where the cache is updated in place: TensorRT wants a fixed number."""


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
    model = with_capacity(path, capacity)
    logger = tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR)  # the parser's own list says it better
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if parser.parse(model, str(path)):
        return []
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    found = [f"{e.node_name() or 'graph'} ({e.node_operator() or 'no operator'}): {e.desc()}" for e in errors]
    return found or ["the parser refused the graph and gave no reason"]


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
