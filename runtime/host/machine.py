"""Facts about this machine: processor, memory, NVIDIA devices and driver. Needs the standard library only.

The NVIDIA driver is queried through its library libcuda by ctypes: that needs no package, and works on a Jetson, where
nvidia-smi reports little. Files are read below a root folder, which tests can set.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.runtime.host.packages import installed_versions

CPU_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Flags that decide how fast INT8 and 16-bit matmuls are; the second line is for Arm."""

JETPACKS = {
    (36, 2): "6.0 DP", (36, 3): "6.0", (36, 4): "6.1 or 6.2", (36, 5): "6.2.2 or 6.2.3",
    (38, 2): "7.0", (38, 4): "7.1", (39, 2): "7.2",
}  # fmt: skip
"""Jetson Linux (L4T) releases, major and minor, and the JetPack they belong to
(https://developer.nvidia.com/embedded/jetpack-archive)."""

_MULTIPROCESSOR_COUNT, _INTEGRATED, _CC_MAJOR, _CC_MINOR = 16, 18, 75, 76  # CUdevice_attribute
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Device:
    """An NVIDIA device. Sizes are in bytes, None if unknown.

    `sm` is the compute capability (87 is 8.7), `integrated` whether it shares the host's memory. `largest_block` is the
    largest allocation that succeeds now; it is only measured on devices with their own memory.
    """

    index: int
    name: str
    sm: int
    integrated: bool
    multiprocessors: int
    memory: int | None
    free: int | None
    largest_block: int | None


@dataclass(frozen=True)
class Memory:
    """The host's memory in bytes.

    `largest_block` is the largest physically contiguous block in the kernel's page allocator, and `largest_blocks` the
    number of blocks of that size; a Jetson's GPU takes its memory from there. None: unknown.
    """

    total: int | None
    available: int | None
    largest_block: int | None
    largest_blocks: int | None
    cma_total: int | None
    cma_free: int | None


@dataclass(frozen=True)
class Machine:
    """Facts about a machine. `driver` is the kernel module's version, `cuda` the newest CUDA that the driver runs."""

    system: str
    architecture: str
    python: str
    board: str | None
    l4t: str | None
    jetpack: str | None
    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    memory: Memory
    driver: str | None
    cuda: str | None
    devices: tuple[Device, ...]
    device_problem: str | None


def machine(*, root: Path = Path("/"), libcuda: Any = None) -> Machine:
    """Return the facts about this machine.

    Args:
        root: folder that contains proc/, sys/ and etc/.
        libcuda: the driver's library; None: load it.
    """
    info = _read(root / "proc/cpuinfo")
    l4t = _l4t(_read(root / "etc/nv_tegra_release"))
    cuda, devices, problem = _devices(libcuda)
    return Machine(
        system=_system(_read(root / "etc/os-release")),
        architecture=platform.machine(),
        python=platform.python_version(),
        board=_read(root / "proc/device-tree/model").strip("\0\n ") or None,
        l4t=None if l4t is None else ".".join(map(str, l4t)),
        jetpack=None if l4t is None else JETPACKS.get(l4t[:2]),
        cpu=_cpu(info),
        cores=os.cpu_count() or 1,
        cpu_flags=_flags(info),
        memory=_memory(_read(root / "proc/meminfo"), _read(root / "proc/buddyinfo")),
        driver=_driver(_read(root / "proc/driver/nvidia/version"), _read(root / "sys/module/nvidia/version")),
        cuda=cuda,
        devices=devices,
        device_problem=problem,
    )


def cpu_flags() -> tuple[str, ...]:
    """Return those of `CPU_FLAGS` that this machine's processors have."""
    return _flags(_read(Path("/proc/cpuinfo")))


