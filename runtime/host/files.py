"""Write files and folders completely or not at all, and lock files."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge_stg.runtime.errors import BridgeError, HostError
from bridge_stg.runtime.host.memory import gigabytes

NEW, OLD = "new", "old"  # subfolders of the hidden folder: for the new output, and for the old one


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a path at which to build the file or folder `path`, in a hidden folder that is removed at the end.

    Hidden folders that killed processes left for `path` are removed, too; those of running processes are locked. An
    OSError that names the hidden folder, or no file, is raised with the name `path` instead.
    """
    stem = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")  # names have at most 255 bytes
    for left in path.parent.glob(f".{glob.escape(stem)}.????????.partial"):
        _remove_left(left, path)
    folder = path.with_name(f".{stem}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir(mode=0o700)
        lock = _lock_folder(folder)
        try:
            (folder / NEW).mkdir()
            yield folder / NEW / path.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except OSError as error:
        if error.errno is not None and str(error.filename or folder).startswith(str(folder)):
            error.filename = str(path)
        raise


def target_of(temporary: Path) -> Path:
    """Return the path that a `temporary_sibling` is built for."""
    return temporary.parents[2] / temporary.name


def _remove_left(folder: Path, path: Path) -> None:
    """Remove the hidden folder of a killed process, after moving back what it had moved away from `path`."""
    if not (folder / NEW).is_dir() or (lock := _lock_folder(folder)) is None:
        return
    with suppress(OSError):
        if not path.exists():
            os.rename(folder / OLD / path.name, path)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder of this user and return its descriptor; None if it is locked, or cannot be locked here."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, OSError):  # Windows has no fcntl
        return None
    with suppress(OSError):
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    os.close(descriptor)
    return None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file of the same name; it becomes `path` after the block, unless the block raises.

    Raises:
        BridgeError: `path` is a folder, or its parent folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise BridgeError("output.is_folder", f"{path} is a folder; expected the name of a file to write.")
    if not path.parent.is_dir():
        message = f"{path} cannot be written: the folder {path.parent} does not exist. Create it first."
        raise BridgeError("output.no_folder", message)
    with temporary_sibling(path) as temporary:
        yield temporary
        os.replace(temporary, path)


def replace_folder(temporary: Path, target: Path) -> None:
    """Replace the folder `target`, if it exists, with a finished folder that was built in a `temporary_sibling`.

    If that fails, the old folder stays; if the process is killed meanwhile, the next `temporary_sibling` restores it.
    """
    backup = temporary.parents[1] / OLD / target.name
    had_old = target.exists()
    if had_old:
        backup.parent.mkdir()
        os.rename(target, backup)
    try:
        os.rename(temporary, target)
    except BaseException:
        if had_old:
            os.rename(backup, target)
        raise


def require_space(path: Path, needed: int, *, purpose: str) -> None:
    """Check that the disk of a path, which may not exist yet, has `needed` free bytes.

    Raises:
        HostError: it has fewer; the message begins with "<path>: <purpose> needs".
    """
    folder = next(place for place in (path, *path.resolve().parents) if place.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"{path}: {purpose} needs {gigabytes(needed)} of disk, but {gigabytes(free)} are free"
        raise HostError("output.disk_full", f"{message}; make room, or choose another --out")


def lock_file(descriptor: int, *, message: str) -> None:
    """Lock an open file for this process until it is closed; do nothing where the system lacks such locks.

    Raises:
        BridgeError: another process has locked it; `message` is the error's text.
    """
    with suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BridgeError("output.in_use", message) from None
