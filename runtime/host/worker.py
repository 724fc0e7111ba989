"""Call methods of an object in a subprocess with limited memory, so that a crash there does not end this process.

Workers are forked from a template, a process that has imported the object's module and does nothing else, so that they
start in milliseconds. They send only JSON and plain arrays, which cannot run code in this process.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import is_dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import BridgeError, EngineError
from bridge_stg.runtime.host.failures import host_error
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.subprocess import START, error_from_json, error_to_json

ENDED = "host.subprocess_killed"
"""Code of the error when a worker crashed, hung, was killed, needed too much memory, or raised an unexpected error."""
START_S, CALL_S = 60.0, 60.0  # seconds to wait for a worker to start, and for a call without limits
POLL_S, GRACE_S = 0.05, 2.0  # seconds between checks of the limits, and for a cancelled call to end
CALL_CPU_S = 3600  # CPU seconds; ends a call whose parent process was killed
MOST_FILES = 64  # open files per worker


class Worker:
    """An object in a subprocess; one thread at a time may call its methods. Starting the first worker takes seconds.

    Args:
        factory: "module:function", which makes the object from `arguments`.
        arguments: anything that can be pickled.
        memory_bytes: maximum address space of the worker, in addition to that of its imported modules.

    The attribute `process_id` is that of the subprocess.

    Raises:
        BridgeError: the function raised one.
        EngineError: the process cannot be started (`host.subprocess_failed`), or ended (`ENDED`).
    """

    def __init__(self, factory: str, *arguments: Any, memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        try:
            with theirs:
                socket.send_fds(TEMPLATE.start(factory.partition(":")[0]), [b"+"], [theirs.fileno()])
            if not self._connection.poll(START_S):
                raise TimeoutError("it does not answer")
            self.process_id = int(_receive(self._connection))  # sent before it touches any input
        except (EOFError, OSError) as error:
            self.close()
            raise EngineError("host.subprocess_failed", f"a subprocess cannot be started: {error}") from error
        self.call(factory, memory_bytes, *arguments)

    def call(self, method: str, *arguments: Any, limits: Limits | None = None) -> Any:
        """Call a method of the object as method(limits, *arguments).

        Args:
            method: name of the method.
            arguments: anything that can be pickled.
            limits: deadline, cancel signal and progress callback of the call; None: it fails after `CALL_S` seconds.

        Returns:
            The result, of JSON values and numpy arrays; bytes become uint8 [N], dataclasses become dictionaries.

        Raises:
            BridgeError: the method raised one, or the limits or their callback stopped the call.
            EngineError: the worker ended, or the method raised another exception (`ENDED`).
        """
        until = time.monotonic() + (CALL_S if limits is None else float("inf"))
        limits = limits or Limits()
        try:
            self._connection.send((method, arguments))
            while True:
                while not self._connection.poll(POLL_S):
                    limits.check()
                    if time.monotonic() > until:
                        raise EngineError(ENDED, f"the subprocess did not answer within {CALL_S:g} s")
                found = _receive(self._connection)
                if "progress" not in found:
                    break
                limits.report(*found["progress"])
        except (EOFError, OSError) as error:
            self.close()
            raise EngineError(ENDED, "the subprocess crashed or was killed") from error
        except BaseException:
            self._cancel()
            raise
        if "code" in found:
            raise error_from_json(found)
        return found["result"]

    @property
    def ended(self) -> bool:
        """Whether a call found that the process has ended, or `close` was called."""
        return self._connection.closed

    def close(self) -> None:
        """End the process."""
        self._connection.close()

    def _cancel(self) -> None:
        """Cancel the call, so that the worker can take another; kill the worker if the call does not end in time."""
        until = time.monotonic() + GRACE_S
        with suppress(EOFError, OSError):
            self._connection.send(None)
            while self._connection.poll(max(0.0, until - time.monotonic())):
                if "progress" not in _receive(self._connection):
                    return
            os.kill(self.process_id, signal.SIGKILL)
        self.close()


class _Template:
    """The process that workers are forked from; this process has one, which ends when this process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[str], socket.socket] | None = None

    def start(self, module: str) -> socket.socket:
        """Start the template, unless it runs, without waiting; it calls module.preload(). Return its connection."""
        with self._lock:
            if self._running is None or self._running[0].poll() is not None:
                ours, theirs = socket.socketpair()
                with theirs:
                    process = subprocess.Popen(
                        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                        pass_fds=[theirs.fileno()], start_new_session=True,  # so that Ctrl-C reaches only the parent
                        env={**os.environ, "MALLOC_ARENA_MAX": "2"},  # one per thread takes 64 MiB of addresses each
                    )  # fmt: skip
                    assert process.stdin is not None
                    with process.stdin as job:
                        paths = [path or "." for path in sys.path]
                        json.dump([paths, f"{__name__}:fork_workers", [theirs.fileno(), module]], job)
                self._running = process, ours
            return self._running[1]


