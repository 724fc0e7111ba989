"""Resize images in device memory, to the same bytes as Pillow's bicubic filter on the host.

One small kernel (`kernel`). Pillow resamples one axis at a time, in integers (libImaging/Resample.c, 8 bits per
channel): weights in 22 bits, results rounded to a byte between the axes. If the kernel cannot be compiled or loaded,
images are resized on the host, and `doctor` reports it.
"""

from __future__ import annotations

import ctypes
import logging
import math
from typing import Any

import numpy as np

from bridge_stg.runtime.device.array import ArrayContext, DeviceArray, HostResize
from bridge_stg.runtime.device.cuda import DEVICE
from bridge_stg.runtime.device.kernel import NAME, checked, compile_kernel
from bridge_stg.runtime.errors import EngineError

_log = logging.getLogger(__name__)

PRECISION_BITS = 22
SUPPORT = 2.0  # half width of the bicubic filter (a = −0.5)
THREADS = 256


def weights_of(size_from: int, size_to: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Pillow's bicubic weights along one axis.

    Returns:
        For each target position, the first source position, int32 [size_to]; the number of source positions, int32
        [size_to]; and their weights times 2²², int32 [size_to, taps].
    """
    scale = size_from / size_to
    filter_scale = max(scale, 1.0)
    support = SUPPORT * filter_scale
    taps = math.ceil(support) * 2 + 1
    first, count = np.zeros(size_to, np.int32), np.zeros(size_to, np.int32)
    weights = np.zeros((size_to, taps), np.int32)
    for place in range(size_to):
        center = (place + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        stop = min(int(center + support + 0.5), size_from)
        values = [_bicubic((x - center + 0.5) / filter_scale) for x in range(start, stop)]
        total = sum(values)
        first[place], count[place] = start, stop - start
        for i, value in enumerate(values):
            exact = value / total * (1 << PRECISION_BITS)
            weights[place, i] = int(exact - 0.5) if exact < 0 else int(exact + 0.5)
    return first, count, weights


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


class DeviceResizer:
    """Resizes images on one device. `bindings` replaces the modules nvrtc and driver of `cuda.bindings`."""

    def __init__(self, context: ArrayContext, bindings: tuple[Any, Any] | None = None) -> None:
        self._context = context
        self._tables: dict[tuple[int, int], tuple[DeviceArray, ...]] = {}
        try:
            nvrtc, self._driver = bindings or load_bindings()
            self._kernel: Any = self._load(compile_kernel(context.device.sm, nvrtc))
        except (EngineError, ImportError, RuntimeError) as error:
            self._kernel = None
            _log.warning("frames on the GPU are resized on the host: %s (see `doctor`)", error)

    @property
    def compiled(self) -> bool:
        """Whether images stay on the device."""
        return self._kernel is not None

    def resize(self, image: DeviceArray, size: tuple[int, int], on_host: HostResize) -> DeviceArray:
        """Return a copy of an image uint8 [H, W, 3] at (height, width) `size`; `on_host` is used without NVRTC."""
        if image.shape[:2] == size:
            return image.copy()
        if self._kernel is None:
            return self._context.upload(on_host(image.numpy(), size))
        height, width, channels = image.shape
        whole = image.as_contiguous()
        if width != size[1]:  # along the rows first, as Pillow does
            shape = (height, size[1], channels)
            whole = self._along(whole, shape, outer=height, sizes=(width, size[1]), inner=channels)
        if height != size[0]:
            inner = size[1] * channels
            whole = self._along(whole, (*size, channels), outer=1, sizes=(height, size[0]), inner=inner)
        return whole

    def _along(
        self, image: DeviceArray, shape: tuple[int, ...], *, outer: int, sizes: tuple[int, int], inner: int
    ) -> DeviceArray:
        context = self._context
        if sizes not in self._tables:
            self._tables[sizes] = tuple(context.upload(table) for table in weights_of(*sizes))
        first, count, weights = self._tables[sizes]
        made = context.empty(shape, np.uint8)
        addresses = (image.address, made.address, first.address, count.address, weights.address)
        numbers = (weights.shape[1], outer, sizes[1], sizes[0], inner)
        kinds = (ctypes.c_void_p,) * 5 + (ctypes.c_int, ctypes.c_longlong, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        blocks = -(-made.size // THREADS)
        with context.lock:
            context.cuda("cudaSetDevice", DEVICE)  # the driver's calls need it set in every thread
            launched = self._driver.cuLaunchKernel(
                self._kernel, blocks, 1, 1, THREADS, 1, 1, 0, context.stream, ((*addresses, *numbers), kinds), 0
            )
        checked("cuLaunchKernel", launched)
        return made

    def _load(self, code: bytes) -> Any:
        with self._context.lock:
            self._context.cuda("cudaSetDevice", DEVICE)  # the driver's calls need it set in every thread
            module = checked("cuModuleLoadData", self._driver.cuModuleLoadData(code))
            return checked("cuModuleGetFunction", self._driver.cuModuleGetFunction(module, NAME))


def load_bindings() -> tuple[Any, Any]:
    """Return the modules nvrtc and driver of `cuda.bindings`."""
    from cuda.bindings import driver, nvrtc

    return nvrtc, driver
