"""External data: the weights of one graph, written once to one file that all its variants point into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

ALIGNMENT = 64
"""Offsets are multiples of this, so that mapped weights can be used where they lie."""

INLINE_BYTES = 256
"""Smaller tensors stay in the .onnx file, as do integers: engines want to see shapes and indices at once."""


def write_weights(models: Sequence[ir.Model], file: Path) -> int:
    """Move the weights of several variants of a graph into one file; equal bytes are written once.

    Args:
        models: each is changed to point at the file by its name, so its .onnx file must lie beside it.
        file: made, or replaced.

    Returns:
        Bytes written.
    """
    places: dict[tuple[str, str], tuple[int, int]] = {}
    with open(file, "wb") as stream:
        for model in models:
            for name, value in sorted(model.graph.initializers.items()):
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE_BYTES or not tensor.dtype.is_floating_point():
                    continue
                content = tensor.tobytes()
                key = (tensor.dtype.name, hashlib.sha256(content).hexdigest())
                if key not in places:
                    stream.write(bytes(-stream.tell() % ALIGNMENT))
                    places[key] = (stream.tell(), len(content))
                    stream.write(content)
                offset, length = places[key]
                shape = ir.Shape(tensor.shape)
                value.const_value = ir.ExternalTensor(
                    file.name, offset, length, tensor.dtype, shape=shape, name=name, base_dir=file.parent
                )
        return stream.tell()
