"""The matmuls of a graph, its embedding tables, and the block of the model that each node belongs to.

A matmul here multiplies activations by a stored weight: MatMul or Gemm, [.., K] × [N, K]ᵀ. Attention is not one, nor is
the convolution that embeds patches: engines have no int8 kernel for it with float output, and it reads every pixel
once. Block names need no onnx package, so that reports on a device can use them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT, INT8, INT4, FP8, NVFP4 = "float", "int8", "int4", "fp8", "nvfp4"
QUANTIZED_FORMS = (INT8, INT4, FP8, NVFP4)
"""Forms of weights: float, and the quantized ones, which are the first words of a graph's precision too."""

_FORMS = {"INT8": INT8, "INT4": INT4, "FLOAT8E4M3FN": FP8, "FLOAT4E2M1": NVFP4}

ROOTS = (
    ("model.visual", "vision_encoder"),
    ("model.language_model", "language_model"),
    ("lm_head", "language_model.lm_head"),
    ("bridging", "language_model.bridging"),
)
"""Modules of a checkpoint and their public names."""

LISTS = {"layers": 2, "blocks": 2, "deepstack_merger_list": 1, "box_heads": 1, "presence_heads": 1}
"""Modules that are lists, and how many parts of the path below them name a block: `layers.3.mlp`, `box_heads.0`."""

MATMULS = ("MatMul", "Gemm", "MatMulIntegerToFloat")

HEAD, TABLE = "language_model.lm_head", "language_model.embed_tokens"


@dataclass(frozen=True)
class Matmul:
    """One matmul by a stored weight.

    Attributes:
        node: node name, `module/Operator`; the same in every variant of a graph.
        graph: name of the graph.
        block: public name of the block.
        weight: name of the initializer, [n, k] or [k, n]; several matmuls may share one.
        activation: name of the float tensor that is multiplied; differs between variants.
        k: length of the sums.
        n: output channels.
        form: storage of the weight: `float`, or one of `QUANTIZED_FORMS`.
    """

    node: str
    graph: str
    block: str
    weight: str
    activation: str
    k: int
    n: int
    form: str = FLOAT


@dataclass(frozen=True)
class Table:
    """One embedding table [rows, width]; `node` is the Gather, and a matmul may share `weight`."""

    node: str
    graph: str
    block: str
    weight: str
    rows: int
    width: int
    form: str = FLOAT


def find_matmuls(model: ir.Model, graph: str) -> list[Matmul]:
    """Return the matmuls of a graph in its order, integer ones of a quantized graph included."""
    found = []
    for node in model.graph:
        if node.op_type not in MATMULS or node.inputs[0] is None or node.inputs[1] is None:
            continue
        weight, form, transposed = stored_weight(node.inputs[1])
        if weight is None or weight.shape is None or len(weight.shape) != 2:
            continue
        gemm = node.attributes.get("transB")
        transposed ^= gemm is not None and bool(gemm.as_int())
        sizes = [int(size) for size in weight.shape]
        n, k = sizes if transposed else sizes[::-1]
        name, activation = str(node.name), _before_quantization(node.inputs[0])
        found.append(Matmul(name, graph, block_of(name), str(weight.name), str(activation.name), k, n, form))
    return found


def shared_activations(matmuls: Iterable[Matmul]) -> list[list[Matmul]]:
    """Return the matmuls in groups that read the same tensor, in their order."""
    groups: dict[tuple[str, str], list[Matmul]] = {}
    for matmul in matmuls:
        groups.setdefault((matmul.graph, matmul.activation), []).append(matmul)
    return list(groups.values())


def find_tables(model: ir.Model, graph: str) -> list[Table]:
    """Return the embedding tables that a graph looks up by token ids, in its order."""
    found = []
    for node in model.graph:
        if node.op_type != "Gather" or node.inputs[0] is None or block_of(str(node.name)) != TABLE:
            continue
        weight, form, transposed = stored_weight(node.inputs[0])
        if weight is not None and weight.shape is not None and len(weight.shape) == 2 and not transposed:
            rows, width = (int(size) for size in weight.shape)
            found.append(Table(str(node.name), graph, TABLE, str(weight.name), rows, width, form))
    return found


def block_of(node: str) -> str:
    """Return the public name of the block that a node named `module/Operator`, or a module, belongs to.

    `model.language_model.layers.3.mlp.gate_proj/MatMul` → `language_model.layers.3.mlp`.
    """
    module = node.partition("/")[0]
    names = (name + module.removeprefix(root) for root, name in ROOTS if f"{module}.".startswith(f"{root}."))
    parts = next(names, module).split(".")
    at = next((i for i, part in enumerate(parts) if part in LISTS), None)
    if at is not None:
        return ".".join(parts[: at + 1 + LISTS[parts[at]]])
    return ".".join(parts if len(parts) <= 2 else parts[:-1])


def stored_weight(value: ir.Value) -> tuple[ir.Value | None, str, bool]:
    """Return the initializer that a value is a view of (None: it is not one), its form, and if it is transposed."""
    form, transposed = FLOAT, False
    while not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "DequantizeLinear", "Cast") or node.inputs[0] is None:
            return None, form, transposed
        transposed ^= node.op_type == "Transpose"
        value = node.inputs[0]
    if value.dtype is not None and value.dtype.name in _FORMS:
        form = _FORMS[value.dtype.name]
    elif value.dtype is None or not value.dtype.is_floating_point():
        return None, form, transposed
    return value, form, transposed


def _before_quantization(value: ir.Value) -> ir.Value:
    for operators in (("DequantizeLinear",), ("QuantizeLinear", "TRT_FP4DynamicQuantize")):
        node = value.producer()
        if node is not None and node.op_type in operators and node.inputs[0] is not None:
            value = node.inputs[0]
    return value
