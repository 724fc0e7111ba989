"""Arrays in device memory: what one graph of a chain leaves there for the next.

They know as much of numpy's indexing as the chain needs (views by numbers and slices, assignment between views), copy
to the host only by `numpy()`, and go to other libraries through DLPack without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge_stg.runtime.device import dlpack
from bridge_stg.runtime.device.cuda import DEVICE
from bridge_stg.runtime.device.memory import host_view
from bridge_stg.runtime.errors import EngineError

if TYPE_CHECKING:
    from bridge_stg.runtime.device.context import DeviceContext


class DeviceArray:
    """An array, or a view of one, in the memory of a chain's device. Its content is there in the order of the stream.

    Args:
        context: the chain's device.
        owner: what keeps the memory alive: a block of the chain's pool, or another library's object.
        strides: in bytes; None: C-contiguous.
        address: of the first element; None: that of the block.
    """

    __array_priority__ = 1000

    def __init__(
        self,
        context: DeviceContext,
        owner: Any,
        shape: Sequence[int],
        dtype: np.dtype | type | str,
        *,
        strides: Sequence[int] | None = None,
        address: int | None = None,
    ) -> None:
        self.context, self._owner = context, owner
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.strides = contiguous_strides(self.shape, self.dtype.itemsize) if strides is None else tuple(strides)
        self.address: int = owner.address if address is None else address

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one behind the other in C order."""
        expected = contiguous_strides(self.shape, self.dtype.itemsize)
        return (
            all(n == 1 or s == e for n, s, e in zip(self.shape, self.strides, expected, strict=True)) or not self.size
        )

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} on {self.context.device.name})"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dims")
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> DeviceArray:
        """Return a view, by numbers and slices of step 1."""
        places = index if isinstance(index, tuple) else (index,)
        if len(places) > self.ndim:
            raise IndexError(f"{len(places)} indices for an array of {self.ndim} dims")
        shape, strides, address = [], [], self.address
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            place = places[axis] if axis < len(places) else slice(None)
            if isinstance(place, slice):
                start, stop, step = place.indices(size)
                if step != 1:
                    raise IndexError(f"a device array is cut in steps of 1, not of {step}")
                shape.append(max(0, stop - start))
                strides.append(stride)
                address += start * stride
            else:
                number = int(place) + (size if place < 0 else 0)
                if not 0 <= number < size:
                    raise IndexError(f"index {place} is out of bounds for axis {axis} of size {size}")
                address += number * stride
        return DeviceArray(self.context, self._owner, shape, self.dtype, strides=strides, address=address)

    def __setitem__(self, index: Any, value: DeviceArray | np.ndarray) -> None:
        self[index].write(value)

    def write(self, value: DeviceArray | np.ndarray) -> None:
        """Overwrite this array or view, in the order of the stream.

        Raises:
            EngineError: shape or dtype differ.
        """
        if tuple(value.shape) != self.shape or value.dtype != self.dtype:
            found = f"{value.dtype} {list(value.shape)}"
            raise EngineError(f"{found} cannot be written into a device array {self.dtype} {list(self.shape)}")
        self._check_alive()
        cuda = self.context.cuda
        if isinstance(value, DeviceArray):
            value._check_alive()
            self._copy_from(value.address, value.strides, cuda.on_device)
            return
        pinned = self.context.pin(value)
        self._copy_from(pinned.address, contiguous_strides(self.shape, self.dtype.itemsize), cuda.to_device)
        self.context.hold(pinned)

    def copy(self) -> DeviceArray:
        """Return a copy with memory of its own."""
        made = self.context.empty(self.shape, self.dtype)
        made.write(self)
        return made

    def wait(self) -> DeviceArray:
        """Return when all that was put on the stream for this array is done."""
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
        """Return the elements in another shape: of a contiguous array a view, else a copy."""
        whole = self.as_contiguous()
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.size} elements cannot be given the shape {list(shape)}")
        return DeviceArray(self.context, whole._owner, shape, self.dtype, address=whole.address)

    def as_contiguous(self) -> DeviceArray:
        """Return this array, or a copy if its elements do not lie one behind the other."""
        return self if self.contiguous else self.copy()

    def numpy(self) -> np.ndarray:
        """Wait for the array to be computed and return a copy on the host.

        Raises:
            EngineError: its chain was closed, or the work before it failed.
        """
        return download([self])[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, DEVICE

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """Lend the memory to another library: work on `stream` waits for what is on the chain's stream.

        The chain does not write there again until the other library has let go of it.
        """
        self._check_alive()
        if hasattr(self._owner, "wait_before_reuse"):
            self._owner.wait_before_reuse = True
        cuda, context = self.context.cuda, self.context
        with context.lock:
            if stream is None or stream == -1 or stream == context.stream:
                if stream is None:
                    cuda("cudaStreamSynchronize", context.stream)
            else:
                event = cuda.event()
                cuda("cudaEventRecord", event, context.stream)
                cuda("cudaStreamWaitEvent", stream, event, 0)
                cuda("cudaEventDestroy", event)
        elements = [stride // self.dtype.itemsize for stride in self.strides]
        return dlpack.capsule(self, self.address, self.shape, elements, self.dtype, (dlpack.CUDA, DEVICE))

    def _copy_from(self, source: int, strides: Sequence[int], kind: Any) -> None:
        with self.context.lock:
            copy_strided(
                self.context, (self.address, self.strides), (source, strides), self.shape, self.dtype.itemsize, kind
            )

    def _check_alive(self) -> None:
        if self.context.closed:
            raise EngineError("a device array was used after its sessions were closed")


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-contiguous array."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def copy_strided(
    context: DeviceContext,
    target: tuple[int, Sequence[int]],
    source: tuple[int, Sequence[int]],
    shape: Sequence[int],
    itemsize: int,
    kind: Any,
) -> None:
    """Put the copy of a view onto another of the same shape on the stream, in as few pieces as their strides allow.

    Args:
        target: address and strides in bytes.
        source: the same.
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
            context.cuda.copy_rows(ours, rows[1], theirs, rows[2], width, rows[0], kind, context.stream)


def download(arrays: Sequence[DeviceArray]) -> list[np.ndarray]:
    """Return copies of arrays of one chain on the host; the stream is waited for once.

    Raises:
        EngineError: their chain was closed, or the work before them failed.
    """
    if not arrays:
        return []
    context = arrays[0].context
    cuda, landed = context.cuda, []
    with context.lock:
        for array in arrays:
            array._check_alive()
            whole = array.as_contiguous()
            block = context.pinned.take(max(whole.nbytes, 1))
            cuda.copy(block.address, whole.address, whole.nbytes, cuda.to_host, context.stream)
            landed.append((whole, block))
        event = cuda.event()
        cuda("cudaEventRecord", event, context.stream)
    try:
        cuda("cudaEventSynchronize", event)  # outside the lock: others may put work on the stream meanwhile
    finally:
        cuda("cudaEventDestroy", event)
    return [
        host_view(block, whole.nbytes).view(whole.dtype).reshape(whole.shape).copy()
        if whole.nbytes
        else np.zeros(whole.shape, whole.dtype)
        for whole, block in landed
    ]
