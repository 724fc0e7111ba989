"""Write files and folders completely or not at all, and lock files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge_stg.runtime.errors import BridgeError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary sibling; rename it to `path` after the block, or remove it if the block fails.

    The sibling has the same suffix, from which writers of images and videos choose the format.

    Raises:
        BridgeError: `path` is a folder, or its parent folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise BridgeError("output.is_folder", f"{path} is a folder; expected the name of a file to write.")
    if not path.parent.is_dir():
        message = f"{path} cannot be written: the folder {path.parent} does not exist. Create it first."
        raise BridgeError("output.no_folder", message)
    stem = path.stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")  # a name holds 255 bytes
    temporary = path.with_name(f".{stem}.partial{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(source: Path, target: Path, *, backup: Path) -> None:
    """Rename the finished folder `source` to `target`, and remove the folder that was there.

    If it fails, the old folder stays. Meanwhile it is named `backup`, a new name on the same file system.
    """
    had_old = target.exists()
    if had_old:
        os.rename(target, backup)
    try:
        os.rename(source, target)
    except BaseException:
        if had_old:
            os.rename(backup, target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def lock_file(descriptor: int, *, message: str) -> None:
    """Lock an open file for this process until it is closed; does nothing where the system lacks such locks.

    Raises:
        BridgeError: with `message`, if another process has locked it.
    """
    with suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BridgeError("output.in_use", message) from None
