"""Borders between the named modules of a graph, and a copy of a graph that gives them out as further outputs.

Knows nothing of golden cases and of engines. Runs on the device too: it needs onnx, neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.runtime.bundle.bundle import GRAPHS, Bundle, file_sha256
from bridge_stg.runtime.bundle.manifest import TensorSpec
from bridge_stg.runtime.errors import EngineError

PREFIX = "tap."
"""What the names of added outputs begin with."""

PUBLIC_NAMES = (
    ("model.visual.", "vision_encoder."),
    ("model.language_model.", "language_model."),
    ("lm_head", "language_model.lm_head"),
    ("bridging.", "language_model.bridging."),
)
"""How a module's path in the torch model becomes the name that reports use."""

LISTS = ("layers", "blocks", "deepstack_merger_list", "box_heads", "presence_heads")
"""Modules that are lists: the place in the list belongs to a block's name."""

NAMELESS = {"Conv": "vision_encoder.patch_embed"}
"""Products that the exporter writes as functions, outside of any module, by operator and the block they belong to."""

_CACHE = re.compile(r"(present|new)_(key|value)_\d+")
"""What is written into the KV cache: lowerings differ in it."""


@dataclass(frozen=True)
class Border:
    """A tensor that leaves a named module.

    Attributes:
        module: the module's path in the torch model.
        block: the part of the model that it lies in, such as `language_model.layers.3.mlp`.
        node: the node that computes it.
        tensor: its name in the graph.
    """

    module: str
    block: str
    node: str
    tensor: str


def block_of(module: str) -> str:
    """Return the public name of the block that a module lies in.

    `model.language_model.layers.3.mlp.gate_proj` → `language_model.layers.3.mlp`.
    """
    for inner, public in PUBLIC_NAMES:
        if module.startswith(inner):
            module = public + module[len(inner) :]
            break
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part in LISTS), None)
    if at is None:
        return ".".join(parts if len(parts) <= 2 else parts[:-1])
    inside = 2 if parts[at] in ("layers", "blocks") else 1  # a layer's parts are blocks; of a head it is the head
    return ".".join(parts[: at + 1 + inside])


def borders(path: str | os.PathLike[str]) -> list[Border]:
    """Return every tensor that a named module of a graph hands to another one, in the graph's order.

    Raises:
        EngineError: onnx is missing, or the file is no ONNX graph.
    """
    graph = _load(Path(path)).graph
    readers: defaultdict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(_module(node))
    given = {value.name for value in graph.output if not _CACHE.fullmatch(value.name)}
    fixed = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if all(not name or name in fixed for name in node.input):  # a weight that is laid out or dequantized
            fixed.update(node.output)
            continue
        module = _module(node)
        if not _is_named(module) and node.op_type not in NAMELESS:
            continue
        block = NAMELESS.get(node.op_type) if not _is_named(module) else None
        leaves = (n for n in node.output if n and (n in given or readers[n] - {module} or block))
        found += [Border(module, block or block_of(module), node.name, tensor) for tensor in leaves]
    return found


def paired(first: Sequence[Border], second: Sequence[Border]) -> list[tuple[Border, Border]]:
    """Match the borders of two graphs of one model, in the order of the first.

    A module that both leave equally often matches in order; of another one, borders match whose nodes share a name.
    """
    count, other = Counter(b.module for b in first), Counter(b.module for b in second)
    in_order: defaultdict[str, list[Border]] = defaultdict(list)
    for border in second:
        in_order[border.module].append(border)
    by_node = {border.node: border for border in second}
    pairs = []
    for border in first:
        if count[border.module] == other[border.module]:
            pairs.append((border, in_order[border.module].pop(0)))
        elif border.node in by_node:
            pairs.append((border, by_node[border.node]))
    return pairs


def write_tapped(bundle: Bundle, name: str, variant: str, taps: Sequence[Border], folder: Path) -> Bundle:
    """Copy one graph into a folder, with taps as further outputs: float32, flat, named PREFIX + place in `taps`.

    Args:
        folder: gets graphs/<name>/<variant>.onnx, and beside it the weights as hard links (copies where the file
            system has none: engines follow no symbolic link out of a graph's folder).

    Returns:
        A bundle of this one graph; it is not checked, has no fingerprint, and lasts as long as the folder.

    Raises:
        EngineError: onnx is missing.
    """
    from onnx import TensorProto, helper

    source = bundle.graph_path(name, variant)
    model = _load(source)
    for place, border in enumerate(taps):
        cast, flat = f"{PREFIX}{place}.fp32", f"{PREFIX}{place}"
        model.graph.node.append(helper.make_node("Cast", [border.tensor], [cast], name=cast, to=TensorProto.FLOAT))
        model.graph.node.append(helper.make_node("Reshape", [cast, f"{PREFIX}flat"], [flat], name=flat))
        model.graph.output.append(helper.make_tensor_value_info(flat, TensorProto.FLOAT, [f"tapped{place}"]))
    model.graph.initializer.append(helper.make_tensor(f"{PREFIX}flat", TensorProto.INT64, [1], [-1]))
    file = folder / GRAPHS / name / f"{variant}.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.SerializeToString())
    graph = bundle.graph(name, variant)
    for entry in graph.data:
        _share(bundle.path / entry.path, folder / entry.path)
    outputs = tuple(TensorSpec(f"{PREFIX}{i}", "float32", (f"tapped{i}",)) for i in range(len(taps)))
    relative = file.relative_to(folder).as_posix()
    tapped = dataclasses.replace(
        graph,
        outputs=(*graph.outputs, *outputs),
        file=relative,
        size=file.stat().st_size,
        sha256=file_sha256(file),
        derived_from=None,
    )
    manifest = dataclasses.replace(bundle.manifest, graphs={name: {variant: tapped}}, fingerprint="")
    return Bundle(folder, manifest)


def require_onnx() -> None:
    """Raise EngineError if onnx cannot be imported."""
    try:
        importlib.import_module("onnx")
    except ImportError as error:
        raise EngineError(
            f"narrowing a drift to a block (--bisect) needs the package onnx, which cannot be imported ({error}). "
            "Install it: pip install onnx"
        ) from error


def _load(path: Path) -> Any:
    """Read a graph without its weights."""
    require_onnx()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(os.fspath(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise EngineError(f"{path}: cannot be read as an ONNX graph ({error})") from error


def _module(node: Any) -> str:
    return str(node.name).rpartition("/")[0]


def _is_named(module: str) -> bool:
    """Whether a node's name tells a module of the model; what wraps the model has a name without a dot."""
    return module == "lm_head" or "." in module


def _share(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
