"""How many bytes the weights of each block take, and how many they would in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from bridge_stg.export.graph.blocks import FLOAT, Matmul, Table, find_matmuls, find_tables
from bridge_stg.export.graph.ort_cpu import VARIANT as ORT_CPU
from bridge_stg.runtime.bundle.bundle import Bundle


@dataclass(frozen=True)
class BlockSize:
    """The matrices of one block; a tied head and its table are counted where they come first.

    Attributes:
        graph: the graph it is in.
        stored_bytes: of the weights, their scales included.
        fp32_bytes: of as many values.
        quantized: whether any of them is in integers.
    """

    graph: str
    stored_bytes: int
    fp32_bytes: int
    quantized: bool


@dataclass(frozen=True)
class BundleSizes:
    """Bytes of a bundle.

    Attributes:
        blocks: by public name.
        graphs: all of each graph's external data.
    """

    blocks: Mapping[str, BlockSize]
    graphs: Mapping[str, int]

    def quantized_share(self, graph: str | None = None) -> float:
        """Return the bytes of quantized blocks over what they were in fp32, of one graph or all; 1 if there is none."""
        chosen = [b for b in self.blocks.values() if b.quantized and graph in (None, b.graph)]
        return sum(b.stored_bytes for b in chosen) / sum(b.fp32_bytes for b in chosen) if chosen else 1.0


def size_of_blocks(bundle: Bundle) -> BundleSizes:
    """Measure one variant of each graph of a bundle; the variants share their weights."""
    blocks: dict[str, BlockSize] = {}
    graphs: dict[str, int] = {}
    for name, variants in bundle.manifest.graphs.items():
        variant = next(v for v in variants.values() if v.variant != ORT_CPU)
        graphs[name] = sum({entry.path: entry.size for v in variants.values() for entry in v.data}.values())
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
            scales = {
                scale.const_value.nbytes
                for node in value.consumers()
                if node.op_type == "DequantizeLinear"
                and (scale := node.inputs[1]) is not None
                and scale.const_value is not None
            }
            before = blocks.get(entry.block, BlockSize(name, 0, 0, False))
            blocks[entry.block] = BlockSize(
                name,
                before.stored_bytes + tensor.nbytes + sum(scales),
                before.fp32_bytes + 4 * tensor.size,
                before.quantized or entry.form != FLOAT,
            )
    return BundleSizes(blocks, graphs)
