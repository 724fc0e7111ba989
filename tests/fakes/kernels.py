"""Fakes of NVRTC and of the driver's module calls that compute this project's kernels in numpy."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from tests.fakes.cuda import FakeCuda
from tests.fakes.streams import OK, cudaError_t

CUBIN = b"\x7fELF of sm_"
LOG = b"nvrtc: error: invalid value for --gpu-architecture (-arch)\n\0"


class FakeNvrtc:
    """Fake of the compiler `cuda.bindings.nvrtc` that accepts any source for the compute capabilities `knows`."""

    def __init__(self, *, knows: tuple[int, ...] = (80, 86, 87, 89, 90, 100, 110, 120)) -> None:
        self.knows = knows
        self.programs: dict[str, bytes] = {}

    def nvrtcCreateProgram(self, source: bytes, name: bytes, count: int, headers: Any, names: Any) -> tuple[Any, ...]:
        assert b'extern "C" __global__ void resample(' in source and (count, headers, names) == (0, [], [])
        self.programs["program"] = b""
        return OK, "program"

    def nvrtcCompileProgram(self, program: str, count: int, options: list[bytes]) -> tuple[Any, ...]:
        assert program in self.programs and count == len(options) == 1
        kind, _, sm = options[0].removeprefix(b"--gpu-architecture=").partition(b"_")
        if int(sm) not in self.knows:
            return (cudaError_t.cudaErrorInvalidValue,)
        if kind == b"sm":  # `compute` only makes PTX
            self.programs[program] = CUBIN + sm
        return (OK,)

    def nvrtcGetProgramLogSize(self, program: str) -> tuple[Any, ...]:
        return OK, len(LOG)

    def nvrtcGetProgramLog(self, program: str, log: bytes) -> tuple[Any, ...]:
        fill(log, LOG)
        return (OK,)

    def nvrtcGetCUBINSize(self, program: str) -> tuple[Any, ...]:
        return OK, len(self.programs[program])

    def nvrtcGetCUBIN(self, program: str, code: bytes) -> tuple[Any, ...]:
        fill(code, self.programs[program])
        return (OK,)

    def nvrtcDestroyProgram(self, program: str) -> tuple[Any, ...]:
        del self.programs[program]
        return (OK,)


def fill(buffer: bytes, content: bytes) -> None:
    """Overwrite a bytes object, as cuda-python's calls do."""
    assert len(buffer) == len(content) and sys.getrefcount(buffer) < 10
    ctypes.memmove(buffer, content, len(content))


class FakeDriver:
    """Fake of the part of `cuda.bindings.driver` that launches the kernel; it computes the result in numpy.

    Its calls need a current context, which `cudaSetDevice` makes in the calling thread. It takes machine code of its
    device only: this driver is older than the PTX of every NVRTC.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.launches = 0

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        if not self.cuda.is_set():
            return (cudaError_t.cudaErrorDeviceUninitialized,)
        if not image.startswith(CUBIN):
            return (cudaError_t.cudaErrorUnsupportedPtxVersion,)
        major, minor = self.cuda.sm
        if image != CUBIN + b"%d%d" % (major, minor):
            return (cudaError_t.cudaErrorNoKernelImageForDevice,)
        return OK, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return OK, name

    def cuLaunchKernel(self, kernel: bytes, *arguments: Any) -> tuple[Any, ...]:
        if not self.cuda.is_set():
            return (cudaError_t.cudaErrorDeviceUninitialized,)
        blocks, _, _, threads, _, _, shared, stream, (values, kinds), extra = arguments
        assert kernel == b"resample" and (shared, extra) == (0, 0) and len(values) == len(kinds) == 10
        origin, to, first, count, weights, taps, outer, size_to, size_from, inner = values
        assert (blocks - 1) * threads < outer * size_to * inner <= blocks * threads

        def table(address: int, *shape: int) -> np.ndarray:
            return self.cuda.view(address, 4 * int(np.prod(shape))).view(np.int32).reshape(shape)

        def work() -> None:
            pixels = self.cuda.view(origin, outer * size_from * inner).reshape(outer, size_from, inner).astype(np.int64)
            made = self.cuda.view(to, outer * size_to * inner).reshape(outer, size_to, inner)
            starts, counts, factors = table(first, size_to), table(count, size_to), table(weights, size_to, taps)
            for place in range(size_to):
                seen = slice(starts[place], starts[place] + counts[place])
                total = (factors[place, : counts[place], None] * pixels[:, seen]).sum(1) + (1 << 21)
                made[:, place] = (total >> 22).clip(0, 255)

        self.launches += 1
        self.cuda.enqueue(stream, work)
        return (OK,)
