"""External data of a graph: equal bytes once, aligned, small tensors and integers inline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from bridge_stg.export.weights import ALIGNMENT, write_weights


def model_with(**arrays: np.ndarray) -> ir.Model:
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        for name, array in arrays.items()
    ]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18}), ir_version=8)


def test_equal_bytes_are_written_once(tmp_path: Path) -> None:
    big, other = np.arange(100, dtype=np.float32), np.ones((3, 65), np.float32)
    first = model_with(a=big, b=other, small=np.ones(4, np.float32), shape=np.arange(200))
    second = model_with(c=big.reshape(10, 10), b=other)
    size = write_weights([first, second], tmp_path / "weights.data")
    tensors = {n: v.const_value for m in (second, first) for n, v in m.graph.initializers.items()}
    assert {n for n, t in tensors.items() if isinstance(t, ir.ExternalTensor)} == {"a", "b", "c"}
    assert tensors["a"].offset == tensors["c"].offset and tensors["b"].offset % ALIGNMENT == 0
    assert size == (tmp_path / "weights.data").stat().st_size < big.nbytes + other.nbytes + ALIGNMENT
    np.testing.assert_array_equal(tensors["c"].numpy(), big.reshape(10, 10))
    np.testing.assert_array_equal(tensors["b"].numpy(), other)
