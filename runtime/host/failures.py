"""Recognize system errors in the errors of any library: out of memory, threads, files or disk space; unreadable files.

They must not be reported as errors of the video, bundle or option that was being read.
"""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager

from bridge_stg.runtime.errors import BridgeError, HostError

TRIED_BYTES = 2**28  # memory is short if a mapping of this size fails
CODES = {
    errno.ENOMEM: "host.out_of_memory", errno.EAGAIN: "host.out_of_threads", errno.EMFILE: "host.too_many_files",
    errno.ENFILE: "host.too_many_files", errno.ENOSPC: "output.disk_full", errno.EDQUOT: "output.disk_full",
    errno.EFBIG: "output.not_writable", errno.EROFS: "output.not_writable", errno.EACCES: "host.file",
    errno.EPERM: "host.file", errno.EIO: "host.file", errno.ESTALE: "host.file",
    errno.ECHILD: "host.subprocess_killed",
}  # fmt: skip
"""`errno` of a system error → code of the `HostError`."""
MESSAGES = {
    "host.out_of_memory": "this process is out of memory ({}); close other programs, raise its limit (`ulimit -v`, "
    "or the container's), or use smaller inputs",
    "host.out_of_threads": "this process cannot start more threads or processes ({}); raise the limit (`ulimit -u`, "
    "the pids limit of the container), or pass fewer --threads",
    "host.subprocess_killed": "a subprocess was killed ({}), most likely because memory ran out; close other programs, "
    "or pass fewer --workers",
    "host.too_many_files": "too many files are open ({}); close some, or raise the limit (`ulimit -n`)",
}
"""Code → message, where {} is the system's text. For other codes, that text is the whole message."""
TEXTS = {
    errno.ENOMEM: r"bad_alloc|bad allocation|[Oo]ut of memory|ailed to (allocate memory|map segment)|"
    r"an(no|')t allocate (memory|lock)",
    errno.EAGAIN: r"can't start new thread|pthread_create|Resource temporarily unavailable",
    errno.EMFILE: r"Too many open files",
    errno.ENOSPC: r"No space left on device",
    errno.ECHILD: r"^DataLoader worker \(pid.* (killed by signal|exited unexpectedly)",
}
"""`errno` → messages of libraries that do not set it: onnxruntime, torch, Pillow, threading."""
STATED = re.compile(r"(?:\(os error|\bSystemError :|\bsystem error number) (\d+)\b")
"""How libraries in Rust, and onnxruntime, state an `errno` in a message."""
LIBRARIES = ("onnxruntime", "safetensors")
NAMED = re.compile(r"(?!host\.missing_package)(host|output|server|live|call)\..+|.+\.(out_of_memory|no_permission)")
"""Codes of errors that already name the system error. A package may be missing because it cannot be mapped."""


def host_error(error: BaseException) -> BridgeError | None:
    """Return the error to report instead if the system caused `error`, or one that led to it; None otherwise."""
    if isinstance(error, BridgeError) and NAMED.fullmatch(error.code):
        return None
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HostError):
            return found
        if (number := _number(found)) in CODES:
            code, name = CODES[number], getattr(found, "filename", None)
            text = getattr(found, "strerror", None) or " ".join(str(found).split())[:300] or type(found).__name__
            return HostError(code, MESSAGES.get(code, "{}").format(f"{name}: {text}" if name else text))
        found = found.__cause__ or found.__context__
    return None


@contextmanager
def converting_os_errors() -> Iterator[None]:
    """Convert an OSError inside the block to the HostError that stands for it, if there is one."""
    try:
        yield
    except OSError as error:
        if (found := host_error(error)) is None:
            raise
        raise found from error


@contextmanager
def reporting_host_errors() -> Iterator[None]:
    """Convert errors that the system caused inside the block to HostError; also works as a decorator.

    An OSError of the caller's own iterator or callback is raised unchanged, unless a resource has run out.
    """
    try:
        yield
    except Exception as error:
        found = host_error(error)
        if found is None or not (isinstance(error, BridgeError) or found.code in MESSAGES):
            raise
        raise found from error


def _number(error: BaseException) -> int | None:
    """Return the `errno` that an exception stands for; None if the system did not cause it."""
    if isinstance(error, BridgeError):
        return None
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif not isinstance(number, int):
        is_theirs = type(error) is Exception or type(error).__module__.partition(".")[0] in LIBRARIES
        if not (is_theirs or isinstance(error, (RuntimeError, OSError, ImportError))):
            return None  # its text may quote the user's input
        stated = STATED.search(str(error))
        texts = (n for n, form in TEXTS.items() if re.search(form, str(error)))
        number = int(stated[1]) if stated else next(texts, None)
    if number == errno.EAGAIN:
        if hasattr(error, "characters_written"):  # BlockingIOError of a non-blocking pipe
            return None
        return errno.ENOMEM if _is_short() else number  # a thread needs memory for its stack
    if type(error).__module__ == "av.error" and (number in (errno.EACCES, errno.EPERM, errno.EIO) or
                                                 (number == errno.ENOMEM and not _is_short())):  # fmt: skip
        return None  # FFmpeg also raises these for damaged files: reads beyond the end, impossible sizes
    return number


def _is_short() -> bool:
    """Return whether memory is short: whether `TRIED_BYTES` cannot be mapped."""
    try:
        mmap.mmap(-1, TRIED_BYTES).close()
    except (OSError, ValueError):
        return True
    return False
