"""The kernel that resizes images, and its compilation by NVRTC (part of CUDA). Needs the standard library only.

It is compiled to machine code (a CUBIN) of the device's compute capability. PTX would be assembled by the driver, which
rejects the PTX of an NVRTC newer than itself (CUDA_ERROR_UNSUPPORTED_PTX_VERSION).
"""

from __future__ import annotations

import importlib
from typing import Any

from bridge_stg.runtime.errors import EngineError

NAME = b"resample"
SOURCE = b"""
extern "C" __global__ void resample(
    const unsigned char* from, unsigned char* to, const int* first, const int* count, const int* weights,
    int taps, long long outer, int sizeTo, int sizeFrom, int inner)
{
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= outer * sizeTo * inner) return;
    int rest = (int)(index % inner);
    int place = (int)(index / inner % sizeTo);
    long long row = index / inner / sizeTo;
    int sum = 1 << 21;
    for (int i = 0; i < count[place]; ++i)
        sum += weights[place * taps + i] * from[(row * sizeFrom + first[place] + i) * inner + rest];
    sum >>= 22;
    to[index] = (unsigned char)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}
"""


def compile_kernel(sm: int, nvrtc: Any = None) -> bytes:
    """Compile the kernel to a CUBIN.

    Args:
        sm: compute capability of the device (87 is 8.7).
        nvrtc: a module with the names of `cuda.bindings.nvrtc`; None: that module.

    Raises:
        EngineError: NVRTC or cuda-python is missing, or this NVRTC does not know the device.
    """
    try:
        nvrtc = nvrtc if nvrtc is not None else importlib.import_module("cuda.bindings.nvrtc")
        program = checked("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(SOURCE, b"resample.cu", 0, [], []))
    except (ImportError, RuntimeError) as error:  # the package, or the library that it loads at the first call
        raise EngineError("engine.not_installed", f"NVRTC cannot be loaded: {' '.join(str(error).split())}") from error
    try:
        option = f"--gpu-architecture=sm_{sm}".encode()
        try:
            checked("nvrtcCompileProgram", nvrtc.nvrtcCompileProgram(program, 1, [option]))
        except EngineError as error:
            log = b" " * checked("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))
            checked("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, log))
            reason = " ".join(log.decode(errors="replace").replace("\0", "").split())
            raise EngineError(error.code, f"{error} for SM {sm}: {reason}") from None
        code: bytes = b" " * checked("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))
        checked("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def checked(name: str, result: tuple[Any, ...]) -> Any:
    """Return the value of a call of NVRTC or of the driver. Raises EngineError if it failed."""
    status, *values = result
    if int(status) != 0:
        raise EngineError("engine.device_failed", f"{name} failed: {getattr(status, 'name', status)}")
    return values[0] if values else None
