"""Find the external data files of an .onnx file in its protobuf bytes, without the onnx package.

A backend opens the files that a model's `external_data` entries name, so these names must be checked before it loads
the model. Field numbers are those of onnx.proto (ModelProto, GraphProto, TensorProto …).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from bridge_stg.runtime.errors import BundleError

# message -> field number -> message of that field, for every path from a ModelProto to a TensorProto
_CHILDREN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_LOCATION = b"location"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_locations(path: Path) -> set[str]:
    """Return the `location` of every tensor stored outside the .onnx file. Raises BundleError if it is not ONNX."""
    found: set[str] = set()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if not any(number == 7 for number, _, _ in _fields(content, 0, len(content))):
                raise ValueError("it contains no graph")
            _collect(content, 0, len(content), "model", found)
    except (OSError, ValueError, RecursionError) as error:  # mmap raises ValueError for an empty file
        raise BundleError("bundle.not_onnx", f"{path}: is not an ONNX graph ({error}). Copy it again.") from error
    return found


def _collect(content: mmap.mmap, start: int, end: int, kind: str, found: set[str]) -> None:
    """Add the locations named in the message of type `kind` at bytes start … end − 1."""
    children, word = _CHILDREN[kind], -1
    for number, first, last in _fields(content, start, end):
        if word < first and (word := content.find(_LOCATION, first, end)) < 0:
            return
        child = children.get(number)
        if last <= word or child is None:  # most nodes have no external data
            continue
        if child == "entry":
            entry = {n: content[at:stop] for n, at, stop in _fields(content, first, last)}
            if entry.get(1) == _LOCATION:
                found.add(entry.get(2, b"").decode("utf-8"))
        else:
            _collect(content, first, last, child, found)


def _fields(content: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, end) of each length-delimited field; skip other fields."""
    while at < end:
        key, at = _varint(content, at, end)
        wire = key & 7
        if wire == _BYTES:
            length, at = _varint(content, at, end)
            if at + length > end:
                raise ValueError("it ends in the middle of a field")
            yield key >> 3, at, at + length
            at += length
        elif wire == _VARINT:
            _, at = _varint(content, at, end)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("it is not protobuf")


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    if at < end and (value := content[at]) < 128:  # most are this short
        return value, at + 1
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("it ends in the middle of a number")