def describe(*packages: str) -> dict[str, Any]:
    """Return the processor, system and Python, and the versions of installed `packages`, to record with a result."""
    info = _read(Path("/proc/cpuinfo"))
    return {
        "cpu": _cpu(info),
        "cores": os.cpu_count(),
        "flags": list(_flags(info)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": installed_versions(packages),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _system(text: str) -> str:
    named = re.search(r'^PRETTY_NAME="?([^"\n]*)', text, re.MULTILINE)
    return f"{named[1]}, kernel {platform.release()}" if named else platform.platform()


def _l4t(text: str) -> tuple[int, int, int] | None:
    """`# R36 (release), REVISION: 4.3, …` → (36, 4, 3)."""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?", text)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 0))


def _cpu(info: str) -> str:
    return _field(info, "model name") or _field(info, "Hardware") or platform.processor() or platform.machine()


def _flags(info: str) -> tuple[str, ...]:
    flags = set((_field(info, "flags") or _field(info, "Features")).split())
    return tuple(flag for flag in CPU_FLAGS if flag in flags)


def _driver(text: str, module: str) -> str | None:
    found = re.search(r"NVRM version:.*?(\d+\.\d+(?:\.\d+)?)", text)
    return found[1] if found else module.strip() or None


def _memory(meminfo: str, buddyinfo: str) -> Memory:
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    blocks: dict[int, int] = {}
    for line in buddyinfo.splitlines():  # Node 0, zone Normal, then how many free blocks of 1, 2, 4 … pages
        for order, count in enumerate(re.findall(r"\b\d+\b", line.partition("zone")[2])):
            blocks[order] = blocks.get(order, 0) + int(count)
    largest = max((order for order, count in blocks.items() if count), default=None)
    return Memory(
        total=sizes.get("MemTotal"),
        available=sizes.get("MemAvailable"),
        largest_block=None if largest is None else _PAGE << largest,
        largest_blocks=None if largest is None else blocks[largest],
        cma_total=sizes.get("CmaTotal"),
        cma_free=sizes.get("CmaFree"),
    )


def _devices(library: Any) -> tuple[str | None, tuple[Device, ...], str | None]:
    """Return the driver's CUDA version, its devices, and why it has none."""
    if library is None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None, (), "the NVIDIA driver's library libcuda.so.1 is not installed"
    number = ctypes.c_int()
    version = None
    if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    status = library.cuInit(0)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        words = (text.value or b"unknown error").decode()
        return version, (), f"the NVIDIA driver finds no device (cuInit gives {status}: {words})"
    library.cuDeviceGetCount(ctypes.byref(number))
    found = tuple(_device(library, index) for index in range(number.value))
    return version, found, None if found else "the NVIDIA driver lists no device"


def _device(library: Any, index: int) -> Device:
    handle = ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, 256, handle)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
        return value.value

    integrated = bool(attribute(_INTEGRATED))
    total, free, largest = _device_memory(library, handle, integrated)
    return Device(
        index=index,
        name=name.value.decode(errors="replace"),
        sm=10 * attribute(_CC_MAJOR) + attribute(_CC_MINOR),
        integrated=integrated,
        multiprocessors=attribute(_MULTIPROCESSOR_COUNT),
        memory=total,
        free=free,
        largest_block=largest,
    )


def _device_memory(library: Any, handle: Any, integrated: bool) -> tuple[int | None, int | None, int | None]:
    """Return total, free and largest allocation in bytes; the context that this needs takes some memory itself."""
    context = ctypes.c_void_p()
    if library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle):
        return None, None, None
    try:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if library.cuCtxSetCurrent(context) or library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)):
            return None, None, None
        # On shared memory, trying may make the kernel kill other programs.
        largest = None if integrated else _largest_allocation(library, free.value)
        return total.value, free.value, largest
    finally:
        library.cuDevicePrimaryCtxRelease_v2(handle)


def _largest_allocation(library: Any, free: int) -> int:
    """Find the largest allocation that succeeds, to 1 % of the free memory."""
    least, most, step = 0, free, max(1, free // 100)
    while most - least > step:
        size = most if least == 0 and most == free else (least + most) // 2
        address = ctypes.c_uint64()
        if library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)):
            most = size if size < most else most - step
        else:
            library.cuMemFree_v2(address)
            least = size
            if size == most:
                break
    return least
