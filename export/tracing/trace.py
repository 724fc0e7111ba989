"""Trace one graph of the model in one variant, and give it the contract's names."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_stg.checkpoint.checkpoint import checkpoint_key
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.tracing.graphs import GRAPH_MODULES, dynamic_shapes, example
from bridge_stg.export.tracing.lowering import Lowering
from bridge_stg.export.tracing.precision import FP32, Precision, lower_precision
from bridge_stg.export.tracing.repeated_blocks import RepeatedBlocks, expand
from bridge_stg.export.tracing.simplify import simplify
from bridge_stg.export.tracing.skeleton import fake_parameters
from bridge_stg.export.tracing.weights import StoredWeight
from bridge_stg.model.model import KEY_PREFIXES, BridgeSTG
from bridge_stg.runtime.bundle.contracts import graph_contract
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError

IR_VERSION = {18: 8, 24: 10}
"""IR version by opset; onnxruntime 1.23 reads versions up to 10, and no graph needs a newer one."""


def trace_graph(
    name: str, model: BridgeSTG, store: WeightStore, lowering: Lowering, *, precision: Precision = FP32
) -> tuple[GraphSpec, ir.Model]:
    """Trace one graph without the values of its weights, which are read when they are written.

    The trace itself is fp32, of a model in eval mode; parameters may be on the meta device, buffers must have values.

    Returns:
        The contract and the graph: initializers have the names of the checkpoint, nodes those of module and operator.

    Raises:
        EngineError: the trace differs from the contract, such as by a fixed dim.
    """
    about: dict[str, Any] = {"variant": lowering.name, "opset": lowering.opset, "cache_update": lowering.cache_update}
    contract = graph_contract(name, model.spec, **about)
    module = GRAPH_MODULES[name](model, lowering).eval()
    blocks = RepeatedBlocks(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with lowering.applied(model), fake_parameters(model, mode), blocks.traced(), torch.no_grad(), _quiet():
        with mode:
            traced = torch.export.export(
                module,
                example(contract, model.spec),
                dynamic_shapes=dynamic_shapes(contract),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=lowering.opset,
            input_names=[tensor.name for tensor in contract.inputs],
            output_names=[tensor.name for tensor in contract.outputs],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model
    _bind_weights(graph.graph, model, store)
    simplify(
        graph,
        modules=lambda scope: module_key(f"{scope}.").rstrip("."),
        expand=lambda: expand(graph.graph, partial(_weight_of, graph.graph)),
    )
    about |= {"io_dtype": precision.io_dtype, "cache_dtype": precision.cache_dtype, "precision": precision.name}
    final = graph_contract(name, model.spec, **about)
    lower_precision(graph, final, precision)
    _apply_contract(graph.graph, final)
    graph.ir_version = IR_VERSION[lowering.opset]
    graph.graph.name = name
    graph.producer_name, graph.producer_version = "bridge-stg", None
    return final, graph


def module_key(name: str) -> str:
    """Return the name in the checkpoint of a name in `BridgeSTG`; names that a checkpoint does not have stay."""
    return checkpoint_key(name) if name.startswith(tuple(KEY_PREFIXES)) else name


def _bind_weights(graph: ir.Graph, model: BridgeSTG, store: WeightStore) -> None:
    """Name parameters and buffers as in a checkpoint, where weights have their values; buffers keep theirs.

    A tied tensor gets the name that the checkpoint has.
    """
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    shared = {name: first[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
    for name, value in list(graph.initializers.items()):
        value.name = key = module_key(shared.get(name, name))
        if key in store:
            assert value.shape is not None and value.dtype is not None
            shape = [int(size) for size in value.shape]
            value.const_value = StoredWeight(store, key, dtype=value.dtype, shape=shape)


def _weight_of(graph: ir.Graph, weight: ir.Value, path: str, other: str) -> ir.Value | None:
    """Return the weight of a block that a weight of another block corresponds to; None if this is no block's weight.

    `path` and `other` are the paths of the blocks in the traced module.
    """
    prefix = module_key(f"{path}.")
    stored = weight.const_value
    if not isinstance(stored, StoredWeight) or not stored.key.startswith(prefix):
        return None
    key = module_key(f"{other}.") + stored.key.removeprefix(prefix)
    if key not in graph.initializers:
        made = StoredWeight(stored.store, key, dtype=stored.dtype, shape=[int(size) for size in stored.shape])
        graph.register_initializer(ir.Value(name=key, shape=ir.Shape(made.shape), type=weight.type, const_value=made))
    return graph.initializers[key]


def _apply_contract(graph: ir.Graph, contract: GraphSpec) -> None:
    """Check inputs and outputs against the contract, and give them its dims."""
    sides = (("input", graph.inputs, contract.inputs), ("output", graph.outputs, contract.outputs))
    for kind, values, tensors in sides:
        if [value.name for value in values] != [tensor.name for tensor in tensors]:
            found = ", ".join(str(value.name) for value in values)
            message = f"{contract}: the trace's {kind}s are {found}, not those of the contract"
            raise EngineError("export.contract_mismatch", message)
        for value, tensor in zip(values, tensors, strict=True):
            dims, dtype = list(value.shape or ()), ir.DataType.from_numpy(np.dtype(tensor.dtype))
            pairs = zip(dims, tensor.dims, strict=False)  # a symbol of the trace may have another name
            wrong = any(size != dim and int in (type(size), type(dim)) for size, dim in pairs)
            if wrong or len(dims) != len(tensor.dims) or value.dtype != dtype:
                found = f"the trace's {kind} {value.name!r} is {value.dtype} {value.shape}"
                raise EngineError("export.contract_mismatch", f"{contract}: {found}, but the contract says {tensor}")
            value.shape = ir.Shape(tensor.dims)
            value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of the exporter about packages and dims."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
