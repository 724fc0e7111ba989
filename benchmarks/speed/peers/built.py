"""What a runner builds once of a model: by a process of its own, and under its final name only when it is whole."""

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
    """Make a folder unless it is there; return the seconds that it took, 0 where it was there.

    Args:
        folder: what is made.
        command: of a folder to write into, the arguments of Python that fill it.

    Raises:
        PeerError: the command failed; the message ends with what it said last.
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
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        raise PeerError(f"building {folder.name} failed: {said[-1][:1000]}")
    os.replace(partial, folder)
    return time.perf_counter() - began
