"""Write files and folders completely or not at all; append JSON lines that survive a kill; lock files."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from bridge_stg.runtime.errors import BridgeError, HostError
from bridge_stg.runtime.host.memory import gigabytes

LineFileT = TypeVar("LineFileT", bound="LineFile")
NEW, OLD = "new", "old"  # subfolders of the hidden folder: for the new output, and for the old one
BLOCK = 2**16  # bytes that are read at once in search of the last line


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


def check_creatable(path: Path) -> None:
    """Check that a folder exists, or can be created with the parents that it lacks.

    Raises:
        BridgeError: a parent is a file (`output.no_folder`), or may not be written (`output.not_writable`).
    """
    if os.path.lexists(path):
        return
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise BridgeError("output.no_folder", f"{path}: {parent} is a file; choose another folder.")
    check_writable(path, parent)


def check_writable(path: Path, folder: Path) -> None:
    """Raise BridgeError if nothing can be created in `folder`, which exists; `path` is what is to be created there."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BridgeError("output.not_writable", f"{path}: the folder {folder} is not writable.")


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


class LineFile:
    """A file of JSON objects, one per line, that this process alone appends to. A context manager.

    A line counts once it is complete: a last line that a killed process left incomplete is removed.

    Args:
        path: the file; created if it does not exist, and removed again if nothing is appended before an error.
        in_use: text of the error if another process has opened the file.
        overwrite: remove all lines.
        durable: whether a line is on disk, under this path, when `append` returns; otherwise the system delays it.

    Attributes:
        repaired: whether an incomplete line was removed.

    Raises:
        BridgeError: another process has opened the file (`output.in_use`), or `check_lines` fails.
    """

    def __init__(self, path: Path, *, in_use: str, overwrite: bool = False, durable: bool = True) -> None:
        self.path, self._durable = path, durable
        self._is_unused = not path.exists()
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            lock_file(self._file.fileno(), message=in_use)
            if overwrite:
                self._file.truncate(0)
            check_lines(path)
            self.repaired = _repaired(self._file)
        except BaseException:
            self._file.close()
            raise

    def read(self, header: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
        """Return the first line, and the lines after it; `header` becomes the first line of an empty file.

        Raises ValueError, here and in the iteration, as `read_lines` does.
        """
        if not self._file.seek(0, os.SEEK_END):
            self._write(header)
        lines = read_lines(self.path)
        return next(lines, {}), lines

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line. Raises OSError with the file's name; BridgeError if a durable file was removed meanwhile."""
        self._write(values)
        self._is_unused = False

    def _write(self, values: Mapping[str, Any]) -> None:
        # Bytes of a file name that are not Unicode are escaped as JSON escapes them.
        line = (json.dumps(values, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        try:
            self._file.write(line)
            self._file.flush()
            if not self._durable:
                return
            os.fsync(self._file.fileno())
            is_there = self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError as error:
            error.filename = str(self.path)
            raise
        if not is_there:
            what = f"{self.path} was removed or replaced while results were written to it; they are lost"
            raise BridgeError("output.not_writable", f"{what}. Run the command again.")

    def __enter__(self: LineFileT) -> LineFileT:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_unused and any(exception):
            with suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file, which another process may then open. Can be called repeatedly."""
        self._file.close()


def check_lines(path: Path) -> None:
    """Raise BridgeError if a file exists and does not begin as a JSON object in one line does; it may be empty."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        if not b'{"'.startswith(file.read(2)):
            what = f"{path} exists, and its first line is no JSON object. Give another name, or remove it."
            raise BridgeError("output.exists", what)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines, which another process may be writing.

    Lines that were not written to their end are left out: a last one without a newline, and those whose blocks a crash
    of the system left empty. Raises ValueError, with file and line number, for another line that is no object.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield _object(line)
            except ValueError as error:
                if line.endswith(b"\n") and b"\0" not in line:
                    raise ValueError(f"{path}:{number}: is no line of this file ({error})") from None


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _repaired(file: IO[bytes]) -> bool:
    """End a file in a complete line: remove an incomplete last one, and return whether there was one."""
    size = end = file.seek(0, os.SEEK_END)
    last = b""
    while end and b"\n" not in last:
        start = max(0, end - BLOCK)
        file.seek(start)
        last, end = file.read(end - start) + last, start
    last = last[last.rfind(b"\n") + 1 :]
    if not last:
        return False
    try:
        _object(last)
    except ValueError:
        file.truncate(size - len(last))
        return True
    file.write(b"\n")
    return False
