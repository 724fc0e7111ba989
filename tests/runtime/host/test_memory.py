"""Freed blocks go back to the system, where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bridge_stg.runtime.host.memory import available_bytes, gigabytes

ROOT = Path(__file__).parents[3]
PROGRAM = """
import ctypes.util, os, sys
from bridge_stg.runtime.host.memory import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

told = return_freed_memory() if sys.argv[2] == "return" else None
for _ in range(3):
    bytearray(8 << 20)  # freed at once: by itself, the threshold rises above the blocks below
before = resident()
held = []
for _ in range(100):
    held += [bytearray(1 << 20), bytearray(4 << 10)]
del held[:-1:2]  # the large ones; the small ones between them hold the heap in place
print(told, resident() - before)
"""


def grown(how: str) -> tuple[str, int]:
    """Return what the function said and how many bytes a process still holds of 100 MiB that were freed."""
    command = [sys.executable, "-c", PROGRAM, str(ROOT), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    told, held = done.stdout.split()
    return told, int(held)


def test_freed_blocks_are_given_back() -> None:
    told, held = grown("return")
    _, kept = grown("keep")
    if told == "False":  # another C library: nothing was changed
        assert abs(held - kept) < 2**24
        return
    assert held < 2**24 < kept


def test_a_control_group_limits_the_available_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert available_bytes(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) != 3000


def test_sizes_as_text() -> None:
    assert gigabytes(4.26e9) == "4.3 GB" and gigabytes(2**20) == "1 MB"
