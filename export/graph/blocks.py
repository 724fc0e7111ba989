"""The products of a graph, the tables it looks up, and the blocks they belong to, named by modules.

A product multiplies activations by a stored weight: MatMul or Gemm, [.., K] × [N, K]ᵀ. Attention is none, nor is the
convolution that embeds patches: engines have no int8 kernel for it that gives floats, and it reads every pixel once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

FLOAT, INT8, INT4 = "float", "int8", "int4"

ROOTS = (("model.visual", "vision_encoder"), ("model.language_model", "language_model"))
"""Modules of a checkpoint and what people call them; longer paths begin with these."""

PRODUCTS = ("MatMul", "Gemm", "MatMulIntegerToFloat")

HEAD, TABLE = "language_model.lm_head", "language_model.embed_tokens"


@dataclass(frozen=True)
class Matmul:
    """One product by a stored weight.

    Attributes:
        node: its name, `module/Operator`; the same in every variant of a graph.
        graph: the graph it is in.
        block: the public name of the block it belongs to.
        weight: the initializer it is multiplied by, [n, k] or [k, n]; several products may share one.
        activation: the float tensor that is multiplied; this name may differ between variants.
        k: length of the sums.
        n: channels that come out.
        form: how the weight is stored: `float`, `int8` or `int4`.
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
    """One table of rows [rows, width] that ids look up; `node` is the Gather, `weight` may be a product's too."""

    node: str
    graph: str
    block: str
    weight: str
    rows: int
    width: int
    form: str = FLOAT


def find_matmuls(model: ir.Model, graph: str) -> list[Matmul]:
    """Return the products of a graph in its order; of a quantized graph those in integers too."""
    found = []
    for node in model.graph:
        if node.op_type not in PRODUCTS or node.inputs[0] is None or node.inputs[1] is None:
            continue
        weight, form, turned = stored_weight(node.inputs[1])
        if weight is None or weight.shape is None or len(weight.shape) != 2:
            continue
        gemm = node.attributes.get("transB")
        turned ^= gemm is not None and bool(gemm.as_int())
        sizes = [int(size) for size in weight.shape]
        n, k = sizes if turned else sizes[::-1]
        activation = _float_of(node.inputs[0])
        name = str(node.name)
        found.append(Matmul(name, graph, block_of(name), str(weight.name), str(activation.name), k, n, form))
    return found


def find_tables(model: ir.Model, graph: str) -> list[Table]:
    """Return the tables of embeddings that a graph looks up by token ids, in its order."""
    found = []
    for node in model.graph:
        if node.op_type != "Gather" or node.inputs[0] is None or block_of(str(node.name)) != TABLE:
            continue
        weight, form, turned = stored_weight(node.inputs[0])
        if weight is not None and weight.shape is not None and len(weight.shape) == 2 and not turned:
            rows, width = (int(size) for size in weight.shape)
            found.append(Table(str(node.name), graph, TABLE, str(weight.name), rows, width, form))
    return found


def block_of(node: str) -> str:
    """Return the public name of the block of a node named `module/Operator`.

    The path of the module with the names of `ROOTS`, without its last part, which is the layer itself; a layer that
    stands alone below a root is its own block.
    """
    path = public_name(node.rpartition("/")[0])
    if path in (HEAD, TABLE):
        return path
    parent = path.rpartition(".")[0]
    return parent if "." in parent else path


def public_name(module: str) -> str:
    """Return what people call a module: `model.visual.blocks.3` is `vision_encoder.blocks.3`."""
    if module == "lm_head":
        return HEAD
    for root, name in ROOTS:
        if module == root or module.startswith(f"{root}."):
            return name + module.removeprefix(root)
    return module


def blocks_of(products: Iterable[Matmul | Table]) -> dict[str, list[Matmul | Table]]:
    """Group products and tables by block, both in their order."""
    found: dict[str, list[Matmul | Table]] = {}
    for product in products:
        found.setdefault(product.block, []).append(product)
    return found


def stored_weight(value: ir.Value) -> tuple[ir.Value | None, str, bool]:
    """Return the initializer that a value is a view of, its form, and whether it is transposed; (None, …) if none."""
    form, turned = FLOAT, False
    while not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "DequantizeLinear", "Cast") or node.inputs[0] is None:
            return None, form, turned
        turned ^= node.op_type == "Transpose"
        value = node.inputs[0]
    if value.dtype == ir.DataType.INT8:
        form = INT8
    elif value.dtype == ir.DataType.INT4:
        form = INT4
    elif value.dtype is None or not value.dtype.is_floating_point():
        return None, form, turned
    return value, form, turned


def _float_of(value: ir.Value) -> ir.Value:
    """Return the tensor before it was quantized, and dequantized."""
    for operator in ("DequantizeLinear", "QuantizeLinear"):
        node = value.producer()
        if node is not None and node.op_type == operator and node.inputs[0] is not None:
            value = node.inputs[0]
    return value
