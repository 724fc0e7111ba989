"""The memory of this process: available bytes, peak, and release of freed blocks."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of `mallopt` (glibc, malloc.h)
BLOCK_BYTES = 2**17
"""glibc's first mmap threshold; setting it explicitly stops glibc from raising it."""


def available_bytes(cgroup: Path = CGROUP) -> int | None:
    """Return the bytes still available to this process, given its control group; None: unknown."""
    found = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        limit, used = ((cgroup / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        if limit != "max":
            found.append(int(limit) - int(used))
    return min(found, default=None)


def gigabytes(count: float) -> str:
    """Format a number of bytes for messages, such as "1.2 GB" or "35 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far (on Linux, VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Reset the peak to the current memory of this process. Return False where that is unsupported (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def return_freed_memory() -> bool:
    """Make the C library return blocks of 128 KiB or more to the system as soon as they are freed, in this process.

    glibc raises the size from which a block is mapped separately, up to 32 MiB, each time such a block is freed.
    Smaller blocks then fragment the heap, which never shrinks: a problem for processes that run for days.

    Returns:
        Whether the C library supports it (glibc does).
    """
    mallopt = _c_function("mallopt")
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES) and mallopt(M_TRIM_THRESHOLD, BLOCK_BYTES))


def trim_heap() -> None:
    """Return free memory in the heaps of all threads to the system, where the C library supports it."""
    if malloc_trim := _c_function("malloc_trim"):
        malloc_trim(0)


def _c_function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
