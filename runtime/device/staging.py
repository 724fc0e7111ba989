"""Inputs from the host: packed into pinned memory and uploaded in one copy into permanent device memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.memory import ALIGNMENT, Block, host_view


class Staging:
    """The host inputs of one session's calls. To be used under the chain's lock.

    Args:
        context: the chain's device.
        overlap: whether uploads run on a second stream, in parallel with the previous call; they alternate between two
            places then. Otherwise inputs have the same addresses in every call, which CUDA graphs need.
    """

    def __init__(self, context: DeviceContext, *, overlap: bool) -> None:
        self._context, self._overlap = context, overlap
        self._places = [_Place(context) for _ in range(2 if overlap else 1)]
        self._next = 0

    def send(self, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Put the upload of arrays on a stream, before all that is put on the chain's stream next.

        Returns:
            The address of each array on the device. It is valid for work that is put on the chain's stream before
            `mark_used`.
        """
        context, cuda = self._context, self._context.cuda
        place = self._places[self._next]
        offsets, total = {}, 0
        for name, array in arrays.items():
            offsets[name] = total
            total += -(-max(array.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        device, pinned = place.sized(total)
        if place.sent:
            cuda("cudaEventSynchronize", place.uploaded)  # until then the pinned memory is read
        for name, array in arrays.items():
            if array.nbytes:
                view = host_view(pinned, array.nbytes, offsets[name]).view(array.dtype).reshape(array.shape)
                np.copyto(view, array)
        stream = context.uploads if self._overlap else context.stream
        if self._overlap and place.used:
            cuda("cudaStreamWaitEvent", stream, place.consumed, 0)
        cuda.copy(device.address, pinned.address, total, cuda.to_device, stream)
        cuda("cudaEventRecord", place.uploaded, stream)
        place.sent = True
        if self._overlap:
            cuda("cudaStreamWaitEvent", context.stream, place.uploaded, 0)
        return {name: device.address + offset for name, offset in offsets.items()}

    def mark_used(self) -> None:
        """Declare that all work that reads the last inputs is on the chain's stream."""
        if self._overlap:
            place = self._places[self._next]
            self._context.cuda("cudaEventRecord", place.consumed, self._context.stream)
            place.used = True
            self._next = (self._next + 1) % len(self._places)

    def close(self) -> None:
        """Free the events. The device must have finished."""
        for place in self._places:
            for event in (place.uploaded, place.consumed):
                self._context.cuda("cudaEventDestroy", event)
        self._places = []


class _Place:
    def __init__(self, context: DeviceContext) -> None:
        self._context = context
        self._blocks: tuple[Block, Block] | None = None
        self.uploaded: Any = context.cuda.event()
        self.consumed: Any = context.cuda.event()
        self.sent = self.used = False

    def sized(self, size: int) -> tuple[Block, Block]:
        """Return device and pinned memory of at least `size` bytes; it only grows."""
        if self._blocks is None or self._blocks[0].size < size:
            cuda = self._context.cuda
            for stream in (self._context.uploads, self._context.stream):
                cuda("cudaStreamSynchronize", stream)
            self._blocks = None
            self._blocks = (self._context.memory.take(size), self._context.pinned.take(size))
        return self._blocks
