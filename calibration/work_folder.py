"""The folder of a calibration's work, beside the bundle that it makes: a killed calibration goes on from what is there.

What lies in it is named by a digest of all that it was made from, so that nothing of another calibration is ever used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import lock_file, replacing

NOTE = "README"
LEFT_BY_KILLED = ".*.partial*"


def digest(*parts: Any) -> str:
    """Return a short name for JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Return what a file holds, None if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, values: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """Hold a work folder for this process, and say in a sentence if its disk is full.

    Raises:
        BridgeError: another process holds it, it is no folder of work, or its disk is full.
    """
    note = folder / NOTE
    if folder.exists() and not note.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise BridgeError(
            f"{folder}: is there already and holds no calibration's work. Move it away, or give another --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text("Work of `calibrate`. The same command goes on from here; delete the folder when done.\n")
        with note.open("r+") as held:
            busy = f"{folder}: another calibration works there. Wait for it, or give another --out."
            lock_file(held.fileno(), message=busy)
            for left in folder.rglob(LEFT_BY_KILLED):
                shutil.rmtree(left, ignore_errors=True)
            yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BridgeError(
            f"{folder}: the disk is full ({error.strerror}), and no bundle was written. Make room, and give the same "
            "command again: it goes on where it was"
        ) from error
