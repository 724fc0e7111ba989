"""External data of a graph: equal bytes once, aligned, small tensors inline; weights cast on their way, in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.graph.weight_file import ALIGNMENT
from bridge_stg.export.tracing import weights
from bridge_stg.export.tracing.weights import StoredWeight, row_blocks, write_weights
from bridge_stg.runtime.errors import CheckpointError
from tests.errors import raises


def model_with(**arrays: np.ndarray | ir.TensorProtocol) -> ir.Model:
    values = []
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
        values.append(ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape)))
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18}), ir_version=8)


def store_of(folder: Path, **tensors: torch.Tensor) -> WeightStore:
    save_file(tensors, folder / "model.safetensors")
    return WeightStore.open(folder, key_prefixes={})


def test_equal_bytes_are_written_once(tmp_path: Path) -> None:
    big, other = np.arange(100, dtype=np.float32), np.ones((3, 65), np.float32)
    first = model_with(a=big, b=other, small=np.ones(4, np.float32), shape=np.arange(200))
    second = model_with(c=big.reshape(10, 10), b=other)
    write_weights([first, second], tmp_path / "weights.data")
    tensors = {n: v.const_value for m in (second, first) for n, v in m.graph.initializers.items()}
    assert {n for n, t in tensors.items() if isinstance(t, ir.ExternalTensor)} == {"a", "b", "c"}
    assert tensors["a"].offset == tensors["c"].offset and tensors["b"].offset % ALIGNMENT == 0
    assert (tmp_path / "weights.data").stat().st_size < big.nbytes + other.nbytes + ALIGNMENT
    np.testing.assert_array_equal(tensors["c"].numpy(), big.reshape(10, 10))
    np.testing.assert_array_equal(tensors["b"].numpy(), other)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_weights_are_cast_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: str
) -> None:
    """From the file to the file, in blocks of rows, and once for all variants."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 512)
    value = torch.randn(33, 40, generator=torch.Generator().manual_seed(0)).to(stored)
    store = store_of(tmp_path, w=value, zeros=torch.zeros(33 * 40).to(stored), more=torch.zeros(40, 33).to(stored))
    dtype = ir.DataType[wanted]

    def variant(shape: tuple[int, ...]) -> ir.Model:
        made = {key: StoredWeight(store, key, dtype=dtype, shape=store[key].shape) for key in store}
        return model_with(**{**made, "w": made["w"].reshaped(shape)})

    first, second = variant((33, 40)), variant((40, 33))
    write_weights([first, second], tmp_path / "weights.data")
    size = (tmp_path / "weights.data").stat().st_size
    assert size <= 2 * (33 * 40 * dtype.itemsize + ALIGNMENT)  # w, and the zeros once
    for model in (first, second):
        found = model.graph.initializers["w"].const_value
        assert isinstance(found, ir.ExternalTensor) and found.dtype == dtype
        expected = value.to(weights.TORCH_DTYPES[dtype]).float().numpy().ravel()
        np.testing.assert_array_equal(found.numpy().astype(np.float32).ravel(), expected)


def test_blocks_are_all_rows_and_no_more(tmp_path: Path) -> None:
    value = torch.arange(70.0).reshape(35, 2)
    store = store_of(tmp_path, w=value, scalar=torch.tensor(3.0), empty=torch.zeros(0, 4))
    blocks = list(row_blocks(store, "w", block_bytes=64))
    assert len(blocks) == 5 and max(block.nbytes for block in blocks) <= 64
    assert torch.equal(torch.cat(blocks), value)
    assert [block.tolist() for block in row_blocks(store, "scalar")] == [3.0]
    assert [block.shape for block in row_blocks(store, "empty")] == [(0, 4)]


@pytest.mark.parametrize(
    ("value", "code", "values"),
    [
        (7e4, "checkpoint.not_finite", ("w", "7.01e+04", "fp16", "6.55e+04", "--dtype bf16")),
        (np.nan, "checkpoint.not_finite", ("w",)),
    ],
)
def test_a_value_that_does_not_fit_is_named(tmp_path: Path, value: float, code: str, values: tuple[str, ...]) -> None:
    store = store_of(tmp_path, w=torch.full((20, 20), value, dtype=torch.bfloat16))
    model = model_with(w=StoredWeight(store, "w", dtype=ir.DataType.FLOAT16, shape=(20, 20)))
    with raises(code, *values, kind=CheckpointError):
        write_weights([model], tmp_path / "weights.data")
