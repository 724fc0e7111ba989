"""How the C library keeps freed memory, for processes that run for days.

glibc raises the size from which a block is mapped on its own (and so given back when it is freed) each time one is
freed, up to 32 MiB. Smaller ones then lie scattered over the heap, which stays as large as it ever was and trembles.
"""

from __future__ import annotations

import ctypes
import ctypes.util

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt` (glibc, malloc.h)."""
BLOCK_BYTES = 2**17
"""glibc's own first threshold; setting it keeps it there."""


def return_freed_memory() -> bool:
    """Let the C library give blocks from 128 KiB on back to the system as soon as they are freed, in this process.

    Returns:
        Whether it can be told so: whether it is glibc.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, BLOCK_BYTES))
