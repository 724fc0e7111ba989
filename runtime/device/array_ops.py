"""What the chain does with arrays between its graphs, for arrays on the host and on the device alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from bridge_stg.runtime.device import dlpack
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import DEVICE
from bridge_stg.runtime.errors import EngineError

Array: TypeAlias = "np.ndarray | DeviceArray"
"""What goes into a graph and comes out of it. CPU backends give numpy arrays only."""


def join(parts: Sequence[Any], *, axis: int, zeros_before: int = 0) -> Any:
    """Return arrays one behind the other along an axis, behind `zeros_before` zeros."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        blank = [np.zeros_like(np.take(first, [0] * zeros_before, axis=axis))] if zeros_before else []
        return np.concatenate([*blank, *parts], axis=axis)
    if len(parts) == 1 and not zeros_before:
        return first
    shape = list(first.shape)
    shape[axis] = zeros_before + sum(part.shape[axis] for part in parts)
    made = first.context.empty(shape, first.dtype)
    before: tuple[slice, ...] = (slice(None),) * axis
    if zeros_before:
        blank_shape = [*shape[:axis], zeros_before, *shape[axis + 1 :]]
        made[(*before, slice(0, zeros_before))] = made.context.zeros(blank_shape, first.dtype)
    at = zeros_before
    for part in parts:
        made[(*before, slice(at, at + part.shape[axis]))] = part
        at += part.shape[axis]
    return made


def stack(parts: Sequence[Any], *, axis: int = 0) -> Any:
    """Return arrays of one shape along a new axis."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.stack(parts, axis=axis)
    made = first.context.empty([*first.shape[:axis], len(parts), *first.shape[axis:]], first.dtype)
    for i, part in enumerate(parts):
        made[(*(slice(None),) * axis, i)] = part
    return made


def repeat_new_axis(array: Any, times: int) -> Any:
    """Return an array [N, …] as [N, times, …], each element of N repeated; a view where that costs nothing."""
    if isinstance(array, np.ndarray):
        return np.broadcast_to(array[:, None], (len(array), times, *array.shape[1:]))
    return stack([array] * times, axis=1)


def contiguous(array: Any) -> Any:
    """Return an array whose elements lie one behind the other."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.as_contiguous()


def accept(value: Any, context: DeviceContext) -> Any:
    """Return an input as an array that a session of this device can use, without a copy where it lies there.

    What is no array is returned as it is, for the check of inputs to complain about.

    Raises:
        EngineError: it lies on another device, or cannot be lent.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, DeviceArray):
        return value if value.context is context else value.numpy()
    if not dlpack.is_dlpack(value):
        return value
    kind, number = (int(part) for part in value.__dlpack_device__())
    if kind in (dlpack.CPU, dlpack.CUDA_PINNED):
        return np.from_dlpack(value) if kind == dlpack.CPU else np.asarray(value)
    if kind not in (dlpack.CUDA, dlpack.CUDA_MANAGED) or number != DEVICE:
        raise EngineError(
            f"a {type(value).__name__} lies on DLPack device ({kind}, {number}), and this chain runs on CUDA device "
            f"{DEVICE}; copy it there, or to the host"
        )
    lent = dlpack.borrow(value, stream=context.stream)
    return DeviceArray(context, lent, lent.shape, lent.dtype, strides=lent.strides)


def on_host(array: Any) -> np.ndarray:
    """Return an array as numpy's."""
    return array if isinstance(array, np.ndarray) else np.asarray(array)
