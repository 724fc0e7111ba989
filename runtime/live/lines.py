"""Files of one JSON object per line that programs append to."""

from __future__ import annotations

import json
from pathlib import Path

BLOCK = 1 << 16


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
