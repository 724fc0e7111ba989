"""DLPack: arrays that other libraries lend without a copy, and arrays lent to them.

The structures are those of https://dmlc.github.io/dlpack/latest/c_api.html (`DLManagedTensor`, the form that every
library speaks); Python's side of it is the array API standard's `__dlpack__`. Plain ctypes, no library is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import EngineError

CPU, CUDA, CUDA_PINNED, CUDA_MANAGED = 1, 2, 3, 13
"""Device types."""

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
# The same calls on a bare address: a capsule that is being destroyed must not be counted as referenced again.
_valid_at = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))

_lent: dict[int, tuple[Any, ...]] = {}
"""By address of its structure: what a capsule lends, until the library that took it has let go."""


def _forget(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule_address: int) -> None:
    # Nobody took what the capsule lends: whoever does renames it, and calls the deleter later.
    if _valid_at(capsule_address, _NAME):
        _lent.pop(_pointer_at(capsule_address, _NAME), None)


_forget_callback = _Deleter(_forget)
_destroy_callback = _Destructor(_destroy)


@dataclass(frozen=True)
class Borrowed:
    """What another library lends; its memory stays as long as this object.

    `strides` are in bytes. `device` is (type, id).
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    device: tuple[int, int]
    owner: Any


class _Loan:
    """Calls the lender's deleter when the last user goes."""

    def __init__(self, managed: Any) -> None:
        self._managed = managed

    def __del__(self) -> None:
        if self._managed.contents.deleter:
            self._managed.contents.deleter(self._managed)


def is_dlpack(value: Any) -> bool:
    """Whether a value speaks DLPack."""
    return hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")


def lies_on_gpu(value: Any) -> bool:
    """Whether a value speaks DLPack and lies in a GPU's memory."""
    return is_dlpack(value) and int(value.__dlpack_device__()[0]) in (CUDA, CUDA_MANAGED)


def borrow(value: Any, *, stream: int | None) -> Borrowed:
    """Take what an object lends through `__dlpack__`.

    Args:
        stream: the stream on which it will be used: the lender makes it wait for its own work.

    Raises:
        EngineError: the dtype is none that numpy has, or the object lends nothing usable.
    """
    what = f"a {type(value).__name__}"
    device = tuple(int(part) for part in value.__dlpack_device__())
    on_gpu = device[0] in (CUDA, CUDA_MANAGED)
    try:
        lent = value.__dlpack__(stream=stream) if on_gpu else value.__dlpack__()
    except Exception as error:  # each library has its own, such as for arrays that need a gradient
        raise EngineError(f"{what} cannot be lent through DLPack: {error}") from error
    if not _valid(lent, _NAME):
        raise EngineError(f"{what} gave no DLPack capsule of the unversioned form that this program reads")
    managed = ctypes.cast(_pointer(lent, _NAME), ctypes.POINTER(_Managed))
    _rename(lent, _USED)
    loan = _Loan(managed)
    tensor = managed.contents.tensor
    kind, bits = _KINDS.get(tensor.dtype.code), tensor.dtype.bits
    if kind is None or bits % 8 or tensor.dtype.lanes != 1:
        raise EngineError(
            f"{what} has the DLPack dtype (code {tensor.dtype.code}, {bits} bits), which this program cannot use"
        )
    dtype = np.dtype("bool" if kind == "b" else f"{kind}{bits // 8}")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
    else:
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) * dtype.itemsize for i in range(len(shape)))
    address = (tensor.data or 0) + tensor.byte_offset
    return Borrowed(address, shape, strides, dtype, (device[0], device[1]), loan)


def capsule(
    owner: Any,
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: np.dtype,
    device: tuple[int, int],
) -> Any:
    """Return a capsule that lends memory; `owner` stays alive until the taker lets go.

    Args:
        strides: in elements.
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
    managed.deleter = _forget_callback
    place = ctypes.addressof(managed)
    _lent[place] = (managed, dims, steps, owner)
    return _new(place, _NAME, _destroy_callback)
