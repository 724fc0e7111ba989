"""Read the float weights of matmuls from a bundle's graphs, by blocks of rows; knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bridge_stg.calibration.quantize.packing import StoredSource
from bridge_stg.export.graph.blocks import Matmul
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BundleError


class MatmulWeights:
    """Reads weights of a float bundle (graph → variant) from disk, and keeps none of them in memory."""

    def __init__(self, bundle: Path, variants: Mapping[str, str]) -> None:
        self._bundle = Bundle.load(bundle)
        self._variants = variants
        self._models: dict[str, ir.Model] = {}

    def model(self, graph: str) -> ir.Model:
        """Return a graph; its weights stay on disk."""
        if graph not in self._models:
            self._models[graph] = ir.load(self._bundle.graph_path(graph, self._variants[graph]))
        return self._models[graph]

    def dtype(self, matmul: Matmul) -> np.dtype:
        """Return the dtype of a matmul's weight. Raises BundleError."""
        dtype: np.dtype = self._tensor(matmul).dtype.numpy()
        return dtype

    def blocks(self, matmul: Matmul) -> Iterator[np.ndarray]:
        """Yield a matmul's weight [N, K] as float32 [rows, K], a block of rows at a time. Raises BundleError."""
        tensor = self._tensor(matmul)
        if tuple(tensor.shape) == (matmul.n, matmul.k):
            for _, block in StoredSource(tensor).rows():
                yield block
        else:
            yield np.array(tensor.numpy(), np.float32).T

    def _tensor(self, matmul: Matmul) -> ir.TensorProtocol:
        value = self.model(matmul.graph).graph.initializers.get(matmul.weight)
        tensor = None if value is None else value.const_value
        shape = () if tensor is None else tuple(int(size) for size in tensor.shape)
        if tensor is None or shape not in ((matmul.n, matmul.k), (matmul.k, matmul.n)):
            found = "missing" if tensor is None else list(shape)
            what = f"weight {matmul.weight!r} of graph {matmul.graph!r} is {found}, expected [{matmul.n}, {matmul.k}]"
            raise BundleError("bundle.weight", f"{self._bundle.path}: the {what}; export it again.")
        return tensor
