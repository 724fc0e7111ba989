"""The float weights of products, read by blocks of rows from a bundle's graphs; knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bridge_stg.calibration.quantize.packing import StoredSource
from bridge_stg.export.graph.blocks import Matmul
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BundleError


class ProductWeights:
    """Reads weights where they lie on disk, and keeps none of them in memory.

    Args:
        bundle: the folder of a bundle in float.
        variants: graph → the variant that is read.
    """

    def __init__(self, bundle: Path, variants: Mapping[str, str]) -> None:
        self._bundle = Bundle.load(bundle)
        self._variants = variants
        self._models: dict[str, ir.Model] = {}

    def model(self, graph: str) -> ir.Model:
        """Return a graph; its weights stay on disk."""
        if graph not in self._models:
            self._models[graph] = ir.load(self._bundle.graph_path(graph, self._variants[graph]))
        return self._models[graph]

    def blocks(self, product: Matmul) -> Iterator[np.ndarray]:
        """Yield a product's weight as float32 [rows, K], a block of its N rows at a time.

        Raises:
            BundleError: the graph has no such weight, or one of another size.
        """
        value = self.model(product.graph).graph.initializers.get(product.weight)
        tensor = None if value is None else value.const_value
        shape = () if tensor is None else tuple(int(size) for size in tensor.shape)
        if tensor is None or shape not in ((product.n, product.k), (product.k, product.n)):
            raise BundleError(
                f"{self._bundle.path}: the weight {product.weight!r} of graph {product.graph!r} is "
                f"{'missing' if tensor is None else list(shape)}, expected [{product.n}, {product.k}]; export it again."
            )
        if shape == (product.n, product.k):
            for _, block in StoredSource(tensor).rows():
                yield block
        else:
            yield np.array(tensor.numpy(), np.float32).T
