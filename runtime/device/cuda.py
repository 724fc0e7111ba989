"""The calls of CUDA's runtime that device buffers need, over cuda-python, which is imported on first use only.

All work is on the first device that CUDA_VISIBLE_DEVICES leaves. A failing call raises EngineError in CUDA's words.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.errors import EngineError

DEVICE = 0


class OutOfDeviceMemory(EngineError):
    """An allocation that did not fit; the message says how much was free."""


@dataclass(frozen=True)
class DeviceFacts:
    """The device's name, its compute capability (`sm` 87 is 8.7), and whether it shares the host's memory."""

    name: str
    sm: int
    integrated: bool


class Cuda:
    """CUDA's runtime on one device.

    Args:
        api: a module with the names of `cuda.bindings.runtime`; None: that module.

    Raises:
        EngineError: cuda-python is missing, or there is no device or no driver that it can use.
    """

    def __init__(self, api: Any = None) -> None:
        self.api: Any = api if api is not None else _cuda_python()
        self.success = self.api.cudaError_t.cudaSuccess
        kinds = self.api.cudaMemcpyKind
        self.to_device, self.to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self.on_device = kinds.cudaMemcpyDeviceToDevice
        if not self._device_count():
            raise EngineError("CUDA finds no device. Is a GPU visible (CUDA_VISIBLE_DEVICES)?")

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Make one call and return its value.

        Raises:
            OutOfDeviceMemory: the device has no memory left.
            EngineError: any other error.
        """
        return self._checked(name, getattr(self.api, name)(*arguments))

    def _checked(self, name: str, result: Any) -> Any:
        status, *values = result
        if status == self.success:
            return values[0] if values else None
        text = self.api.cudaGetErrorString(status)[1]
        reason = f"{text.decode() if isinstance(text, bytes) else text} ({getattr(status, 'name', status)})"
        if status == self.api.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfDeviceMemory(f"{name}: {reason}")
        raise EngineError(f"CUDA failed in {name}: {reason}")

    def _device_count(self) -> int:
        status, count = self.api.cudaGetDeviceCount()
        if getattr(status, "name", "") == "cudaErrorInsufficientDriver":
            version = self.api.cudaRuntimeGetVersion()[1]
            raise EngineError(
                f"the NVIDIA driver is missing, or older than CUDA {version // 1000}.{version % 1000 // 10}, for which "
                'this cuda-python was made. Update the driver, or install an older one: pip install "cuda-python<13"'
            )
        return int(self._checked("cudaGetDeviceCount", (status, count)))

    def facts(self) -> DeviceFacts:
        """Return what the device is."""
        properties = self("cudaGetDeviceProperties", DEVICE)
        name = properties.name
        return DeviceFacts(
            name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
            sm=10 * int(properties.major) + int(properties.minor),
            integrated=bool(properties.integrated),
        )

    def free_bytes(self) -> int:
        """Return how much of the device's memory is free."""
        status, free, _ = self.api.cudaMemGetInfo()
        return int(free) if status == self.success else 0

    def malloc(self, size: int) -> int:
        """Return the address of `size` bytes on the device, aligned to 256 or more."""
        try:
            return int(self("cudaMalloc", size))
        except OutOfDeviceMemory as error:
            free = self.free_bytes() / 2**20
            raise OutOfDeviceMemory(
                f"the GPU has no memory for {size / 2**20:.0f} MiB more ({free:.0f} MiB are free). Use smaller "
                "budgets, a lower precision or shorter videos, or end other programs on this GPU."
            ) from error

    def malloc_host(self, size: int) -> int:
        """Return the address of `size` pinned bytes on the host: only from and to such are copies asynchronous."""
        return int(self("cudaHostAlloc", size, self.api.cudaHostAllocDefault))

    def stream(self) -> int:
        """Return the handle of a new stream that does not wait for the default stream."""
        return int(self("cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking))

    def event(self) -> Any:
        """Return a new event, without timing."""
        return self("cudaEventCreateWithFlags", self.api.cudaEventDisableTiming)

    def copy(self, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        """Put a copy of `size` bytes on a stream."""
        if size:
            self("cudaMemcpyAsync", target, source, size, kind, stream)

    def copy_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: Any, stream: int
    ) -> None:
        """Put a copy of `rows` pieces of `width` bytes, `pitch` bytes apart on each side, on a stream."""
        if width and rows:
            self("cudaMemcpy2DAsync", target, pitch, source, source_pitch, width, rows, kind, stream)


def _cuda_python() -> Any:
    if sys.platform == "linux":  # cuda-python takes long to be imported, only to find no driver
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise EngineError("the NVIDIA driver is missing: libcuda.so.1 cannot be loaded") from None
    try:
        import cuda.bindings.runtime as api
    except ImportError as error:
        raise EngineError(
            f"the package cuda-python cannot be imported ({error}). Install it: pip install cuda-python "
            '(for a driver of CUDA 12, as on JetPack 6: "cuda-python<13")'
        ) from error
    return api
