"""Measure the bytes of each block's weights, and their bytes in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bridge_stg.export.graph.blocks import FLOAT, Matmul, Table, find_matmuls, find_tables
from bridge_stg.export.graph.ort_cpu import VARIANT as ORT_CPU
from bridge_stg.runtime.bundle.bundle import Bundle


@dataclass(frozen=True)
class BlockSize:
    """The matrices of one block with their scales; a tied head and table are counted once, for the table.

    `fp32_bytes` are those of as many values in fp32.
    """

    graph: str
    stored_bytes: int
    fp32_bytes: int
    quantized: bool


def size_of_blocks(bundle: Bundle) -> dict[str, BlockSize]:
    """Measure one variant of each graph of a bundle; the variants share their weights. Return block name → size."""
    blocks: dict[str, BlockSize] = {}
    for name, variants in bundle.manifest.graphs.items():
        variant = next(v for v in variants.values() if v.variant != ORT_CPU)
        model = ir.load(bundle.graph_path(name, variant.variant))
        seen: set[str] = set()
        entries: list[Table | Matmul] = [*find_tables(model, name), *find_matmuls(model, name)]
        for entry in entries:
            if entry.weight in seen:
                continue
            seen.add(entry.weight)
            value = model.graph.initializers[entry.weight]
            tensor = value.const_value
            assert tensor is not None
            # Readers with the same scales count once.
            scales = [node.inputs[1] for node in value.consumers() if node.op_type == "DequantizeLinear"]
            sizes = {s.const_value.nbytes for s in scales if s is not None and s.const_value is not None}
            before = blocks.get(entry.block, BlockSize(name, 0, 0, False))
            blocks[entry.block] = BlockSize(
                name,
                before.stored_bytes + tensor.nbytes + sum(sizes),
                before.fp32_bytes + 4 * tensor.size,
                before.quantized or entry.form != FLOAT,
            )
    return blocks
