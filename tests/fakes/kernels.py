"""Fakes of NVRTC and of the driver's module calls that compute this project's kernels in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fakes.cuda import FakeCuda
from tests.fakes.streams import OK, cudaError_t


class FakeNvrtc:
    """Fake of the compiler `cuda.bindings.nvrtc` that accepts any source."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def nvrtcCreateProgram(self, source: bytes, name: bytes, count: int, headers: Any, names: Any) -> tuple[Any, ...]:
        assert b'extern "C" __global__ void resample(' in source and (count, headers, names) == (0, [], [])
        return OK, source

    def nvrtcCompileProgram(self, program: bytes, count: int, options: list[bytes]) -> tuple[Any, ...]:
        assert count == len(options) == 1 and options[0].startswith(b"--gpu-architecture=compute_")
        return (cudaError_t.cudaErrorInvalidValue if self.fails else OK,)

    def nvrtcGetPTXSize(self, program: bytes) -> tuple[Any, ...]:
        return OK, 64

    def nvrtcGetPTX(self, program: bytes, code: bytes) -> tuple[Any, ...]:
        assert len(code) == 64
        return (OK,)

    def nvrtcDestroyProgram(self, program: bytes) -> tuple[Any, ...]:
        return (OK,)


class FakeDriver:
    """Fake of the part of `cuda.bindings.driver` that launches the kernel; it computes the result in numpy."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.launches = 0

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        return OK, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return OK, name

    def cuLaunchKernel(self, kernel: bytes, *arguments: Any) -> tuple[Any, ...]:
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
