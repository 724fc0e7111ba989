"""The calls of the CUDA runtime that device arrays need, by cuda-python, which is imported on first use.

All work runs on the first device that CUDA_VISIBLE_DEVICES leaves. A failed call raises EngineError with CUDA's text.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.errors import EngineError

DEVICE = 0


class OutOfDeviceMemory(EngineError):
    """The device has too little memory for an allocation; the message has the free bytes."""


@dataclass(frozen=True)
class DeviceFacts:
    """The device's name, its compute capability (`sm` 87 is 8.7), and whether it shares the host's memory."""

    name: str
    sm: int
    integrated: bool


class Cuda:
    """The CUDA runtime on one device.

    Args:
        api: a module with the names of `cuda.bindings.runtime`; None: that module.

    Raises:
        EngineError: cuda-python or a usable device or driver is missing.
    """

    def __init__(self, api: Any = None) -> None:
        self.api: Any = api if api is not None else _cuda_python()
        self.success = self.api.cudaError_t.cudaSuccess
        kinds = self.api.cudaMemcpyKind
        self.to_device, self.to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self.on_device = kinds.cudaMemcpyDeviceToDevice
        if not self._device_count():
            raise EngineError("engine.no_device", "CUDA finds no device; check the driver and CUDA_VISIBLE_DEVICES.")

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
            raise OutOfDeviceMemory("engine.out_of_memory", f"{name}: {reason}")
        raise EngineError("engine.device_failed", f"CUDA failed in {name}: {reason}")

    def _device_count(self) -> int:
        status, count = self.api.cudaGetDeviceCount()
        if getattr(status, "name", "") == "cudaErrorInsufficientDriver":
            version = self.api.cudaRuntimeGetVersion()[1]
            raise EngineError(
                "engine.no_device",
                f"the NVIDIA driver is missing, or older than the CUDA {version // 1000}.{version % 1000 // 10} that "
                'this cuda-python needs. Update the driver, or install an older one: pip install "cuda-python<13"',
            )
        return int(self._checked("cudaGetDeviceCount", (status, count)))

    def facts(self) -> DeviceFacts:
        """Return the device's name and properties."""
        properties = self("cudaGetDeviceProperties", DEVICE)
        name = properties.name
        return DeviceFacts(
            name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
            sm=10 * int(properties.major) + int(properties.minor),
            integrated=bool(properties.integrated),
        )

    def malloc(self, size: int) -> int:
        """Allocate `size` bytes, aligned to at least 256; return the address. Raises OutOfDeviceMemory."""
        try:
            return int(self("cudaMalloc", size))
        except OutOfDeviceMemory as error:
            status, free, _ = self.api.cudaMemGetInfo()
            found = f"{int(free) / 2**20 if status == self.success else 0:.0f} MiB are free"
            raise OutOfDeviceMemory(
                "engine.out_of_memory",
                f"the GPU cannot allocate {size / 2**20:.0f} MiB more ({found}). Use smaller budgets, a lower "
                "precision or shorter videos, or close other programs on this GPU.",
            ) from error

    def malloc_host(self, size: int) -> int:
        """Return the address of `size` pinned bytes on the host, which asynchronous copies need."""
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


def _cuda_python() -> Any:
    if sys.platform == "linux":  # importing cuda-python takes long; check for a driver first
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise EngineError("engine.no_device", "the NVIDIA driver is missing: no libcuda.so.1") from None
    try:
        import cuda.bindings.runtime as api
    except ImportError as error:
        install = 'pip install cuda-python (for a driver of CUDA 12, as on JetPack 6: "cuda-python<13")'
        message = f"the package cuda-python cannot be imported ({error}). Install it: {install}"
        raise EngineError("engine.not_installed", message) from error
    return api
