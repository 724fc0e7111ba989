"""Report the layers of an engine by block, read from its plan: input types of matmuls, and fused attention.

An engine cannot be opened without a GPU, but TensorRT's compiler writes its program into the plan as text: a statement
per kernel, with the names of the graph's nodes in it, and the type of every tensor. Kernels are chosen on the device,
so this shows what was fused and in which precision, but not how fast it is.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge_stg.export.graph.blocks import block_of, stored_weight
from bridge_stg.runtime.errors import EngineError

if TYPE_CHECKING:
    import onnx_ir as ir

TYPES = {
    "float": "fp32", "half": "fp16", "bfloat16": "bf16", "int8": "int8", "int4": "int4",
    "fp8": "fp8", "fp8_e4m3": "fp8", "fp4_e2m1": "nvfp4", "float32": "fp32", "float16": "fp16",
}  # fmt: skip
NUMBERS, INTEGERS = frozenset(TYPES.values()), ("int8", "int4")
FUSED_ATTENTION = ("mha", "fmha", "flash")
MATMUL_KINDS = ("fully_connected", "corrltn", "convolution", "gemm", "matmul")
WEIGHTED, ATTENTION = ("MatMul", "Gemm", "Conv"), ("Attention", "Softmax")
ORDER = ("fused", "int8", "int4", "nvfp4", "fp8", "fp16", "bf16", "fp32", "unknown", "unfused")
"""Words of a report, the best first."""
GROUPS = {"products": "matmuls", "attention": "attention"}
"""Keys of a report, which engine.json has too, and what tables call them."""

_MAIN = re.compile(rb"\nmain \{\n(.*?)\n\}\n", re.DOTALL)
_TENSOR = re.compile(
    r'^ +(?:sub_)?tensor=\{(?:.*? const_payload_size=(\d+))?.*? name="([^"]+?)(?:\^deref)?".*? type=(\w+)', re.MULTILINE
)
_STATEMENT = re.compile(r'^ +(\w+)=\{ ?name=(?:"([^"]*)"|(\S+))(.*)$', re.MULTILINE)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_INPUTS = re.compile(r"(?:^| )(?:input|input_args|args)=\{ ?([^}]*)\}")


@dataclass(frozen=True)
class Kernel:
    """One statement of a program.

    Attributes:
        kind: `matmul`, `attention` (fused), or `other`.
        nodes: names of the graph's nodes in it.
        activations, weights: types of a matmul's operands; empty if the program does not have them.
    """

    kind: str
    nodes: tuple[str, ...]
    activations: str = ""
    weights: str = ""


@dataclass(frozen=True)
class Node:
    """A matmul by weights or an attention of the graph, and its block."""

    name: str
    operator: str
    block: str


def read_programs(plan: str | os.PathLike[str]) -> list[list[Kernel]]:
    """Return the kernels of each profile's program in their order; raise EngineError if the plan has no program."""
    with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        texts = [match for match in _MAIN.finditer(content) if b"[ONNX Layer: " in match[1]]
        programs = []
        for match in texts:
            begin = content.rfind(b"\ndescriptors {\n", 0, match.start())
            described = _TENSOR.findall(content[begin : match.start()].decode("latin-1"))
            tensors = {name: (TYPES.get(kind, kind), int(size or 0)) for size, name, kind in described}
            kernels = list(_kernels(match[1].decode("latin-1"), tensors))
            if len(kernels) > 1:  # parts of a kernel are programs of their own
                programs.append(kernels)
    if not programs:
        message = f"{plan}: this engine contains no program as text; open it on a device to see its layers"
        raise EngineError("engine.no_layers", message)
    # Programs of single kernels are left out: those of the whole graph name far more nodes.
    counts = [len({node for kernel in kernels for node in kernel.nodes}) for kernels in programs]
    return [kernels for kernels, count in zip(programs, counts, strict=True) if 2 * count > max(counts)]


Tensors = Mapping[str, tuple[str, int]]
"""Type and size in bytes (0 if it is not a constant) by tensor name."""


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
    """Return the types of activations and weights: of the largest constant, and of the input before it."""
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
    fused_matmul = statement == "runtime_fusion" and re.search(r"(Fc|Gemm|Conv|Mm|Bmm)", name)
    return "matmul" if statement in MATMUL_KINDS or fused_matmul else "other"


def report_by_block(programs: list[list[Kernel]], nodes: list[Node]) -> dict[str, dict[str, dict[str, int]]]:
    """Count the input types of matmuls and the fused attentions of each block, in the worst profile of each node.

    Returns:
        block → `products` (matmuls) and `attention` → number of nodes by word. Of a matmul the type of the activations,
        followed by that of the weights where it differs (`fp16 × int4`), or `unknown` where no kernel names the node;
        of an attention `fused` or `unfused`.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for node in nodes:
        group = "attention" if node.operator in ATTENTION else "products"
        worst = max(
            (_word(node, group, kernels) for kernels in programs), key=lambda word: ORDER.index(word.split()[0])
        )
        counts = found.setdefault(node.block, {}).setdefault(group, {})
        counts[worst] = counts.get(worst, 0) + 1
    return found


def _word(node: Node, group: str, kernels: list[Kernel]) -> str:
    """Return how a program runs a node."""
    named = [kernel for kernel in kernels if node.name in kernel.nodes]
    if group == "attention":
        return "fused" if any(kernel.kind == "attention" for kernel in named) else "unfused"
    weighted = sorted((kernel for kernel in named if kernel.weights), key=lambda kernel: kernel.kind != "matmul")
    types = ((kernel.activations, kernel.weights) for kernel in weighted)
    return next((low if low == high else f"{high} × {low}" for high, low in types), "unknown")


def graph_nodes(path: str | os.PathLike[str]) -> list[Node]:
    """Return the matmuls by weights and the attentions of a graph, in its order.

    An attention outside of any module belongs to the block of its queries.
    """
    import onnx_ir as ir

    found = []
    for node in ir.load(path).graph:
        if node.op_type in WEIGHTED:
            weight = node.inputs[1]
            if weight is not None and stored_weight(weight)[0] is not None:
                found.append(Node(str(node.name), node.op_type, block_of(str(node.name))))
        elif node.op_type in ATTENTION:
            found.append(Node(str(node.name), node.op_type, block_of(str(_with_module(node).name))))
    return found


def _with_module(node: ir.Node) -> ir.Node:
    """Return the node itself if it is in a module, or else the nearest one before it, along the first inputs."""
    at: ir.Node | None = node
    while at is not None and "." not in str(at.name).rpartition("/")[0]:
        at = next((source for value in at.inputs if value is not None and (source := value.producer())), None)
    return node if at is None else at


def plan_table(report: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Return a report as a text table, with one line for equal blocks."""
    lines: Counter[str] = Counter()
    for block, groups in report.items():
        matmuls, attention = (
            ", ".join(f"{count} {word}" for word, count in groups.get(group, {}).items()) or "none" for group in GROUPS
        )
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", block)
        lines[f"  {kind:44} matmuls {matmuls:28} attention {attention}"] += 1
    return "\n".join(f"{line}  ({count} blocks)" if count > 1 else line for line, count in lines.items())


def plan_summary(report: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Sum a report over its blocks."""
    total: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for groups in report.values():
        for group, counts in groups.items():
            total[group].update(counts)
    return {group: dict(counts) for group, counts in total.items()}


def read_plan_report(plan: Path, graph: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Return the report of an engine and the graph that it was compiled from. Raises like `read_programs`."""
    return report_by_block(read_programs(plan), graph_nodes(graph))
