"""Operations of the chain on arrays between its graphs, for arrays on the host and on the device alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from bridge_stg.runtime.device import dlpack
from bridge_stg.runtime.device.array import ArrayContext, DeviceArray
from bridge_stg.runtime.device.cuda import DEVICE
from bridge_stg.runtime.errors import EngineError

Array: TypeAlias = "np.ndarray | DeviceArray"
"""Input or output of a graph. CPU backends return numpy arrays only."""


def join(parts: Sequence[Any], *, axis: int, zeros_before: int = 0) -> Any:
    """Concatenate arrays along an axis, after `zeros_before` zeros."""
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
    """Stack arrays of one shape along a new axis."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.stack(parts, axis=axis)
    made = first.context.empty([*first.shape[:axis], len(parts), *first.shape[axis:]], first.dtype)
    for i, part in enumerate(parts):
        made[(*(slice(None),) * axis, i)] = part
    return made


def repeat_new_axis(array: Any, times: int) -> Any:
    """Return an array [N, …] as [N, times, …], each element repeated; a view on the host."""
    if isinstance(array, np.ndarray):
        return np.broadcast_to(array[:, None], (len(array), times, *array.shape[1:]))
    return stack([array] * times, axis=1)


def contiguous(array: Any) -> Any:
    """Return the array, or a C-contiguous copy."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.as_contiguous()


def accept(value: Any, context: ArrayContext) -> Any:
    """Return an input as an array that a session on this device can use, without a copy if it is on the device.

    Values that are not arrays are returned unchanged; `check_feeds` rejects them.

    Raises:
        EngineError: the array is on another device, or its library cannot export it.
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
        found = f"a {type(value).__name__} is on DLPack device ({kind}, {number})"
        message = f"{found}, and this chain runs on CUDA device {DEVICE}; copy it to that device or to the host"
        raise EngineError("engine.bad_input", message)
    imported = dlpack.import_array(value, stream=context.stream)
    return DeviceArray(context, imported, imported.shape, imported.dtype, strides=imported.strides)


def on_host(array: Any) -> np.ndarray:
    """Return an array as a numpy array."""
    return array if isinstance(array, np.ndarray) else np.asarray(array)
