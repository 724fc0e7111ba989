"""Build a runner's files for a model once, in a subprocess; the folder gets its final name only when complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from protocol import PeerError


def built(folder: Path, command: Callable[[Path], Sequence[str]]) -> float:
    """Build a folder unless it exists; return the seconds it took, 0 if it existed.

    Args:
        folder: folder to build.
        command: given a folder to write into, returns the arguments of Python that fill it.

    Raises:
        PeerError: the command failed; the message ends with its last line of output.
    """
    if folder.exists():
        return 0.0
    began = time.perf_counter()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arguments = [sys.executable, *command(partial)]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        printed = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        raise PeerError(f"building {folder.name} failed: {printed[-1][:1000]}")
    os.replace(partial, folder)
    return time.perf_counter() - began
