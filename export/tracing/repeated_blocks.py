"""Trace one block of each structure and repeat its nodes for the others, so that the depth of a model costs little.

While a model is traced, its blocks run through `RepeatedBlocks.run`. The first block of a structure becomes nodes
between marks at its inputs and outputs; each further one is a single node `Block`, which `expand` replaces by a copy of
these nodes with its own weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bridge_stg.export.tracing.lowering import DOMAIN, GraphCache
from bridge_stg.model.recompute import Recomputed

INPUT, OUTPUT, BLOCK = "BlockInput", "BlockOutput", "Block"
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a traced node: the paths of the modules that contain it, as a list in text."""

WeightOf = Callable[[ir.Value, str, str], "ir.Value | None"]
"""Returns the weight in the second path's block that has the place of this one in the first path's; None: the value is
no weight."""


@dataclass(frozen=True)
class _Structure:
    """The number of a structure, and the shapes and dtypes of what its blocks return and write."""

    number: int
    shapes: Sequence[Sequence[int | torch.SymInt]]
    dtypes: Sequence[torch.dtype]


class RepeatedBlocks:
    """The blocks of one trace of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._structures: dict[Any, _Structure] = {}

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Run the module's blocks through `run` inside the block."""
        holders = [part for part in self._module.modules() if isinstance(part, Recomputed)]
        for holder in holders:
            vars(holder)["run_block"] = self.run
        try:
            yield
        finally:
            for holder in holders:
                del vars(holder)["run_block"]

    def run(self, block: Callable[..., Any], *args: Any, **options: Any) -> Tensor:
        """Return the output of a block as `Recomputed.run_block` does; a `GraphCache` among the options is updated."""
        leaves, spec = pytree.tree_flatten((args, options))
        module = next(part for part in (block, *leaves) if isinstance(part, nn.Module))
        cache = next((leaf for leaf in leaves if isinstance(leaf, GraphCache)), None)
        slots = [] if cache is None else [2 * _layer_index(module), 2 * _layer_index(module) + 1]
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if cache is not None:
            inputs += [*(cache.past[slot] for slot in slots), cache.cache_position]
        path, key = self._paths[id(module)], _structure_key(block, module, leaves, inputs)
        known = self._structures.get(key)
        if known is not None:
            about = {"structure": known.number, "path": path}
            outputs = torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{BLOCK}", inputs, about, dtypes=known.dtypes, shapes=known.shapes, version=1
            )
        else:
            about = {"structure": len(self._structures), "path": path}
            outputs = _run_marked(block, leaves, spec, inputs=inputs, slots=slots, about=about)
            shapes, dtypes = [tensor.shape for tensor in outputs], [tensor.dtype for tensor in outputs]
            self._structures[key] = _Structure(len(self._structures), shapes, dtypes)
        if cache is not None:
            for slot, tensor in zip(slots, outputs[1:], strict=True):
                cache.written[slot] = tensor
        return outputs[0]