TEMPLATE = _Template()


# The functions below run in the template and its workers.


def fork_workers(job: tuple[int, str]) -> None:
    """Fork a worker for each connection that arrives, until the parent has ended."""
    number, module = job
    with suppress(Exception):  # the worker imports it again and reports the error
        importlib.import_module(module).preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no worker remains as a zombie
    with socket.socket(fileno=number) as parent:
        while fds := socket.recv_fds(parent, 1, 1)[1]:
            if os.fork() == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    parent.close()
                    with suppress(EOFError, OSError):  # the parent has closed the connection
                        _serve(Connection(fds[0]))
                finally:
                    os._exit(0)
            os.close(fds[0])


def _serve(connection: Connection) -> None:
    """Make the object that the first call names, then call its methods."""
    target: Any = None
    limits = Limits(cancel=connection.poll, progress=lambda _, *done: _send(connection, {"progress": done}))
    _send(connection, os.getpid())
    while True:
        call = connection.recv()
        if call is None:  # cancels a call that had already ended
            continue
        method, arguments = call
        try:
            _limit("RLIMIT_CPU", int(time.process_time()) + CALL_CPU_S)
            if target is None:
                target = _make(method, *arguments)
                answer: Any = {"result": None}
            else:
                answer = {"result": getattr(target, method)(limits, *arguments)}
        except Exception as error:  # noqa: BLE001  # the parent gets every error as a BridgeError
            found = host_error(error) or error
            if not isinstance(found, BridgeError):
                traceback.print_exc()
                found = EngineError(ENDED, f"the subprocess failed: {type(error).__name__}: {error}")
            elif found.code == "host.out_of_memory":
                found = EngineError(ENDED, "the subprocess needs more memory than its limit")
            answer = error_to_json(found)
        _send(connection, answer)


def _make(factory: str, memory_bytes: int, *arguments: Any) -> Any:
    function = pkgutil.resolve_name(factory)
    _limit("RLIMIT_NOFILE", MOST_FILES)
    _limit("RLIMIT_CORE", 0)
    with suppress(OSError):  # not Linux
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        _limit("RLIMIT_AS", int(pages) * os.sysconf("SC_PAGE_SIZE") + memory_bytes)
        # If the machine runs out of memory, this process ends first.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    return function(*arguments)


def _limit(name: str, value: int) -> None:
    import resource

    with suppress(ValueError, OSError):  # a lower limit applies already
        number = getattr(resource, name)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


# Messages of a worker: JSON, followed by the bytes of its arrays.


def _send(connection: Connection, value: Any) -> None:
    arrays: list[np.ndarray] = []

    def encode(item: Any) -> Any:
        if is_dataclass(item):
            return vars(item)
        array = np.frombuffer(item, np.uint8) if isinstance(item, bytes) else np.asarray(item)
        arrays.append(np.ascontiguousarray(array))
        return {"dtype": array.dtype.str, "shape": array.shape}

    connection.send_bytes(json.dumps(value, default=encode).encode())
    for array in arrays:
        connection.send_bytes(array.reshape(-1).view(np.uint8).data)


def _receive(connection: Connection) -> Any:
    def decode(item: dict[str, Any]) -> Any:
        if "dtype" not in item:
            return item
        array = np.empty(item["shape"], np.dtype(item["dtype"]))
        connection.recv_bytes_into(array.reshape(-1).view(np.uint8))
        return array

    return json.loads(connection.recv_bytes(), object_hook=decode)
