"""What TensorRT made of a graph, read from the engine it wrote: products and their input types, attention, by block.

An engine cannot be opened without a GPU, but TensorRT's compiler writes its program into it as text: one statement a
kernel, with the graph's nodes that went into it, and the type of every tensor. Kernels are chosen on the device, so
this tells what was fused and in which precision, never how fast it is.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import EngineError

TYPES = {
    "float": "fp32", "half": "fp16", "bfloat16": "bf16", "int8": "int8", "int4": "int4", "fp8": "fp8",
    "float32": "fp32", "float16": "fp16",
}  # fmt: skip
NUMBERS, INTEGERS = frozenset(TYPES.values()), ("int8", "int4")
FUSED_ATTENTION = ("mha", "fmha", "flash")
PRODUCT_KINDS = ("fully_connected", "corrltn", "convolution", "gemm", "matmul")
WEIGHTED, ATTENTION = ("MatMul", "Gemm", "Conv"), ("Attention", "Softmax")

_MAIN = re.compile(rb"\nmain \{\n(.*?)\n\}\n", re.DOTALL)
_TENSOR = re.compile(r'^ +tensor=\{(?:.*? const_payload_size=(\d+))?.*? name="([^"]+)".*? type=(\w+)', re.MULTILINE)
_STATEMENT = re.compile(r'^ +(\w+)=\{ ?name=(?:"([^"]*)"|(\S+))(.*)$', re.MULTILINE)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_INPUTS = re.compile(r"(?:^| )(?:input|input_args|args)=\{ ?([^}]*)\}")


@dataclass(frozen=True)
class Kernel:
    """One statement of a program.

    Attributes:
        kind: `product`, `attention` (fused), or `other`.
        nodes: names of the graph's nodes in it.
        activations, weights: types of what a product multiplies; empty: not told.
    """

    kind: str
    nodes: tuple[str, ...]
    activations: str = ""
    weights: str = ""


@dataclass(frozen=True)
class Node:
    """A product by weights or an attention of the graph, and the block it belongs to."""

    name: str
    operator: str
    block: str


def read_programs(plan: str | os.PathLike[str]) -> list[list[Kernel]]:
    """Return the kernels of each profile's program, in the order in which they run.

    Raises:
        EngineError: the file holds no program as text.
    """
    with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        texts = [match for match in _MAIN.finditer(content) if b"[ONNX Layer: " in match[1]]
        programs = []
        for match in texts:
            begin = content.rfind(b"\ndescriptors {\n", 0, match.start())
            tensors = _tensors(content[begin : match.start()].decode("latin-1"))
            kernels = list(_kernels(match[1].decode("latin-1"), tensors))
            if len(kernels) > 1:  # parts of a kernel are programs of their own
                programs.append(kernels)
    if not programs:
        raise EngineError(f"{plan}: this engine holds no program as text; open it on a device to see its layers")
    return _of_whole_graph(programs)


def _of_whole_graph(programs: list[list[Kernel]]) -> list[list[Kernel]]:
    """Leave out programs of single kernels: a graph's own names far more nodes."""
    counts = [len({node for kernel in kernels for node in kernel.nodes}) for kernels in programs]
    return [kernels for kernels, count in zip(programs, counts, strict=True) if 2 * count > max(counts)]


Tensors = Mapping[str, tuple[str, int]]
"""By name, the type of a tensor and the bytes of a constant (0: it is none)."""


def _tensors(text: str) -> Tensors:
    return {name: (TYPES.get(kind, kind), int(size or 0)) for size, name, kind in _TENSOR.findall(text)}


def _kernels(text: str, tensors: Tensors) -> Iterator[Kernel]:
    for statement, quoted, plain, rest in _STATEMENT.findall(text):
        if statement in ("signal", "wait", "shape_call"):
            continue
        name = quoted or plain
        found = _INPUTS.search(rest)
        inputs = [text.removesuffix("^deref") for text in re.findall(r'"([^"]*)"', found[1])] if found else []
        yield Kernel(
            _kind(statement, name), tuple(dict.fromkeys(_NODE.findall(name + rest))), *_operands(inputs, tensors)
        )


def _operands(inputs: Sequence[str], tensors: Tensors) -> tuple[str, str]:
    """Return the types of activations and weights: the largest constant, and what stands before it."""
    known = [tensors.get(name, ("", 0)) for name in inputs]
    sizes = [size if kind in NUMBERS else 0 for kind, size in known]
    if not any(sizes):
        return "", ""
    place = sizes.index(max(sizes))
    weights = known[place][0]
    before = known[place - 1] if place else ("", 0)
    if before[1] == 0 and before[0] in NUMBERS:
        return before[0], weights
    others = [kind for kind, size in known if size == 0 and kind in NUMBERS]
    return (others[0] if others and weights in INTEGERS else weights), weights


