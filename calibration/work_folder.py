"""The folder for intermediate results of a calibration, from which the same command resumes after a kill.

Its content is named by digests of everything that it was made from, so that results of another calibration never match.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import lock_file, replacing
from bridge_stg.runtime.host.parse import parse_json
from bridge_stg.runtime.parity.golden import READ_ERRORS

NOTE = "README"


def digest(*parts: Any) -> str:
    """Return a short name for JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path, kind: Any = Any) -> Any:
    """Return the content of a JSON file as `kind`, see `from_json`.

    None if the file does not exist or is damaged: what it kept is computed again.
    """
    try:
        values = parse_json(path.read_bytes(), finite=False)
        return values if kind is Any else from_json(kind, values)
    except (FileNotFoundError, ValueError):
        return None


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of an .npz file by name; None if it does not exist or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (*READ_ERRORS, TypeError, AttributeError):  # the last two for an .npy file
        return None


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """Lock a work folder. Raises BridgeError if it is locked, or is not a work folder."""
    note = folder / NOTE
    if folder.exists() and not note.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        what = f"{folder}: exists and is not the work folder of a calibration. Move it away, or choose another --out."
        raise BridgeError("calibration.not_a_work_folder", what)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text("Work of `calibrate`. The same command resumes from here; delete the folder when done.\n")
    with note.open("r+") as locked:
        lock_file(locked.fileno(), message=f"{folder}: another calibration runs there. Wait, or change --out.")
        yield folder
