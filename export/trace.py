"""Trace one graph of the model in one dialect, and give it the contract's names."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import onnx_ir as ir
import torch

from bridge_stg.checkpoint import checkpoint_key
from bridge_stg.export.graphs import GRAPH_MODULES, dynamic_shapes, example
from bridge_stg.export.lowering import Lowering
from bridge_stg.export.simplify import simplify
from bridge_stg.model import KEY_PREFIXES, BridgeSTG
from bridge_stg.runtime.contracts import graph_contract
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.manifest import GraphSpec

IR_VERSION = {18: 8, 24: 10}
"""By opset. onnxruntime 1.23 reads up to 10, and nothing in these graphs needs a newer one."""


def trace_graph(name: str, model: BridgeSTG, lowering: Lowering) -> tuple[GraphSpec, ir.Model]:
    """Trace one graph; its weights stay the model's own memory.

    Args:
        name: one of the contract's graphs.
        model: in eval mode, float32.
        lowering: the dialect.

    Returns:
        The contract, and the graph: initializers named as in a checkpoint, nodes named by module and operator.

    Raises:
        EngineError: the trace fixed a dim that the contract says is free.
    """
    contract = graph_contract(
        name, model.spec, variant=lowering.name, opset=lowering.opset, cache_update=lowering.cache_update
    )
    module = GRAPH_MODULES[name](model, lowering).eval()
    with lowering.applied(model), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            example(contract, model.spec),
            dynamo=True,
            opset_version=lowering.opset,
            dynamic_shapes=dynamic_shapes(contract),
            input_names=[tensor.name for tensor in contract.inputs],
            output_names=[tensor.name for tensor in contract.outputs],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    traced = program.model
    _name_initializers(traced.graph, model)
    simplify(traced, modules=lambda scope: module_key(f"{scope}.").rstrip("."))
    _apply_contract(traced.graph, contract)
    traced.ir_version = IR_VERSION[lowering.opset]
    traced.graph.name = name
    traced.producer_name, traced.producer_version = "bridge-stg", None
    return contract, traced


def module_key(name: str) -> str:
    """Return the checkpoint's spelling of a name in `BridgeSTG`; names that a checkpoint does not hold stay."""
    return checkpoint_key(name) if name.startswith(tuple(KEY_PREFIXES)) else name


def _name_initializers(graph: ir.Graph, model: BridgeSTG) -> None:
    """Name parameters and buffers as in a checkpoint. A tied tensor gets the name that the checkpoint stores."""
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    shared = {name: first[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
    for name, value in list(graph.initializers.items()):
        value.name = module_key(shared.get(name, name))


def _apply_contract(graph: ir.Graph, contract: GraphSpec) -> None:
    """Check inputs and outputs against the contract, and write its symbols into them."""
    sides = (("input", graph.inputs, contract.inputs), ("output", graph.outputs, contract.outputs))
    for kind, values, tensors in sides:
        if [value.name for value in values] != [tensor.name for tensor in tensors]:
            found = ", ".join(str(value.name) for value in values)
            raise EngineError(f"{contract}: the trace's {kind}s are {found}, not those of the contract")
        for value, tensor in zip(values, tensors, strict=True):
            dims = list(value.shape or ())
            fixed = [
                f"{symbol} = {size}"
                for size, symbol in zip(dims, tensor.dims)
                if isinstance(symbol, str) and isinstance(size, int)
            ]
            wrong = [size for size, dim in zip(dims, tensor.dims) if isinstance(dim, int) and size != dim]
            if fixed or wrong or len(dims) != len(tensor.dims) or value.dtype != ir.DataType[_IR_NAMES[tensor.dtype]]:
                raise EngineError(
                    f"{contract}: the trace's {kind} {value.name!r} is {value.dtype} {value.shape}, but the contract "
                    f"says {tensor}. Find what {'fixed ' + ', '.join(fixed) if fixed else 'changed it'} in the model."
                )
            value.shape = ir.Shape(tensor.dims)
            value.metadata_props.clear()


_IR_NAMES = {
    "float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64", "int32": "INT32", "int8": "INT8", "uint8": "UINT8",
    "bool": "BOOL",
}  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on packages and dims that concern nobody here off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
