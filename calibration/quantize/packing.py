"""Round one weight to int8, fp8 or nvfp4: it is read by blocks of rows, and yielded as bytes; and pack 4-bit values.

Symmetric, zero point 0. int8 and fp8 have one scale per channel, int4 one for every `block_size` values along K of each
channel. These are stored [K, N]: with a Transpose, onnxruntime fuses them only in some opsets. nvfp4 is stored [N, K],
as TensorRT reads it: a scale in fp8 for every 16 values, and one in fp32 for all of them. Knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.blocks import FP8, INT8
from bridge_stg.export.graph.graph_edit import NVFP4_BLOCK
from bridge_stg.runtime.errors import BridgeError

INT8_LIMIT, REDUCED_LIMIT = 127, 64
"""Largest magnitude of an int8 weight; 255 · 64 · 2 fits the signed 16-bit sums of CPUs without VNNI."""

INT4_LEAST, INT4_MOST = -8, 7
FP8_LIMIT, FP4_LIMIT = 448, 6
NVFP4_LIMIT = FP8_LIMIT * FP4_LIMIT
"""Largest magnitudes of E4M3 and E2M1, and of nvfp4 in units of the tensor's scale."""

FP8_LEAST = 2.0**-9
"""Smallest fp8 number above 0, for the scales of blocks."""


BLOCK_BYTES = 32 * 2**20
"""Number of stored bytes that are read at a time."""


@dataclass(frozen=True)
class Factors:
    """Factors of a weight [N, K] before rounding, which compensate for the smoothing of activations.

    Attributes:
        columns: float32 [K], or None.
        rows: float32 [N], or the shape of a vector, or None.
    """

    columns: np.ndarray | None = None
    rows: np.ndarray | None = None

    @property
    def none(self) -> bool:
        """Whether there are no factors."""
        return self.columns is None and self.rows is None


NO_FACTORS = Factors()


