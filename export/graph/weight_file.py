"""Write the external data of one graph; variants of the graph share equal tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

ALIGNMENT = 64
"""Offsets are multiples of this, so that weights can be used from a mapped file."""


class WeightFile:
    """Context manager that writes tensors one after another, in the folder of the .onnx files that refer to them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        self._stream: BinaryIO

    def __enter__(self) -> WeightFile:
        self._stream = open(self._path, "wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def write(
        self, name: str, dtype: ir.DataType, shape: Iterable[int], pieces: Iterable[bytes | memoryview]
    ) -> ir.ExternalTensor:
        """Write a tensor, unless its bytes were written before. Return it as external tensor `name`."""
        end = self._stream.tell()
        self._stream.write(bytes(-end % ALIGNMENT))
        offset, digest = self._stream.tell(), hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            self._stream.write(piece)
        here = offset, self._stream.tell() - offset
        place = self._places.setdefault((dtype.name, digest.hexdigest()), here)
        if place != here:
            self._stream.seek(end)
            self._stream.truncate()
        return ir.ExternalTensor(
            self._path.name, *place, dtype, shape=ir.Shape(shape), name=name, base_dir=self._path.parent
        )

    def alias(
        self, tensor: ir.ExternalTensor, name: str, shape: Iterable[int | ir.SymbolicDim] | None = None
    ) -> ir.ExternalTensor:
        """Return a written tensor under another name, and in another shape if one is given."""
        place = tensor.location, tensor.offset, tensor.length, tensor.dtype
        shape = ir.Shape(tensor.shape if shape is None else shape)
        return ir.ExternalTensor(*place, shape=shape, name=name, base_dir=tensor.base_dir)
