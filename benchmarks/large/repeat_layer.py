"""Make a graph of a language model deeper: repeat its last decoder layer, whose weights all repetitions share."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto

LAYER = re.compile(r"model\.language_model\.layers\.(\d+)[./]")
CACHE = re.compile(r"^((?:past|present|new)_(?:key|value)_)(\d+)")


def deepened(source: Path, layers: int, folder: Path) -> Path:
    """Write a graph with `layers` decoder layers into a folder, with links to its data files; return its path."""
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    last = max(int(found[1]) for node in graph.node if (found := LAYER.match(node.name)))
    block = [node for node in graph.node if (found := LAYER.match(node.name)) and int(found[1]) == last]
    end = block_end(model, block)
    begin = next(node.input[0] for node in block if node.name.endswith(f"layers.{last}/Add"))
    made: list[NodeProto] = []
    before = end
    for index in range(last + 1, layers):
        names = {output: _renamed(output, last, index) for node in block for output in node.output}
        names |= {name: _renamed(name, last, index) for node in block for name in node.input if CACHE.match(name)}
        names[begin] = before
        for node in block:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{node.name}_{index}"
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names[name] for name in node.output]
            made.append(copy)
        before = names[end]
        for values in (graph.input, graph.output):
            values.extend([_value(value, last, index) for value in values if _cache_index(value.name) == last])
    for node in graph.node:
        if node not in block:
            node.input[:] = [before if name == end else name for name in node.input]
    graph.node.extend(made)
    _sort(graph)
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.parent.glob("*.data"):
        (link := folder / file.name).unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    path = folder / source.name
    onnx.save(model, path)
    return path


def block_end(model: ModelProto, block: list[NodeProto]) -> str:
    """Return the residual stream that a block writes: its only value that later nodes read."""
    written = {output for node in block for output in node.output}
    read = {name for node in model.graph.node if node not in block for name in node.input}
    (end,) = written & read
    return end


def _cache_index(name: str) -> int | None:
    found = CACHE.match(name)
    return int(found[2]) if found else None


def _renamed(name: str, last: int, index: int) -> str:
    return CACHE.sub(rf"\g<1>{index}", name) if _cache_index(name) == last else f"{name}_layer_{index}"


def _value(value: ValueInfoProto, last: int, index: int) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = _renamed(value.name, last, index)
    return copy


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes after those whose outputs they read."""
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    waiting, done = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        ready_names = {output for node in ready for output in node.output}
        known |= ready_names
        done += ready
        ids = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in ids]
    del graph.node[:]
    graph.node.extend(done)