def _run_marked(
    block: Callable[..., Any], leaves: Sequence[Any], spec: pytree.TreeSpec, *, inputs: Sequence[Tensor],
    slots: Sequence[int], about: Mapping[str, Any],
) -> list[Tensor]:  # fmt: skip
    """Run a block with marks at its inputs and outputs.

    Args:
        block: the block.
        leaves: its arguments, flattened.
        spec: how they are unflattened.
        inputs: the tensors among them, then those of its slots of the cache, and the cache's position.
        slots: indices of its keys and values in the cache; empty without a cache.
        about: attributes of the marks.

    Returns:
        The marked output, then what the block writes to its slots.
    """
    marked = iter([_mark(INPUT, tensor, {**about, "index": index}) for index, tensor in enumerate(inputs)])
    leaves = [next(marked) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    cache = next((copy.copy(leaf) for leaf in leaves if isinstance(leaf, GraphCache)), None)
    if cache is not None:
        cache.past, cache.written = list(cache.past), list(cache.written)
        for slot in slots:
            cache.past[slot] = cache.written[slot] = next(marked)
        cache.cache_position = next(marked)
    leaves = [cache if isinstance(leaf, GraphCache) else leaf for leaf in leaves]
    args, options = pytree.tree_unflatten(leaves, spec)
    made = [block(*args, **options)]
    made += [] if cache is None else [cache.written[slot] for slot in slots]
    return [_mark(OUTPUT, tensor, about) for tensor in made]


def _layer_index(layer: Any) -> int:
    """Return which keys and values of the cache a decoder layer of transformers updates."""
    index: int = layer.self_attn.layer_idx
    return index


def _structure_key(block: Any, module: nn.Module, leaves: Sequence[Any], inputs: Sequence[Tensor]) -> Any:
    """Return what decides a block's nodes: code, parts with plain attributes, weights' shapes, and its arguments."""
    plain = (bool, int, float, str, type(None))
    parts = [
        (path, type(part), sorted((k, v) for k, v in vars(part).items() if isinstance(v, plain) and k != "layer_idx"))
        for path, part in module.named_modules()
    ]
    weights = [(name, tuple(value.shape)) for name, value in module.named_parameters()]
    given = [type(leaf) if isinstance(leaf, (Tensor, nn.Module, GraphCache)) else leaf for leaf in leaves]
    shapes = [(tensor.dtype, [str(size) for size in tensor.shape]) for tensor in inputs]
    return repr((getattr(block, "__func__", type(block)), parts, weights, given, shapes))


def _mark(name: str, tensor: Tensor, about: Mapping[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", (tensor,), dict(about), dtype=tensor.dtype, shape=tensor.shape, version=1
    )


def expand(graph: ir.Graph, weight_of: WeightOf) -> None:
    """Replace the nodes `Block` by copies of the traced blocks, and remove the marks."""
    nodes = [node for node in graph if node.domain == DOMAIN]
    traced = {
        number: _TracedBlock(graph, [node for node in nodes if _about(node)[0] == number], weight_of)
        for number in {_about(node)[0] for node in nodes}
    }
    for node in nodes:
        if node.op_type == BLOCK:
            traced[_about(node)[0]].copy_to(node)
    for node in nodes:
        if node.op_type != BLOCK:
            _replace(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)


class _TracedBlock:
    """The nodes of the first block of a structure, as far as they depend on its inputs or weights."""

    def __init__(self, graph: ir.Graph, nodes: Sequence[ir.Node], weight_of: WeightOf) -> None:
        self._graph, self._weight_of = graph, weight_of
        # Marks of inputs that only another variant reads are gone.
        self._inputs = {n.outputs[0]: n.attributes["index"].as_int() for n in nodes if n.op_type == INPUT}
        self._outputs = [node.inputs[0] for node in nodes if node.op_type == OUTPUT]
        self._path = _about(nodes[0])[1]
        needed, left = set[ir.Node](), [value.producer() for value in self._outputs]
        while left:
            node = left.pop()
            if node is not None and node not in needed and node.op_type != INPUT:
                needed.add(node)
                left += [value.producer() for value in node.inputs if value is not None]
        own, self._nodes = set(self._inputs), list[ir.Node]()
        for node in graph:
            if node in needed and any(self._is_own(value, own) for value in node.inputs):
                self._nodes.append(node)
                own.update(node.outputs)

    def _is_own(self, value: ir.Value | None, own: set[ir.Value]) -> bool:
        return value is not None and (value in own or self._weight_of(value, self._path, self._path) is not None)

    def copy_to(self, block: ir.Node) -> None:
        """Replace a node `Block` by copies of the nodes, with the weights of its own path."""
        path = _about(block)[1]
        values: dict[ir.Value, ir.Value | None] = {v: block.inputs[i] for v, i in self._inputs.items()}
        for node in self._nodes:
            inputs = []
            for value in node.inputs:
                if value is not None and value not in values:
                    values[value] = self._weight_of(value, self._path, path) or value
                inputs.append(None if value is None else values[value])
            made = ir.Node(
                node.domain, node.op_type, inputs, node.attributes, overload=node.overload, version=node.version,
                num_outputs=len(node.outputs), name=node.name,
                metadata_props={k: v.replace(f"'{self._path}", f"'{path}") for k, v in node.metadata_props.items()},
            )  # fmt: skip
            for old, new in zip(node.outputs, made.outputs, strict=True):
                new.name, new.type, new.shape = f"{old.name}@{path}", old.type, old.shape
                values[old] = new
            self._graph.insert_before(block, made)
        for old, output in zip(block.outputs, self._outputs, strict=True):
            new = values[output]
            assert new is not None
            _replace(old, new)
        self._graph.remove(block, safe=True)


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Replace a value; an output of the graph keeps its name."""
    name = old.name if old.is_graph_output() else new.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name


def _about(node: ir.Node) -> tuple[int, str]:
    return node.attributes["structure"].as_int(), node.attributes["path"].as_string()
