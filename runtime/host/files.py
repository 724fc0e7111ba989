"""Write a file whole or not at all, and hold one for this process alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge_stg.runtime.errors import BridgeError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a temporary sibling; rename it to `path` when the block ends well, remove it otherwise.

    The sibling keeps the suffix, from which writers of images and videos tell the format.

    Raises:
        BridgeError: `path` is a folder, or the folder that it should lie in does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise BridgeError(f"{path} is a folder; expected the name of a file to write.")
    if not path.parent.is_dir():
        raise BridgeError(f"{path} cannot be written: the folder {path.parent} does not exist. Make it first.")
    stem = path.stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")  # a name holds 255 bytes
    temporary = path.with_name(f".{stem}.partial{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(made: Path, place: Path, *, aside: Path) -> None:
    """Rename a finished folder into its place; what was there goes when the new one is, and comes back if it cannot.

    Args:
        aside: where the old folder waits; on the same file system, and not there yet.
    """
    had_old = place.exists()
    if had_old:
        os.rename(place, aside)
    try:
        os.rename(made, place)
    except BaseException:
        if had_old:
            os.rename(aside, place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def hold(descriptor: int, *, otherwise: str) -> None:
    """Hold an open file for this process until it is closed; where the system has no such locks, nothing happens.

    Args:
        otherwise: what to say if another process holds it.

    Raises:
        BridgeError: another process does.
    """
    with suppress(ImportError):  # on systems without it (Windows) nothing stops a second process
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BridgeError(otherwise) from None
