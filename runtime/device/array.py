"""Arrays in device memory, which pass from one graph of a chain to the next.

They support the part of numpy's indexing that the chain needs (views by integers and slices, assignment to views). Only
`numpy()` copies to the host; other libraries use them through DLPack without a copy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from bridge_stg.runtime.device import dlpack
from bridge_stg.runtime.device.cuda import DEVICE, Cuda, DeviceFacts
from bridge_stg.runtime.device.memory import Block, MemoryPool, host_view
from bridge_stg.runtime.errors import EngineError

DType: TypeAlias = "np.dtype | type | str"
HostResize: TypeAlias = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


class ArrayContext(Protocol):
    """The parts of a `DeviceContext` that arrays use: its stream, lock, memory and methods."""

    cuda: Cuda
    device: DeviceFacts
    stream: int
    lock: threading.RLock
    pinned: MemoryPool
    closed: bool

    def empty(self, shape: Sequence[int], dtype: DType) -> DeviceArray:
        """Return an uninitialized array."""

    def zeros(self, shape: Sequence[int], dtype: DType) -> DeviceArray:
        """Return an array of zeros."""

    def upload(self, array: np.ndarray) -> DeviceArray:
        """Return a copy of a host array on the device."""

    def pin(self, array: np.ndarray) -> Block:
        """Return a copy of a host array in pinned memory."""

    def keep_alive(self, *objects: object) -> None:
        """Keep objects alive until the work that is on the stream now is done."""

    def resize(self, image: DeviceArray, size: tuple[int, int], on_host: HostResize) -> DeviceArray:
        """Return a resized copy of an image."""


class DeviceArray:
    """An array, or a view of one, in the memory of a chain's device. Its content is valid in the order of the stream.

    Args:
        context: the chain's device.
        owner: object that keeps the memory alive: a block of the chain's pool, or another library's object.
        shape: sizes of the dims.
        dtype: any numpy dtype.
        strides: bytes per step of each dim; None: C-contiguous.
        address: address of the first element; None: that of the owner.
    """

    __array_priority__ = 1000

    def __init__(
        self,
        context: ArrayContext,
        owner: Any,
        shape: Sequence[int],
        dtype: DType,
        *,
        strides: Sequence[int] | None = None,
        address: int | None = None,
    ) -> None:
        self.context, self.owner = context, owner
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.strides = contiguous_strides(self.shape, self.dtype.itemsize) if strides is None else tuple(strides)
        self.address: int = owner.address if address is None else address

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements are adjacent in C order."""
        expected = contiguous_strides(self.shape, self.dtype.itemsize)
        dims = zip(self.shape, self.strides, expected, strict=True)
        return not self.size or all(n == 1 or s == e for n, s, e in dims)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} on {self.context.device.name})"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dims")
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> DeviceArray:
        """Return a view, by integers and slices of step 1."""
        places = index if isinstance(index, tuple) else (index,)
        if len(places) > self.ndim:
            raise IndexError(f"{len(places)} indices for an array of {self.ndim} dims")
        shape, strides, address = [], [], self.address
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            place = places[axis] if axis < len(places) else slice(None)
            if isinstance(place, slice):
                start, stop, step = place.indices(size)
                if step != 1:
                    raise IndexError(f"slices of a device array need step 1, not {step}")
                shape.append(max(0, stop - start))
                strides.append(stride)
                address += start * stride
            else:
                number = int(place) + (size if place < 0 else 0)
                if not 0 <= number < size:
                    raise IndexError(f"index {place} is out of bounds for axis {axis} of size {size}")
                address += number * stride
        return DeviceArray(self.context, self.owner, shape, self.dtype, strides=strides, address=address)

    def __setitem__(self, index: Any, value: DeviceArray | np.ndarray) -> None:
        self[index].write(value)

    def write(self, value: DeviceArray | np.ndarray) -> None:
        """Overwrite this array or view, in the order of the stream. Raises EngineError: shape or dtype differ."""
        if tuple(value.shape) != self.shape or value.dtype != self.dtype:
            found = f"{value.dtype} {list(value.shape)}"
            expected = f"{self.dtype} {list(self.shape)}"
            raise EngineError("engine.bad_input", f"{found} cannot be written into a device array {expected}")
        self.check_open()
        cuda = self.context.cuda
        if isinstance(value, DeviceArray):
            value.check_open()
            self._copy_from(value.address, value.strides, cuda.on_device)
            return
        pinned = self.context.pin(value)
        self._copy_from(pinned.address, contiguous_strides(self.shape, self.dtype.itemsize), cuda.to_device)
        self.context.keep_alive(pinned)

    def copy(self) -> DeviceArray:
        """Return a copy in new memory."""
        made = self.context.empty(self.shape, self.dtype)
        made.write(self)
        return made

    def wait(self) -> DeviceArray:
        """Wait until all work that is on the stream now is done."""
        cuda = self.context.cuda
        with self.context.lock:
            event = cuda.event()
            cuda("cudaEventRecord", event, self.context.stream)
        try:
            cuda("cudaEventSynchronize", event)
        finally:
            cuda("cudaEventDestroy", event)
        return self

    def reshape(self, *shape: int) -> DeviceArray:
        """Return a view of a contiguous array in another shape, else a copy. Raises ValueError if it does not fit."""
        whole = self.as_contiguous()
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.size} elements cannot be given the shape {list(shape)}")
        return DeviceArray(self.context, whole.owner, shape, self.dtype, address=whole.address)

    def as_contiguous(self) -> DeviceArray:
        """Return this array, or a copy if it is not contiguous."""
        return self if self.contiguous else self.copy()

    def numpy(self) -> np.ndarray:
        """Wait until the array is computed and return a copy on the host. Raises EngineError as `download` does."""
        return download([self])[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, DEVICE

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """Export the memory to another library: work on `stream` waits for the work that is on the chain's stream.

        The chain does not reuse the memory until the other library has released it.
        """
        self.check_open()
        if hasattr(self.owner, "wait_before_reuse"):
            self.owner.wait_before_reuse = True
        cuda, context = self.context.cuda, self.context
        with context.lock:
            if stream is None:
                cuda("cudaStreamSynchronize", context.stream)
            elif stream not in (-1, context.stream):
                event = cuda.event()
                cuda("cudaEventRecord", event, context.stream)
                cuda("cudaStreamWaitEvent", stream, event, 0)
                cuda("cudaEventDestroy", event)
        elements = [stride // self.dtype.itemsize for stride in self.strides]
        return dlpack.capsule(self, self.address, self.shape, elements, self.dtype, device=(dlpack.CUDA, DEVICE))

    def _copy_from(self, source: int, strides: Sequence[int], kind: Any) -> None:
        with self.context.lock:
            target, itemsize = (self.address, self.strides), self.dtype.itemsize
            copy_strided(self.context, target, (source, strides), self.shape, itemsize=itemsize, kind=kind)

    def check_open(self) -> None:
        """Raise EngineError if the sessions of the array's chain were closed."""
        if self.context.closed:
            raise EngineError("engine.closed", "a device array was used after its sessions were closed")


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-contiguous array."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def copy_strided(
    context: ArrayContext,
    target: tuple[int, Sequence[int]],
    source: tuple[int, Sequence[int]],
    shape: Sequence[int],
    *,
    itemsize: int,
    kind: Any,
) -> None:
    """Put a copy between two views of one shape on the stream, in as few pieces as their strides allow.

    `target` and `source` are (address, strides in bytes); `kind` is CUDA's, such as host to device.
    """
    if 0 in shape:
        return
    (to, to_strides), (origin, from_strides) = target, source
    width = itemsize
    outer: list[tuple[int, int, int]] = []  # size, target stride, source stride; innermost first
    for size, ours, theirs in zip(reversed(shape), reversed(to_strides), reversed(from_strides), strict=True):
        if size == 1:
            continue
        if not outer and ours == theirs == width:
            width *= size
        elif outer and (ours, theirs) == (outer[-1][0] * outer[-1][1], outer[-1][0] * outer[-1][2]):
            outer[-1] = (outer[-1][0] * size, outer[-1][1], outer[-1][2])
        else:
            outer.append((size, ours, theirs))
    rows = outer.pop(0) if outer and min(outer[0][1:]) >= width else (1, width, width)
    for place in np.ndindex(*(size for size, _, _ in reversed(outer))):
        steps = list(zip(place, reversed(outer), strict=True))
        ours = to + sum(i * stride for i, (_, stride, _) in steps)
        theirs = origin + sum(i * stride for i, (_, _, stride) in steps)
        if rows[0] == 1:
            context.cuda.copy(ours, theirs, width, kind, context.stream)
        else:
            context.cuda("cudaMemcpy2DAsync", ours, rows[1], theirs, rows[2], width, rows[0], kind, context.stream)


def download(arrays: Sequence[DeviceArray]) -> list[np.ndarray]:
    """Return copies of arrays of one chain on the host, with a single wait for the stream.

    Raises:
        EngineError: the chain was closed, or the work before them failed.
    """
    if not arrays:
        return []
    context = arrays[0].context
    cuda, landed = context.cuda, []
    with context.lock:
        for array in arrays:
            array.check_open()
            whole = array.as_contiguous()
            block = context.pinned.take(max(whole.nbytes, 1))
            cuda.copy(block.address, whole.address, whole.nbytes, cuda.to_host, context.stream)
            landed.append((whole, block))
    arrays[0].wait()  # without the lock: other threads may put work on the stream meanwhile
    return [host_view(block, whole.nbytes).view(whole.dtype).reshape(whole.shape).copy() for whole, block in landed]
