"""DLPack: import arrays of other libraries without a copy, and export arrays to them.

The structures are those of https://dmlc.github.io/dlpack/latest/c_api.html (`DLManagedTensor`, the form that every
library supports), the Python methods those of the array API standard (`__dlpack__`). Needs ctypes only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import EngineError

CPU, CUDA, CUDA_PINNED, CUDA_MANAGED = 1, 2, 3, 13
"""DLPack device types."""

_NAME, _USED = b"dltensor", b"used_dltensor"
_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # DLDataTypeCode → numpy's kind; 6 is kDLBool
_CODES = {kind: code for code, kind in _KINDS.items()}


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter)]
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_python = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(("PyCapsule_New", _python))
_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _python))
# The same calls on a bare address: a capsule that is being destroyed must not get a new reference.
_valid_at = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))

_exported: dict[int, tuple[Any, ...]] = {}
"""The memory of each exported capsule by the address of its structure, until the other library releases it."""


def _release(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule_address: int) -> None:
    # The capsule was never imported: an importer renames it and calls the deleter later.
    if _valid_at(capsule_address, _NAME):
        _exported.pop(_pointer_at(capsule_address, _NAME), None)


_release_callback = _Deleter(_release)
_destroy_callback = _Destructor(_destroy)


@dataclass(frozen=True)
class ImportedArray:
    """An array of another library, whose memory stays valid as long as this object."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in bytes; None: C-contiguous
    dtype: np.dtype
    owner: Any


class _Owner:
    """Calls the other library's deleter when the last user is gone."""

    def __init__(self, managed: Any) -> None:
        self._managed = managed

    def __del__(self) -> None:
        if self._managed.contents.deleter:
            self._managed.contents.deleter(self._managed)


def is_dlpack(value: Any) -> bool:
    """Return whether a value supports DLPack."""
    return hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")


def is_on_gpu(value: Any) -> bool:
    """Return whether a value supports DLPack and is in GPU memory."""
    return is_dlpack(value) and int(value.__dlpack_device__()[0]) in (CUDA, CUDA_MANAGED)


def import_array(value: Any, *, stream: int | None) -> ImportedArray:
    """Import an array through `__dlpack__`.

    Args:
        value: array of another library.
        stream: stream on which it will be used; the other library makes it wait for its own work.

    Raises:
        EngineError: numpy does not have the dtype, or the library cannot export the array.
    """
    what = f"a {type(value).__name__}"
    on_gpu = is_on_gpu(value)
    try:
        exported = value.__dlpack__(stream=stream) if on_gpu else value.__dlpack__()
    except Exception as error:  # each library raises its own, such as for arrays that need a gradient
        raise EngineError("engine.bad_input", f"{what} cannot be exported through DLPack: {error}") from error
    if not _valid(exported, _NAME):
        raise EngineError("engine.bad_input", f"{what} returned no unversioned DLPack capsule, which is needed here")
    managed = ctypes.cast(_pointer(exported, _NAME), ctypes.POINTER(_Managed))
    _rename(exported, _USED)
    owner = _Owner(managed)
    tensor = managed.contents.tensor
    kind, bits = _KINDS.get(tensor.dtype.code), tensor.dtype.bits
    if kind is None or bits % 8 or tensor.dtype.lanes != 1:
        message = f"{what} has the DLPack dtype (code {tensor.dtype.code}, {bits} bits), which is not supported here"
        raise EngineError("engine.bad_input", message)
    dtype = np.dtype("bool" if kind == "b" else f"{kind}{bits // 8}")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim)) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return ImportedArray(address, shape, strides, dtype, owner)


def capsule(
    owner: Any, address: int, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype, *, device: tuple[int, int]
) -> Any:
    """Return a capsule that exports memory; `owner` stays alive until the other library releases it.

    `strides` are in elements; `device` is (DLPack device type, id).
    """
    dims = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    steps = (ctypes.c_int64 * max(1, len(shape)))(*strides)
    managed = _Managed()
    managed.tensor.data = address
    managed.tensor.device = _Device(*device)
    managed.tensor.ndim = len(shape)
    managed.tensor.dtype = _DataType(_CODES[dtype.kind], dtype.itemsize * 8, 1)
    managed.tensor.shape = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64))
    managed.tensor.strides = ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _release_callback
    address_of = ctypes.addressof(managed)
    _exported[address_of] = (managed, dims, steps, owner)
    return _new(address_of, _NAME, _destroy_callback)