@dataclass(frozen=True)
class StoredSource:
    """A float tensor of a graph, in memory or on disk, and the factors of its values."""

    tensor: ir.TensorProtocol
    factors: Factors = NO_FACTORS

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(int(size) for size in self.tensor.shape)

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 [rows, …]), a block of rows at a time. Raises BridgeError for NaN and infinity."""
        dtype, factors = self.tensor.dtype.numpy(), self.factors
        for first, raw in self._blocks():
            block = raw.view(dtype).reshape(-1, *self.shape[1:]).astype(np.float32)
            if factors.columns is not None:
                block *= factors.columns
            if factors.rows is not None:
                block *= factors.rows[first : first + len(block)].reshape(-1, *[1] * (block.ndim - 1))
            if not np.isfinite(block).all():
                what = f"{self.tensor.name}: has values that are not finite numbers; export it again."
                raise BridgeError("calibration.not_finite", what)
            yield first, block

    def pieces(self) -> Iterator[bytes]:
        """Yield the values in the tensor's own dtype. Raises BridgeError if one is outside its range."""
        if self.factors.none:
            for _, raw in self._blocks():
                yield raw.tobytes()
            return
        for _, block in self.rows():
            with np.errstate(over="ignore"):
                cast = block.astype(self.tensor.dtype.numpy())
            if not np.isfinite(cast.astype(np.float32)).all():
                what = f"smoothing exceeds the range of {self.tensor.dtype}; set a smaller strength in the overrides"
                raise BridgeError("calibration.not_finite", f"{self.tensor.name}: {what}")
            yield cast.tobytes()

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, bytes). The file is not mapped, since mapped pages count as memory in use."""
        shape = self.shape
        rows = shape[0] if shape else 1
        row_bytes = max(1, self.tensor.nbytes // max(rows, 1))
        if not isinstance(self.tensor, ir.ExternalTensor):
            values = np.ascontiguousarray(self.tensor.numpy())
            yield 0, values.reshape(-1).view(np.uint8)
            return
        step = max(1, BLOCK_BYTES // row_bytes)
        with open(self.tensor.path, "rb", buffering=0) as file:
            file.seek(int(self.tensor.offset or 0))
            for first in range(0, rows, step):
                size = min(step, rows - first) * row_bytes
                buffer = bytearray(size)
                if file.readinto(buffer) != size:
                    what = f"{self.tensor.path}: ends in the middle of {self.tensor.name}; copy it again."
                    raise BridgeError("bundle.truncated", what)
                yield first, np.frombuffer(buffer, np.uint8)


class ChannelPieces:
    """Iterates over the int8 or fp8 values of a weight [N, K] as bytes; afterwards `scales` [N] are set.

    Args:
        source: the weight.
        transposed: whether to yield [K, N], for which all values are kept in memory; else [N, K], by blocks of rows.
        form: `int8` or `fp8`.
        reduced: whether int8 magnitudes are at most 64.
    """

    def __init__(self, source: StoredSource, *, transposed: bool, form: str = INT8, reduced: bool = False) -> None:
        self._source, self._transposed, self._form = source, transposed, form
        self._limit = FP8_LIMIT if form == FP8 else REDUCED_LIMIT if reduced else INT8_LIMIT
        self.dtype = source.tensor.dtype.numpy()
        self.scales = np.ones(source.shape[0], self.dtype)

    def __iter__(self) -> Iterator[bytes]:
        n, k = self._source.shape
        all_levels = np.empty((n, k), np.int8) if self._transposed else None
        for first, block in self._source.rows():
            scales = storable(np.abs(block).max(-1) / self._limit, self.dtype)
            self.scales[first : first + len(block)] = scales
            wide = scales.astype(np.float32)[:, None]
            if self._form == FP8:
                levels = fp8(block / wide).view(np.int8)
            else:
                levels = rounded(block, wide, -self._limit, self._limit)
            if all_levels is None:
                yield levels.tobytes()
            else:
                all_levels[first : first + len(block)] = levels
        if all_levels is not None:
            yield np.ascontiguousarray(all_levels.T).tobytes()


class Nvfp4Pieces:
    """Iterates over the nvfp4 values [N, K] of a weight as bytes; then `scales` and `scale` are set.

    `scales` are fp8 [N, K / 16], and `scale`, of the graph's dtype, multiplies all of them.
    """

    def __init__(self, source: StoredSource) -> None:
        self._source = source
        n, k = source.shape
        self.scales = np.zeros((n, k // NVFP4_BLOCK), ml_dtypes.float8_e4m3fn)
        self.scale = np.ones((), source.tensor.dtype.numpy())

    def __iter__(self) -> Iterator[bytes]:
        largest = max(float(np.abs(block).max(initial=0)) for _, block in self._source.rows())
        self.scale = storable(np.array(largest / NVFP4_LIMIT), self.scale.dtype)
        for first, block in self._source.rows():
            levels, scales = nvfp4(block, float(self.scale))
            self.scales[first : first + len(block)] = scales
            yield pack_nibbles(levels.view(np.int8)).tobytes()


def fp8(values: np.ndarray) -> np.ndarray:
    """Return values as float8_e4m3fn, saturated, ties to even."""
    levels: np.ndarray = np.clip(values, -FP8_LIMIT, FP8_LIMIT).astype(ml_dtypes.float8_e4m3fn)
    return levels


def nvfp4(rows: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [R, K] as float4_e2m1fn, and the fp8 scales [R, K / 16] of their blocks, in units of `scale`."""
    blocks = rows.reshape(len(rows), -1, NVFP4_BLOCK)
    scales = fp8(np.maximum(np.abs(blocks).max(-1) / (FP4_LIMIT * scale), FP8_LEAST))
    ratios = blocks / (scales.astype(np.float32)[..., None] * np.float32(scale))
    levels = np.clip(ratios, -FP4_LIMIT, FP4_LIMIT).astype(ml_dtypes.float4_e2m1fn)
    return levels.reshape(rows.shape), scales


def storable(scales: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """Return scales in the dtype of the graph, 1 where all values are zero; values are then rounded with these."""
    cast = scales.astype(dtype)
    smallest = np.finfo(dtype).smallest_subnormal
    return np.where(scales == 0, np.ones((), dtype), np.maximum(cast, smallest)).astype(dtype)


def rounded(values: np.ndarray, scales: np.ndarray, least: int, most: int) -> np.ndarray:
    """Return int8 levels, value ≈ scale · level; ties to even as in QuantizeLinear."""
    levels: np.ndarray = np.clip(np.rint(values / scales), least, most).astype(np.int8)
    return levels


def pack_nibbles(levels: np.ndarray) -> np.ndarray:
    """Pack int4 levels in row-major order into uint8, the first of two in the low half, as ONNX stores them."""
    flat = np.ascontiguousarray(levels).reshape(-1).view(np.uint8) & 0xF
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    packed: np.ndarray = flat[0::2] | (flat[1::2] << 4)
    return packed


def unpack_nibbles(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the int8 levels of a shape that `pack_nibbles` packed."""
    both = np.stack([packed << 4, packed & 0xF0], axis=-1).reshape(-1)[: int(np.prod(shape))]
    levels: np.ndarray = (both.view(np.int8) >> 4).reshape(shape)
    return levels
