"""Trace one graph of the model, make its variants, and give them the contract's names."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_stg.checkpoint.checkpoint import checkpoint_key
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.tracing.graphs import GRAPH_MODULES, dynamic_shapes, example, with_shared_dims
from bridge_stg.export.tracing.lowering import LOWERINGS, TRACED, Lowering
from bridge_stg.export.tracing.precision import FP32, Precision, lower_precision
from bridge_stg.export.tracing.repeated_blocks import RepeatedBlocks, expand
from bridge_stg.export.tracing.simplify import simplify
from bridge_stg.export.tracing.skeleton import fake_parameters
from bridge_stg.export.tracing.variants import share_dims, variant_of
from bridge_stg.export.tracing.weights import StoredWeight
from bridge_stg.model.model import KEY_PREFIXES, BridgeSTG
from bridge_stg.runtime.bundle.contracts import graph_contract
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError

IR_VERSION = {18: 8, 24: 10}
"""IR version by opset; onnxruntime 1.23 reads versions up to 10, and no graph needs a newer one."""


def trace_graph(
    name: str, model: BridgeSTG, store: WeightStore, variants: Sequence[str], *, precision: Precision = FP32
) -> list[tuple[GraphSpec, ir.Model]]:
    """Trace one graph once, and make each variant of it, without the values of its weights.

    The trace itself is fp32, of a model in eval mode; parameters may be on the meta device, buffers must have values.
    Weights are read when they are written.

    Returns:
        The contract and the graph of each variant: initializers have the names of the checkpoint, nodes those of module
        and operator.

    Raises:
        EngineError: the trace differs from the contract, such as by a fixed dim.
    """
    traced = _traced(name, model)
    _bind_weights(traced.graph, model, store)
    return [_finished(name, variant_of(traced, LOWERINGS[v]), model, LOWERINGS[v], precision) for v in variants]


def _traced(name: str, model: BridgeSTG) -> ir.Model:
    """Return the traced graph with the nodes of all variants."""
    contract = _traced_contract(name, model)
    module = GRAPH_MODULES[name](model, TRACED).eval()
    hook = module.register_forward_pre_hook(lambda _, tensors: with_shared_dims(contract, tensors))
    blocks = RepeatedBlocks(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with TRACED.applied(model), fake_parameters(model, mode), blocks.traced(), torch.no_grad(), _quiet():
        with mode:
            exported = torch.export.export(
                module,
                example(contract, model.spec),
                dynamic_shapes=dynamic_shapes(contract),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=TRACED.opset,
            input_names=[tensor.name for tensor in contract.inputs],
            output_names=[tensor.name for tensor in contract.outputs],
            optimize=False,
            verbose=False,
        )
    hook.remove()
    assert program is not None
    share_dims(program.model.graph)
    return program.model


def _traced_contract(name: str, model: BridgeSTG) -> GraphSpec:
    return graph_contract(name, model.spec, variant=TRACED.name, opset=TRACED.opset, cache_update=TRACED.cache_update)


def _finished(
    name: str, graph: ir.Model, model: BridgeSTG, lowering: Lowering, precision: Precision
) -> tuple[GraphSpec, ir.Model]:
    """Simplify the graph of a variant, and give it its precision and its contract."""
    simplify(
        graph,
        modules=lambda scope: module_key(f"{scope}.").rstrip("."),
        expand=lambda: expand(graph.graph, partial(_weight_of, graph.graph)),
    )
    contract = graph_contract(
        name, model.spec, variant=lowering.name, opset=lowering.opset, cache_update=lowering.cache_update,
        io_dtype=precision.io_dtype, cache_dtype=precision.cache_dtype, precision=precision.name,
    )  # fmt: skip
    pairs = zip(_traced_contract(name, model).outputs, contract.outputs, strict=True)
    names = {old.name: new.name for old, new in pairs}  # what is written to the cache has a name of its own
    for value in graph.graph.outputs:
        value.name = names.get(str(value.name), value.name)
    lower_precision(graph, contract, precision)
    _apply_contract(graph.graph, contract)
    graph.ir_version = IR_VERSION[lowering.opset]
    graph.graph.name = name
    graph.producer_name, graph.producer_version = "bridge-stg", None
    return contract, graph


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
