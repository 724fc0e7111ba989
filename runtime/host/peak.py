"""The most memory that this process has held."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_bytes() -> int:
    """Return the most memory that this process has held so far (on Linux, VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Let `peak_bytes` begin anew with what this process holds now; False where the system cannot (it is Linux's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
