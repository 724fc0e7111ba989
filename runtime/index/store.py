"""Files of named arrays, each written completely or not at all, and protected by a hash. Knows nothing of videos."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bridge_stg.runtime.host.failures import converting_os_errors
from bridge_stg.runtime.host.files import replacing

Arrays = Mapping[str, np.ndarray]

PART_BYTES = 320
"""Upper bound of the bytes of a file per array besides its values."""

_log = logging.getLogger(__name__)


def nbytes_of(arrays: Arrays) -> int:
    """Return an upper bound of the bytes of the file that `write_arrays` writes."""
    return sum(values.nbytes + PART_BYTES for values in arrays.values())


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a file, or replace it: the SHA-256 of the rest, then an uncompressed `.npz`.

    Raises:
        HostError: the disk is full, or the file cannot be written.
    """
    with converting_os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w+b") as file:
            file.write(bytes(hashlib.sha256().digest_size))
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
            digest = _rest_sha256(file)
            file.seek(0)
            file.write(digest)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read a file of `write_arrays`; None if there is none, or if it was damaged, which also deletes it.

    Raises:
        HostError: the file cannot be read.
    """
    with converting_os_errors(), suppress(FileNotFoundError):
        with open(path, "rb") as file:
            if file.read(hashlib.sha256().digest_size) == _rest_sha256(file):
                file.seek(hashlib.sha256().digest_size)
                with np.load(file, allow_pickle=False) as arrays:
                    return dict(arrays)
        _log.warning("%s is damaged: it does not match its hash; it is deleted, and computed again", path)
        with suppress(OSError):
            path.unlink()
    return None


def _rest_sha256(file: BinaryIO) -> bytes:
    """Return the SHA-256 of what follows the hash at the start of a file, reading 1 MiB at a time."""
    digest = hashlib.sha256()
    file.seek(digest.digest_size)
    while block := file.read(2**20):
        digest.update(block)
    return digest.digest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created; wait while another thread or process holds it.

    Where the system has no such locks (Windows), one of two writers may lose what it stored, which is computed again.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder was deleted since
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            break
    try:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
