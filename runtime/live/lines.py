"""Files of one JSON object per line that programs append to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import lock_file

_log = logging.getLogger(__name__)
BLOCK = 1 << 16


@contextmanager
def appended_lines(path: Path, *, overwrite: bool = False) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that appends a value to a file as one line, unbuffered; a new file is created.

    A last line that a killed process left incomplete is removed, or with `overwrite` all lines. Raises BridgeError if
    another process writes the file.
    """
    with open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        lock_file(file.fileno(), message=f"{path}: another process appends to this file; give another --jsonl.")
        if overwrite:
            file.truncate(0)
        elif complete_lines(path):
            _log.warning("Note: %s ended in an incomplete line, which was removed.", path)

        def append(value: Mapping[str, Any]) -> None:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")

        yield append


def check_lines(path: Path) -> None:
    """Raise BridgeError if a file exists and has something else than lines of JSON objects."""
    if path.exists() and not has_lines(path):
        what = f"{path} exists, and its first line is no JSON object. Give another --jsonl, or remove it."
        raise BridgeError("output.exists", what)


def has_lines(path: Path) -> bool:
    """Return whether a file is empty or begins as a JSON object in one line does."""
    with open(path, "rb") as file:
        return b'{"'.startswith(file.read(2))


def complete_lines(path: Path) -> bool:
    """End a file in a complete line: remove a truncated last line, and return whether there was one."""
    with open(path, "r+b") as file:
        size = end = file.seek(0, 2)
        last = b""
        while end:
            start = max(0, end - BLOCK)
            file.seek(start)
            block = file.read(end - start)
            newline = block.rfind(b"\n")
            last = block[newline + 1 :] + last
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end == size:
            return False
        try:
            json.loads(last)
        except ValueError:
            file.truncate(end)
            return True
        file.seek(0, 2)
        file.write(b"\n")
        return False
