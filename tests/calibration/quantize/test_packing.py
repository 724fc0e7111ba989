"""One weight in int8: close to its floats, in the layout of ONNX, the same read whole or by rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.calibration.quantize import packing
from bridge_stg.calibration.quantize.packing import ChannelPieces, Factors, StoredSource, pack_nibbles, unpack_nibbles
from bridge_stg.export.graph.weight_file import ALIGNMENT, WeightFile
from tests.errors import raises

N, K = 24, 64


@pytest.fixture(params=["float32", "float16"])
def weight(request: pytest.FixtureRequest) -> np.ndarray:
    """[N, K], channels of very different sizes, one of them zero."""
    values = np.random.default_rng(0).standard_normal((N, K)) * np.geomspace(1e-3, 10, N)[:, None]
    values[5] = 0
    return values.astype(request.param)


@pytest.fixture(params=[2**25, 7 * K * 4])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", request.param)


def on_disk(folder: Path, array: np.ndarray) -> ir.ExternalTensor:
    (folder / "w").write_bytes(bytes(64) + array.tobytes())
    dtype = ir.DataType.from_numpy(array.dtype)
    return ir.ExternalTensor("w", 64, array.nbytes, dtype, shape=ir.Shape(array.shape), name="w", base_dir=folder)


def unpacked(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Return int4 values as onnx reads them."""
    return ir.PackedTensor(np.frombuffer(content, np.uint8), ir.DataType.INT4, shape=ir.Shape(shape)).numpy()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_int8(tmp_path: Path, weight: np.ndarray, block_bytes: None, transposed: bool, reduced: bool) -> None:
    pieces = ChannelPieces(StoredSource(on_disk(tmp_path, weight)), transposed=transposed, reduced=reduced)
    levels = np.frombuffer(b"".join(pieces), np.int8)
    levels = levels.reshape(K, N).T if transposed else levels.reshape(N, K)
    assert pieces.scales.dtype == weight.dtype and pieces.scales.shape == (N,)
    assert np.abs(levels).max() == (64 if reduced else 127) and levels.min() > -128
    scales = pieces.scales.astype(np.float32)[:, None]
    assert (np.abs(levels * scales - weight.astype(np.float32)) <= scales * 0.51).all()
    assert (levels[5] == 0).all() and pieces.scales[5] == 1


def test_nibbles_have_the_layout_of_onnx() -> None:
    levels = np.array([[-8, 7, 1], [0, -1, 3]], np.int8)
    assert unpacked(pack_nibbles(levels).tobytes(), (2, 3)).astype(np.int8).tolist() == levels.tolist()
    assert unpack_nibbles(pack_nibbles(levels), (2, 3)).tolist() == levels.tolist()
    assert len(pack_nibbles(np.array([1, 2, 3], np.int8))) == 2


def test_factors_come_before_rounding(tmp_path: Path, block_bytes: None) -> None:
    weight = np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)
    columns, rows = np.geomspace(0.1, 10, K, dtype=np.float32), np.geomspace(1, 3, N, dtype=np.float32)
    source = StoredSource(on_disk(tmp_path, weight), Factors(columns, rows))
    np.testing.assert_array_equal(
        np.frombuffer(b"".join(source.pieces()), np.float32).reshape(N, K), weight * columns * rows[:, None]
    )
    pieces = ChannelPieces(source, transposed=False)
    list(pieces)
    np.testing.assert_allclose(pieces.scales, np.abs(weight * columns * rows[:, None]).max(-1) / 127, rtol=1e-6)


def test_values_that_cannot_be_stored(tmp_path: Path) -> None:
    weight = np.ones((N, K), np.float16)
    source = StoredSource(on_disk(tmp_path, weight), Factors(columns=np.full(K, 1e6, np.float32)))
    with raises("calibration.not_finite", "w: ", "FLOAT16"):
        list(source.pieces())
    weight[3, 4] = np.nan
    with raises("calibration.not_finite", "w: "):
        list(ChannelPieces(StoredSource(on_disk(tmp_path, weight)), transposed=True))
    cut = on_disk(tmp_path, weight)
    (tmp_path / "w").write_bytes(bytes(100))
    with raises("bundle.truncated", "w"):
        list(ChannelPieces(StoredSource(cut), transposed=True))


def test_equal_bytes_are_written_once(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.data") as weights:
        first = weights.write("a", ir.DataType.INT8, (2, 50), [bytes(60), bytes(40)])
        second = weights.write("b", ir.DataType.INT8, (50, 2), [bytes(100)])
        third = weights.write("c", ir.DataType.INT8, (3,), [b"123"])
    assert (first.offset, second.offset, third.offset) == (0, 0, 2 * ALIGNMENT)
    assert (tmp_path / "weights.data").stat().st_size == 2 * ALIGNMENT + 3
    assert third.numpy().tolist() == [49, 50, 51] and second.name == "b"
