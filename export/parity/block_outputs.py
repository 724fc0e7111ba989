"""Tensors that a graph's named modules hand to each other, and a copy of a graph that returns them as outputs.

Knows nothing of golden cases or engines. Runs on the device too: it needs onnx, but neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.export.graph.blocks import block_of
from bridge_stg.export.graph.graph_check import load_graph
from bridge_stg.runtime.bundle.bundle import GRAPHS, Bundle, file_sha256
from bridge_stg.runtime.bundle.manifest import TensorSpec

PREFIX = "block_output."
"""Prefix of the names of added outputs."""

NAMELESS = {"Conv": "vision_encoder.patch_embed"}
"""Operators that the exporter writes outside of any module, and the block they belong to."""

_CACHE = re.compile(r"(present|new)_(key|value)_\d+")
"""Outputs that are written into the KV cache: variants differ in them."""


@dataclass(frozen=True)
class BlockOutput:
    """A tensor that leaves a named module.

    Attributes:
        module: path of the module in the torch model.
        block: public name of the block, such as `language_model.layers.3.mlp`.
        node: name of the node that computes it.
        tensor: name in the graph.
    """

    module: str
    block: str
    node: str
    tensor: str


def block_outputs(path: str | os.PathLike[str]) -> list[BlockOutput]:
    """Return every tensor that a named module of a graph hands to another module, in the graph's order."""
    graph = load_graph(path).graph
    readers: defaultdict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(_module(node))
    returned = {value.name for value in graph.output if not _CACHE.fullmatch(value.name)}
    constants = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if all(not name or name in constants for name in node.input):  # transposes or dequantizes a weight
            constants.update(node.output)
            continue
        module, block = _module(node), None
        if module != "lm_head" and "." not in module:  # a wrapper of the model, not one of its modules
            if node.op_type not in NAMELESS:
                continue
            block = NAMELESS[node.op_type]
        leaves = (n for n in node.output if n and (n in returned or readers[n] - {module} or block))
        found += [BlockOutput(module, block or block_of(module), node.name, tensor) for tensor in leaves]
    return found


def pair_outputs(first: Sequence[BlockOutput], second: Sequence[BlockOutput]) -> list[tuple[BlockOutput, BlockOutput]]:
    """Match the block outputs of two graphs of one model, in the order of the first.

    Modules with equally many outputs in both graphs match in order; other outputs match by the name of their node.
    """
    count, other = Counter(b.module for b in first), Counter(b.module for b in second)
    in_order: defaultdict[str, list[BlockOutput]] = defaultdict(list)
    for output in second:
        in_order[output.module].append(output)
    by_node = {output.node: output for output in second}
    pairs = []
    for output in first:
        if count[output.module] == other[output.module]:
            pairs.append((output, in_order[output.module].pop(0)))
        elif output.node in by_node:
            pairs.append((output, by_node[output.node]))
    return pairs


def expose_outputs(bundle: Bundle, name: str, variant: str, outputs: Sequence[BlockOutput], folder: Path) -> Bundle:
    """Copy one graph into a folder, with block outputs as further outputs: float32, flat, named PREFIX + index.

    The weights beside it are hard links, or copies where the file system has none: engines follow no symbolic link out
    of a graph's folder. Returns a bundle of this graph alone, which is not checked and has no fingerprint.
    """
    from onnx import TensorProto, helper

    model = load_graph(bundle.graph_path(name, variant))
    for place, output in enumerate(outputs):
        cast, flat = f"{PREFIX}{place}.fp32", f"{PREFIX}{place}"
        model.graph.node.append(helper.make_node("Cast", [output.tensor], [cast], name=cast, to=TensorProto.FLOAT))
        model.graph.node.append(helper.make_node("Reshape", [cast, f"{PREFIX}flat"], [flat], name=flat))
        model.graph.output.append(helper.make_tensor_value_info(flat, TensorProto.FLOAT, [f"size{place}"]))
    model.graph.initializer.append(helper.make_tensor(f"{PREFIX}flat", TensorProto.INT64, [1], [-1]))
    file = folder / GRAPHS / name / f"{variant}.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.SerializeToString())
    graph = bundle.graph(name, variant)
    for entry in graph.data:
        if not (folder / entry.path).exists():
            try:
                os.link(bundle.path / entry.path, folder / entry.path)
            except OSError:
                shutil.copyfile(bundle.path / entry.path, folder / entry.path)
    added = tuple(TensorSpec(f"{PREFIX}{i}", "float32", (f"size{i}",)) for i in range(len(outputs)))
    changed = dataclasses.replace(
        graph,
        outputs=(*graph.outputs, *added),
        file=file.relative_to(folder).as_posix(),
        size=file.stat().st_size,
        sha256=file_sha256(file),
        derived_from=None,
    )
    return Bundle(folder, dataclasses.replace(bundle.manifest, graphs={name: {variant: changed}}, fingerprint=""))


def _module(node: Any) -> str:
    return str(node.name).rpartition("/")[0]