def _kind(statement: str, name: str) -> str:
    if any(word in name.lower() for word in FUSED_ATTENTION):
        return "attention"
    fused_product = statement == "runtime_fusion" and re.search(r"(Fc|Gemm|Conv|Mm|Bmm)", name)
    return "product" if statement in PRODUCT_KINDS or fused_product else "other"


def report_by_block(programs: list[list[Kernel]], nodes: list[Node]) -> dict[str, dict[str, dict[str, int]]]:
    """Count, by block, what the products read and whether attention was fused; of the profile that did worst.

    Returns:
        block → `products` and `attention` → how many of each kind. Products: the type of the activations, with the
        weights' behind it where it differs (`fp16 × int4`), or `unknown` where no kernel names the node. Attention:
        `fused` or `unfused`.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for node in nodes:
        group = "attention" if node.operator in ATTENTION else "products"
        seen = [_attention_of(node.name, p) if group == "attention" else _product_of(node.name, p) for p in programs]
        worst = max(seen, key=_rank)
        counts = found.setdefault(node.block, {}).setdefault(group, {})
        counts[worst] = counts.get(worst, 0) + 1
    return found


def _attention_of(name: str, kernels: list[Kernel]) -> str:
    return "fused" if any(k.kind == "attention" and name in k.nodes for k in kernels) else "unfused"


def _product_of(name: str, kernels: list[Kernel]) -> str:
    """Describe the kernel that multiplies: of those that name the node, a product before others."""
    named = sorted((k for k in kernels if name in k.nodes and k.weights), key=lambda k: k.kind != "product")
    if not named:
        return "unknown"
    kernel = named[0]
    return kernel.weights if kernel.activations == kernel.weights else f"{kernel.activations} × {kernel.weights}"


def _rank(word: str) -> int:
    order = ("fused", "int8", "int4", "fp8", "fp16", "bf16", "fp32", "unknown", "unfused")
    return order.index(word.split()[0])


def graph_nodes(path: str | os.PathLike[str]) -> list[Node]:
    """Return the products by weights and the attentions of a graph, in its order.

    An attention that lies in no module of its own belongs where its queries come from.
    """
    import onnx

    from bridge_stg.export.graph.blocks import block_of, public_name

    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    weights = {initializer.name for initializer in graph.initializer}
    found = []
    for node in graph.node:
        weighted = node.op_type in WEIGHTED and any(_stored(name, makers, weights) for name in node.input[1:2])
        if weighted:
            found.append(Node(node.name, node.op_type, block_of(node.name)))
        elif node.op_type in ATTENTION:
            module = node.name.rpartition("/")[0]  # itself the block
            block = public_name(module) if "." in module else block_of(_with_module(node, makers).name)
            found.append(Node(node.name, node.op_type, block))
    return found


def _stored(name: str, makers: Mapping[str, Any], weights: set[str]) -> bool:
    while name not in weights:
        node = makers.get(name)
        if node is None or node.op_type not in ("Transpose", "DequantizeLinear", "Cast"):
            return False
        name = node.input[0]
    return True


def _with_module(node: Any, makers: Mapping[str, Any]) -> Any:
    """Go up from a node's first input to the first node that lies in a module."""
    at = node
    while at is not None and "." not in at.name.rpartition("/")[0]:
        at = next((makers[name] for name in at.input if name in makers), None)
    return node if at is None else at


def plan_table(report: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Return a report for people: blocks that are alike in one line, then what stayed unfused or in float."""
    lines: dict[str, list[str]] = {}
    for block, groups in report.items():
        cells = [
            ", ".join(f"{count} {word}" for word, count in groups.get(g, {}).items()) for g in ("products", "attention")
        ]
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", block)
        lines.setdefault(f"  {kind:44} products {cells[0] or 'none':28} attention {cells[1] or 'none'}", []).append(
            block
        )
    return "\n".join(f"{line}  ({len(blocks)} blocks)" if len(blocks) > 1 else line for line, blocks in lines.items())


def plan_summary(report: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Sum a report over its blocks."""
    total: dict[str, dict[str, int]] = {}
    for groups in report.values():
        for group, counts in groups.items():
            for word, count in counts.items():
                total.setdefault(group, {})[word] = total.get(group, {}).get(word, 0) + count
    return total


def read_plan_report(plan: Path, graph: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Return `report_by_block` of an engine and the graph that it was compiled from. Raises as `read_programs`."""
    return report_by_block(read_programs(plan), graph_nodes(graph))
